"""Model and example inputs to a `Program`: one torch.export, with provenance of its numbers."""
