"""Distillation: the recipe, and its parts: sentences, teachers and their targets, stages, heads, losses."""
