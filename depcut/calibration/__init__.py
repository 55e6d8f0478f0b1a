"""Statistics of a model on a user's data: what criteria ask for, and what repairs need."""
