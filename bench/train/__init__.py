"""Training speed side by side: the reference recipe, Unsloth, and this project's trainer."""
