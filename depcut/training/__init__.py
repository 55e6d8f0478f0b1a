"""Training around pruning: schedules, retraining, gradual masks, regularisation."""
