"""Keeping less for backward: recomputed regions, packed tensors, losses in chunks."""
