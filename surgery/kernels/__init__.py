"""Elementwise work on whole tensors, as pure functions."""
