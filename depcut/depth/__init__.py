"""Whole residual branches as units: find them, score them, choose how many go."""
