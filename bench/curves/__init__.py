"""Loss curves: this project's trainer beside the reference recipe, and how far runs differ by themselves."""
