"""What makes a training step fast: one small module per piece, each with a slower, plain equivalent."""
