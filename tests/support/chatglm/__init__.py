"""A model that comes with its own code, in ChatGLM2's names and structure. Tests copy these files beside weights."""
