"""What model libraries agree on, as far as a capture needs it: example inputs, caches, outputs."""
