"""The rules run over a captured graph: groups of coupled dimensions, frozen ones with reasons."""
