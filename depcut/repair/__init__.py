"""Weights after the removal: re-solved on data, constants folded, dead units found."""
