"""Training some weights at a time: rounds, and drawing them within a budget."""
