"""Is the smaller model right? Compared by value with the masked dense one."""
