"""Checkpoints, and the search for values that are not finite."""
