"""Getting the accuracy back, and pruning while training: parts for any loop, and a loop."""
