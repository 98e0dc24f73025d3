"""GLUE's tasks by name (Wang et al. 2019): their columns, files and published metrics. CoLA has a reader of its own.

    python -c "from data.glue import GLUE; print(GLUE['mrpc'])"
"""
from __future__ import annotations

from typing import NamedTuple

REPOSITORY = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """Holds the text columns of a task and the metrics that GLUE's leaderboard has for it."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[str, ...] = ("validation",)
    positive: str = ""  # name of the class that F1 is of; in files without names it is 1

    def files(self, name: str) -> dict[str, str]:
        """Returns the file of each split in the Hub's repository; test splits have no labels."""
        return {split: f"{name}/{split}-00000-of-00001.parquet" for split in ("train", *self.dev)}


GLUE = {
    "sst2": GlueTask(("sentence",), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1"), positive="equivalent"),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1"), positive="duplicate"),
    "mnli": GlueTask(("premise", "hypothesis"), ("accuracy",), ("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
}


def glue_scores(task: str, validation: dict[str, dict], by_class: dict[str, dict]) -> dict[str, dict[str, float]] | None:
    """Returns GLUE's metrics of a task by split, None for another task.

    F1 is that of one class: the pair is a paraphrase, or a duplicate.

    Args:
        validation, by_class: as in summary.json.
    """
    if task not in GLUE:
        return None
    found = {}
    for split, scores in validation.items():
        classes = by_class.get(split, {}).get("per_class", {})
        positive = classes.get(GLUE[task].positive, classes.get("1", {}))
        known = {**scores, "f1": positive.get("f1")}
        # A table of the user's own may have other labels, and no such score.
        found[split] = {name: known[name] for name in GLUE[task].metrics if known.get(name) is not None}
    return found
