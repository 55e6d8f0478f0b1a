"""The plan: kept units as integers, and the sizes, costs and attributes that follow from them."""
