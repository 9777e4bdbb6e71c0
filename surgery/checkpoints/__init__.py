"""Runs on disk: saved and resumed, exported as plain checkpoints, replayed from scalars."""
