"""Calibration inputs made from a trained model itself, where there is no data."""
