"""Zeros in a dense model that make it compute what the smaller one will."""
