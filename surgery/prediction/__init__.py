"""A training step foreseen: played on tensors without memory, every allocation counted."""
