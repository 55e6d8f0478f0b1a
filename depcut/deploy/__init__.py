"""ONNX files that are checked before they appear, and what runs them."""
