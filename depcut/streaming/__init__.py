"""Checkpoints that do not fit in memory: shrunk tensor by tensor, from shards to shards."""
