"""Defaults that depend on the task, the method or --plain; all others stand in options/schema.py.

    default(EPOCHS["distil"], "cola", plain=True)    # 15
"""
from __future__ import annotations

from options.schema import DistilOptions, TrainOptions

# The built-in task's model is small: it wants more epochs and a higher rate than a pretrained one.
EPOCHS = {"LoRA": {"tiny": 12, "": TrainOptions.epochs}, "distil": {"plain tiny": 30, "plain": 15, "cola": 6, "": 3}}
# By method: what is pretrained wants small steps, what starts from nothing large ones.
LEARNING_RATE = {"lora": {"tiny": 2e-3, "": TrainOptions.lr}, "full": {"tiny": 5e-4, "": 5e-5},
                 "head": {"tiny": 1e-2, "": 1e-3}, "features": {"": 3e-3}, "none": {"": TrainOptions.lr},
                 "distil": {"plain": 3e-3, "": 5e-4}}
# Of a distillation in stages; `--plain` has those of DistilOptions.
STAGES = {"temperature": {"plain": DistilOptions.temperature, "": 1.0},
          "kd_alpha": {"plain": DistilOptions.kd_alpha, "": 0.5},
          "student_embeddings": {"plain": "random", "": "teacher"}, "match": {"plain": "none", "": "hidden"},
          "pooling": {"plain": DistilOptions.pooling, "": "attention"},
          "directions": {"plain": DistilOptions.directions, "": None},  # None: those in which the teacher reads
          "pretrain": {"plain": 0, "": 0},
          "transfer": {"tiny": 4, "plain": 0, "": 3}}
# Sentences of the transfer set for each one of the training set, and at most.
AUGMENT_TIMES = {"cola": 35, "": 28}
AUGMENT_MOST = {"tiny": 24_000, "cola": 300_000, "": 240_000}


def default(table: dict, task: str, plain: bool = False):
    """Returns the task's entry of a table of defaults, or the entry for all other tasks.

    Args:
        plain: whether the entries for --plain come first.
    """
    keys = ([f"plain {task}", "plain"] if plain else []) + [task, ""]
    return next(table[key] for key in keys if key in table)


def in_words(table: dict) -> str:
    """Returns a table of defaults in words."""
    def when(key: str) -> str:
        plain, task = key.startswith("plain"), key.removeprefix("plain").strip()
        return (" with --plain" if plain else "") + (f" for --task {task}" if task else "")
    otherwise = " otherwise" if len(table) > 1 else ""
    return ", ".join((value if isinstance(value, str) else f"{value:g}") + (when(key) if key else otherwise)
                     for key, value in table.items())
