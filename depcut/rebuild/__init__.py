"""Plans whose smaller model is what its class builds from a config of other numbers."""
