"""Timing: the clock, what runs a candidate, and the comparison of several."""
