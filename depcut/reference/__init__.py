"""The captured graph run on values: dense, masked where units are read, or sliced."""
