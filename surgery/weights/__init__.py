"""Which weights, the coordinates that stand for them, and where they lie."""
