"""The version of depcut."""

__version__ = "0.1.0"
