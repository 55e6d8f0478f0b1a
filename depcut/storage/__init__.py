"""Models in folders: weights, plan, patches and what was done, loaded again without pickle."""
