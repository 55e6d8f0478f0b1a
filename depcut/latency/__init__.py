"""Time as a function of the kept counts, measured on this machine."""
