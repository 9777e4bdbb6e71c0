"""What a pass is: its hooks, its options, its name."""
