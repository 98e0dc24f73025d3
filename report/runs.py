"""Reads a run's folder as a whole: options, results, epochs, calibration, and the shapes of its weights.

    run = Run(Path("runs/LoRA-12345"))
    run.problem, run.class_names, run.tensors("adapter_model.safetensors")
"""

from pathlib import Path

from report.records import Record, main_split, read_json, read_metrics
from report.scores import chosen_key, problem_of, score_keys

# Names of the classes 0 and 1 in old runs of these tasks.
OLD_NAMES = {"cola": ["unacceptable", "acceptable"], "tiny": ["unacceptable", "acceptable"]}


class Run:
    """Holds the files of a finished run.

    Attributes:
        summary, config: summary.json and config.json.
        metrics: the lines of metrics.jsonl; none for the method "none", which trains nothing.
        problem: single-label, multi-label or regression.
        class_names: names of the classes for readers, by their recorded names; empty where they are the same.

    Raises ReportError where a file is missing or malformed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.summary, self.config = read_json(folder / "summary.json"), read_json(folder / "config.json")
        self.problem = problem_of(self.config)
        recorded = self.config.get("classes", ["0", "1"])
        # Runs of the time before classes had names recorded none.
        names = self.config.get("class_names") or OLD_NAMES.get(self.summary.get("task"), [])
        self.class_names = dict(zip(recorded, names, strict=False))
        path = folder / "metrics.jsonl"
        untrained = self.summary.get("method") == "none"
        self.metrics = [] if untrained and not path.exists() else read_metrics(path)

    @property
    def options(self) -> Record:
        return self.config.section("options")

    @property
    def result(self) -> Record:
        """Returns the results of the run's own model: for a distillation the student with KD."""
        return self.summary.section("student") if self.summary["mode"] == "distil" else self.summary

    @property
    def split(self) -> str:
        """Returns the split that chose the best epoch."""
        return main_split(self.result.section("validation"))

    @property
    def classes(self) -> list[str]:
        """Returns the names of the classes for readers, in the order of the labels."""
        recorded = self.config.get("classes") or list(self.by_class().get("per_class", {}))
        return [self.class_names.get(name, name) for name in recorded]

    @property
    def keys(self) -> tuple[str, ...]:
        """Returns the scores that the run reports."""
        return score_keys(self.problem, self.result.section("validation").section(self.split))

    @property
    def chosen(self) -> str:
        """Returns the score that chose the best epoch."""
        last = [row for row in self.metrics if row.get("stage", "gold") == "gold"
                and row.get("phase", "student") == "student"]
        return chosen_key(self.problem, last, self.result.number("best_epoch"))

    def by_class(self) -> Record | dict:
        """Returns the scores by class on the split that chose the epoch; none if they were not recorded."""
        found = self.result.get("by_class", {})
        return found.get(self.split, {}) if isinstance(found, dict) else {}

    def has_confusion(self) -> bool:
        """Returns whether a matrix of true and predicted classes was recorded."""
        return "confusion" in self.by_class() and self.problem == "single-label"

    def calibration(self) -> Record | None:
        """Returns calibration.json, if the run was calibrated."""
        path = self.folder / "calibration.json"
        return read_json(path) if path.is_file() else None

    def tensors(self, name: str) -> dict[str, list[int]]:
        """Returns the shapes of the floating-point tensors of a file of weights by name; none if there is no such file."""
        if not (self.folder / name).is_file():
            return {}
        # Imported late: a table of numbers needs no reader of weights.
        from safetensors import safe_open

        with safe_open(self.folder / name, "numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            # Whole numbers are maps from tokens to rows, no parameters.
            return {key: one.get_shape() for key, one in slices.items() if one.get_dtype().startswith(("F", "BF"))}
