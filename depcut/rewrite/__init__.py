"""Making the smaller model: the only stage that makes tensors."""
