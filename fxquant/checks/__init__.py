"""What comes from outside is checked here: arguments against type hints, values of files against schemas."""
