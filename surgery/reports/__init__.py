"""What a surgery does, as tables and as code: predicted and measured."""
