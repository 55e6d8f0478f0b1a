"""Adapters to other people's training loops and model libraries."""
