"""A model's own code as it was written for transformers 4; copied beside the weights, as in a repository of the hub."""
