"""The names of scores, and the scores that the runs of each problem report; every table and figure asks here.

    score_keys("single-label")    # ("accuracy", "mcc")
    SCORES["mcc"].shown(0.512)    # 0.512
"""

import math
from typing import NamedTuple

from report.records import Record, ReportError, main_split


class Score(NamedTuple):
    """The way a score is shown."""

    column: str  # LaTeX, above a column
    name: str  # in prose and on an axis
    factor: float = 1
    digits: int = 3
    largest: bool = True  # whether more is better
    ignorant: float = math.nan  # its value for a model that ignores its input; NaN: depends on the data
    unit: str = ""  # LaTeX, behind a number in prose

    def shown(self, value: float | None, signed: bool = False) -> str:
        """Returns a value as LaTeX."""
        if value is None or not math.isfinite(value):
            return "n/a"
        # Exactly zero is no measurement but a convention: the correlation of a constant.
        if value == 0 and not signed:
            return "0"
        return f"{self.factor * value:{'+' if signed else ''}.{self.digits}f}".replace("-", "$-$")

    def prose(self, value: float | None, signed: bool = False) -> str:
        """Returns a value as LaTeX with its unit."""
        return self.shown(value, signed) + self.unit


SCORES = {"accuracy": Score(r"acc.\,\%", "accuracy", 100, 2, unit=r"\,\%"),
          "mcc": Score("MCC", "Matthews correlation", ignorant=0),
          "macro_f1": Score("macro-F1", "macro-F1"),
          "pearson": Score("Pearson", "Pearson correlation", ignorant=0),
          "spearman": Score("Spearman", "Spearman correlation", ignorant=0),
          "mse": Score("MSE", "mean squared error", largest=False),
          "f1_micro": Score("micro-F1", "micro-F1"), "f1_macro": Score("macro-F1", "macro-F1")}
# The scores of each problem; the first one that a model's choice can rest on stands in CHOSEN.
KEYS = {"single-label": ("accuracy", "mcc"), "multi-label": ("f1_micro", "f1_macro"),
        "regression": ("pearson", "spearman", "mse")}
CHOSEN = {"single-label": "mcc", "multi-label": "f1_micro", "regression": "spearman"}
LOSSES = {"single-label": "cross-entropy", "multi-label": "binary cross-entropy", "regression": "mean squared error"}


def problem_of(config: Record) -> str:
    """Returns the problem of a run. Raises ReportError for one that the report does not know."""
    # Runs of the time before there were other problems recorded none.
    problem = config.get("problem") or "single-label"
    if problem not in KEYS:
        raise ReportError(f"{config.source}: 'problem' is {str(problem)[:60]!r}; expected one of {', '.join(KEYS)}")
    return problem


def score_keys(problem: str, scores: Record | None = None) -> tuple[str, ...]:
    """Returns the keys of the scores that a problem's tables and figures show, or those of them that `scores` has."""
    return tuple(key for key in KEYS[problem] if scores is None or key in scores)


def chosen_key(problem: str, metrics: list[Record], best_epoch: float) -> str:
    """Returns the score by which the best epoch was chosen: the one that is best there on the split that chooses."""
    # The usual one first: several scores may be best in the same epoch.
    for key in (CHOSEN[problem], *KEYS[problem]):
        values = {row.number("epoch"): row.section("validation").section(main_split(row.section("validation"))).get(key)
                  for row in metrics}
        known = {epoch: value for epoch, value in values.items() if value is not None}
        best = (max if SCORES[key].largest else min)(known.values(), default=None)
        if best is not None and known.get(best_epoch) == best:
            return key
    return CHOSEN[problem]


def without_input(scores: Record, key: str) -> float:
    """Returns the score of a model that ignores its input: as recorded, or known, or NaN."""
    recorded = scores.get(f"majority_{key}", scores.get(f"mean_{key}"))
    return SCORES[key].ignorant if recorded is None else float(recorded)
