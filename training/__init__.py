"""Holds the parts of a training: its checkpoints, the average of its weights, and the search for values not finite."""
