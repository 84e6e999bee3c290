"""`stage=bench`: the product's own training step, timed for each shape."""
