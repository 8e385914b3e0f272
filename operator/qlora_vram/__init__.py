"""The VRAM table: facts of a model, bytes of a run, kinds of GPUs, and the plan that brings them together. Pure.

Operator, command line and trainer share it, so it knows none of them: data in, data out, pydantic only.
"""
