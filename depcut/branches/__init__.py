"""Residual branches of a captured graph: what can be dropped as a whole."""
