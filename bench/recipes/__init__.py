"""The five recipes of examples/ at their real shapes: memory and speed beside what their authors claim."""
