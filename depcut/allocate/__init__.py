"""From a budget to the kept count of every group."""
