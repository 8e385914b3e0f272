"""The trainer image: `prepare`, `train` and `merge`, one readable file per command.

`python -m qlora_trainer prepare|train|merge` reads its RunConfig from the environment and leaves a RunReport behind.
"""
