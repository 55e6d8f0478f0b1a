"""Budget to kept counts."""
