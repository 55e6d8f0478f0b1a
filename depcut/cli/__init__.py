"""The `depcut` command."""
