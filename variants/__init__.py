"""Variants of LoRA and other small adaptations, one file each: the equation, its source, its shapes and its cost."""
