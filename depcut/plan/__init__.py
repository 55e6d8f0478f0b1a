"""What stays, as integers, and everything that can be evaluated from it without a forward pass."""
