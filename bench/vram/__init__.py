"""Peaks of GPU memory, measured and predicted."""
