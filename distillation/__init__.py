"""Holds what a student learns from: objectives, what is matched, and the heads that training alone needs."""
