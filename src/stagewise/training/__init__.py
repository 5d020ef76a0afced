"""Training from a recipe: loading it, starting workers, the loop, checkpoints, progress."""
