"""Finding the setting at which an operator works best."""
