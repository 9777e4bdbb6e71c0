"""Gradients from forwards: directions, reads of W + s z, two evaluations."""
