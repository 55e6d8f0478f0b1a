"""Families of plans, one a ratio, of which the units are scored once."""
