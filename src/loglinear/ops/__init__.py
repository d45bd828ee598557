"""The operator and its backends."""
