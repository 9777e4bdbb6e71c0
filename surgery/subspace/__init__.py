"""Training projections: nodes that keep a projection of x, and coordinates of their size."""
