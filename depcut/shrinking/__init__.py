"""From an analysed model to the smaller one: by data, by what the model makes, or by weights."""
