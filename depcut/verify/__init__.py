"""Check a smaller model by value against the masked dense one."""
