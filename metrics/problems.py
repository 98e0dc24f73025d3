"""The problems that a model can be trained for: one of several classes, any number of labels at once, or a number.

    problem = PROBLEMS["regression"]
    problem.loss(logits, labels), problem.scores(logits, labels)[problem.chosen]

A problem has its loss, its activation, its scores and the score that chooses the best epoch; the rest of the code asks it. A
new problem is a class here, and a reader of its labels in data/columns.py.
"""
from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machine.errors import UserError
from metrics import classification
from metrics.classification import metrics


class Problem:
    """The parts that all problems share."""

    name: str  # of --problem, and in config.json
    problem_type: str  # of a `transformers` config: its classifiers compute the same loss
    chosen: str  # the score that chooses the best epoch, a threshold and a learning rate; higher is better
    shown: dict[str, str]  # scores of tables by their key -> heading
    baseline_name: str  # of the model that always says the same
    baseline_scores: dict[str, str | float]  # its score by key: a value, or the key in `scores` that has it
    counts: str = "confusion"  # the key of `count`'s matrices in metrics.jsonl
    least_classes = 2  # outputs
    shift_free = False  # whether the same constant added to all logits of a row changes nothing

    def __reduce__(self):
        # Copies are the same object: problems are compared by identity.
        return problem_named, (self.name,)

    def nothing(self, classes: int):
        """Returns the label of a row that has none, in place of one."""
        return 0

    def start(self, layer: nn.Linear, labels: list) -> None:
        """Prepares the last linear layer of a fresh head for the training rows' labels; by default it stays as it is."""

    def check(self, option: str, used: bool) -> None:
        """Raises `UserError` if an option or mode is used that has a meaning for one of several classes alone."""
        if used and self.name != "single-label":
            raise UserError(f"{option}: for one of several classes (--problem single-label), and this is a {self.name} "
                            "problem")

    def line(self, classes: tuple[str, ...]) -> str:
        """Describes classes or labels for the line that begins a run."""
        return f"{self.outputs} {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"

    def answers(self, logits: Tensor, classes: tuple[str, ...]) -> list[dict]:
        """Returns the `answer` of each row of logits (N, outputs)."""
        return [self.answer(row, classes) for row in logits]

    def baseline(self, validation: dict[str, dict]) -> dict[str, dict[str, float]]:
        """Returns the scores by split of the model that always says the same, from those of another model."""
        found = {}
        for split, values in validation.items():
            found[split] = {key: values[one] if isinstance(one, str) else one for key, one in self.baseline_scores.items()}
        return found


class SingleLabel(Problem):
    """One of several classes: softmax, cross-entropy; labels are class indices (B,) int64."""

    name, problem_type, chosen = "single-label", "single_label_classification", "mcc"
    shown = {"accuracy": "accuracy", "mcc": "MCC"}
    baseline_name, baseline_scores = "majority class", {"accuracy": "majority_accuracy", "mcc": 0.0}
    outputs = "classes"
    right_name = "accuracy"
    shift_free = True

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Computes the cross-entropy, averaged over the rows: (B, classes), (B,) -> ()."""
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def total_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes `loss` summed over the rows."""
        return F.cross_entropy(logits, labels, reduction="sum")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes softmax, (..., classes)."""
        return logits.softmax(-1)

    def choose(self, logits: Tensor) -> Tensor:
        """Returns the likeliest class of each row, (B, classes) -> (B,)."""
        return logits.argmax(-1)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Counts the rows that are right."""
        return (logits.argmax(-1) == labels).sum()

    def count(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Counts the confusion matrix (classes, classes), [label][prediction], on the device."""
        classes, predictions = logits.shape[1], logits.argmax(-1)
        found = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
        return found.index_add_(0, labels * classes + predictions, torch.ones_like(predictions)).view(classes, classes)

    def no_counts(self, classes: int) -> Tensor:
        """Returns `count` of no row."""
        return torch.zeros(classes, classes, dtype=torch.int64)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, int | float]:
        """Computes the scores of predictions; see `classification.scores`."""
        return classification.scores(logits, labels)

    def matrix(self, logits: Tensor, labels: Tensor) -> list:
        """Returns the confusion matrix [label][prediction]."""
        return classification.confusion(logits, labels)

    def per_class(self, matrix: list, classes: tuple[str, ...]) -> dict:
        """Returns precision, recall, F1 and n of each class by name."""
        return classification.per_class(matrix, classes)

    def train_scores(self, sums: dict[str, float], matrix: list) -> dict[str, float]:
        """Returns the scores of an epoch's training rows; see `classification.scores_of_sums`."""
        return classification.scores_of_sums(sums, matrix)

    def in_words(self, label: int, classes: tuple[str, ...]) -> str:
        """Returns a label as text."""
        return classes[label]

    def answer(self, logits: Tensor, classes: tuple[str, ...]) -> dict:
        """Returns label, probability and probabilities of logits (classes,)."""
        return self.answers(logits[None], classes)[0]

    def answers(self, logits: Tensor, classes: tuple[str, ...]) -> list[dict]:
        """Returns the `answer` of each row of logits (N, classes): one call of PyTorch for all, which costs most of it."""
        found = []
        for probabilities in self.probabilities(logits.float()).tolist():
            # The first of equal ones.
            best = probabilities.index(max(probabilities))
            found.append({"label": classes[best], "probability": probabilities[best],
                          "probabilities": dict(zip(classes, probabilities, strict=True))})
        return found


class MultiLabel(Problem):
    """Any number of labels at once: a sigmoid for each, binary cross-entropy; labels are 0 and 1, (B, labels) float32.

    A label is chosen where its probability is above a half.
    """

    name, problem_type, chosen = "multi-label", "multi_label_classification", "f1_micro"
    shown = {"f1_micro": "micro F1", "f1_macro": "macro F1"}
    baseline_name = "commonest label"
    baseline_scores = {"f1_micro": "majority_f1_micro", "f1_macro": "majority_f1_macro"}
    outputs = "labels"
    counts = "label_counts"
    right_name = "all labels right"

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Computes the binary cross-entropy, averaged over rows and labels: (B, labels), (B, labels) -> ()."""
        self.check("--label-smoothing", label_smoothing > 0)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def total_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes `loss` summed over the rows."""
        return self.loss(logits, labels) * len(labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes the sigmoid of each logit."""
        return logits.sigmoid()

    @torch.no_grad()
    def start(self, layer: nn.Linear, labels: list[tuple[float, ...]]) -> None:
        """Sets the bias to the log-odds of the labels' shares, if there is one (Lin et al. 2017, section 3.3).

        Otherwise the first epoch of many rare labels learns that they are rare.
        """
        if layer.bias is not None:
            # One row more with each label, and one without: no share is 0 or 1.
            share = (torch.from_numpy(np.asarray(labels, np.float32)).sum(0) + 1) / (len(labels) + 2)
            layer.bias.copy_(share.logit())

    def nothing(self, classes: int) -> tuple[float, ...]:
        return (0.0,) * classes

    def choose(self, logits: Tensor) -> Tensor:
        """Returns 1 for each label with a probability above a half, else 0: (B, labels) -> (B, labels)."""
        return (logits > 0).to(torch.float32)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Counts the rows with all labels right and no other."""
        return (self.choose(logits) == labels).all(-1).sum()

    def count(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Counts (labels, 2, 2), [label][truth][prediction], on the device."""
        truth, chosen = labels.bool(), logits > 0
        cells = [(t & c).sum(0) for t in (~truth, truth) for c in (~chosen, chosen)]
        return torch.stack(cells, -1).view(-1, 2, 2)

    def no_counts(self, classes: int) -> Tensor:
        """Returns `count` of no row."""
        return torch.zeros(classes, 2, 2, dtype=torch.int64)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, int | float]:
        """Computes n, loss, micro and macro F1, and the micro F1 of a model that always says the commonest label alone.

        A label without truth and choice counts 0 in macro F1, as scikit-learn's `zero_division=0`.

        Args:
            logits, labels: (N, labels), on the CPU.
        """
        sk, truth, chosen = metrics(), labels.numpy().astype(int), self.choose(logits).numpy().astype(int)
        f1 = {f"f1_{how}": float(sk.f1_score(truth, chosen, average=how, zero_division=0)) for how in ("micro", "macro")}
        most = int(truth.sum(0).max())
        # One label in each row: `most` of them are right. 2 right / (chosen + true).
        # The macro F1 is that of the one label, shared among all.
        return {"n": len(labels), "loss": float(self.loss(logits.double(), labels)), **f1,
                "majority_f1_micro": 2 * most / (len(truth) + int(truth.sum())),
                "majority_f1_macro": 2 * most / (len(truth) + most) / truth.shape[1]}

    def matrix(self, logits: Tensor, labels: Tensor) -> list:
        """Returns the counts [label][truth][prediction]."""
        return self.count(logits, labels).tolist()

    def per_class(self, matrix: list, classes: tuple[str, ...]) -> dict:
        """Returns precision, recall, F1 and n of each label by name."""
        found = {}
        for name, counts in zip(classes, matrix, strict=True):
            # The second of two classes, absent and present.
            found[name] = classification.per_class(counts, ("absent", "present"))["present"]
        return found

    def train_scores(self, sums: dict[str, float], matrix: list) -> dict[str, float]:
        """Returns loss, binary cross-entropy, micro and macro F1 of an epoch's training rows."""
        counts = torch.tensor(matrix, dtype=torch.float64)  # (labels, 2, 2)
        hits, chosen_or_true = 2 * counts[:, 1, 1], 2 * counts[:, 1, 1] + counts[:, 0, 1] + counts[:, 1, 0]
        return {"loss": sums["loss"] / sums["rows"], "cross_entropy": sums["cross_entropy"] / sums["rows"],
                "f1_micro": float(hits.sum() / chosen_or_true.sum().clamp(min=1)),
                "f1_macro": float((hits / chosen_or_true.clamp(min=1)).mean())}

    def in_words(self, label: tuple[float, ...], classes: tuple[str, ...]) -> str:
        """Returns the labels of a row as text, with commas between them; `none` if there are none."""
        return ",".join(name for name, there in zip(classes, label, strict=True) if there) or "none"

    def answer(self, logits: Tensor, classes: tuple[str, ...]) -> dict:
        """Returns labels, the same as one text, the least probability of them, and all probabilities.

        Without a label the probability is that of none of them being there, as if they were independent.
        """
        values = self.probabilities(logits.float())
        labels = [name for name, p in zip(classes, values.tolist(), strict=True) if p > 0.5]
        probability = float(values[values > 0.5].min() if labels else (1 - values).prod())
        return {"label": ",".join(labels) or "none", "probability": probability, "labels": labels,
                "probabilities": dict(zip(classes, values.tolist(), strict=True))}


class Regression(Problem):
    """A number: the model's one output as it is, mean squared error; labels are numbers (B,) float32."""

    name, problem_type, chosen = "regression", "regression", "spearman"
    shown = {"pearson": "Pearson", "spearman": "Spearman", "mse": "MSE"}
    baseline_name, baseline_scores = "mean", {"pearson": 0.0, "spearman": 0.0, "mse": "mean_mse"}
    least_classes = 1
    right_name = None

    def line(self, classes: tuple[str, ...]) -> str:
        return f"a number ({classes[0]})"

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Computes the mean squared error: (B, 1), (B,) -> ()."""
        self.check("--label-smoothing", label_smoothing > 0)
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))

    def total_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes `loss` summed over the rows."""
        return self.loss(logits, labels) * len(labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the output as it is."""
        return logits

    @torch.no_grad()
    def start(self, layer: nn.Linear, labels: list[float]) -> None:
        """Sets the bias to the labels' mean, if there is one: hundreds of steps would go by until it is learnt."""
        if layer.bias is not None:
            layer.bias.fill_(sum(labels) / len(labels))

    def nothing(self, classes: int) -> float:
        return 0.0

    def choose(self, logits: Tensor) -> Tensor:
        """Returns the numbers, (B, 1) -> (B,)."""
        return logits[:, 0]

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns 0: no number is exactly right."""
        return torch.zeros((), dtype=torch.int64, device=logits.device)

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Returns nothing: there are no classes to count."""
        return None

    def no_counts(self, classes: int) -> Tensor:
        """Returns `count` of no row."""
        return torch.zeros(0, 0, dtype=torch.int64)

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, int | float]:
        """Computes n, loss, MSE, Pearson's and Spearman's correlation, and the MSE of the labels' mean.

        The correlation with a constant is not defined, and counts 0.

        Args:
            logits: (N, 1), on the CPU.
            labels: (N,), on the CPU.
        """
        # Imported late: SciPy's statistics take half a second.
        from scipy import stats

        outputs, truth = logits[:, 0].double().numpy(), labels.double().numpy()
        mse, varies = float(metrics().mean_squared_error(truth, outputs)), len(truth) > 1
        found = {"n": len(labels), "loss": mse, "mse": mse}
        for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", stats.ConstantInputWarning)
                warnings.simplefilter("ignore", stats.NearConstantInputWarning)
                value = float(correlation(truth, outputs).statistic) if varies else 0.0
            # NaN equals nothing, not even itself.
            found[name] = value if value == value else 0.0
        return {**found, "mean_mse": float(truth.var())}

    def matrix(self, logits: Tensor, labels: Tensor) -> list:
        """Returns an empty list: there are no classes."""
        return []

    def per_class(self, matrix: list, classes: tuple[str, ...]) -> dict:
        """Returns an empty dictionary: there are no classes."""
        return {}

    def train_scores(self, sums: dict[str, float], matrix: list) -> dict[str, float]:
        """Returns loss and MSE of an epoch's training rows."""
        return {"loss": sums["loss"] / sums["rows"], "mse": sums["cross_entropy"] / sums["rows"]}

    def in_words(self, label: float, classes: tuple[str, ...]) -> str:
        """Returns a number as text."""
        return f"{label:.6g}"

    def answer(self, logits: Tensor, classes: tuple[str, ...]) -> dict:
        """Returns the number of logits (1,), and the same as text."""
        value = float(logits[0])
        return {"label": f"{value:.4f}", "score": value}


# The choices of --problem.
PROBLEMS = {"single-label": SingleLabel(), "multi-label": MultiLabel(), "regression": Regression()}
SINGLE_LABEL = PROBLEMS["single-label"]
# Scores of tables by their key -> heading.
SHOWN = {key: heading for problem in PROBLEMS.values() for key, heading in problem.shown.items()}


def problem_named(name: str) -> Problem:
    """Returns the problem of a name; every copy of a problem is the one object."""
    return PROBLEMS[name]


def recorded_problem(problem: Problem) -> dict[str, str]:
    """Returns the entry of config.json and summary.json: none for one of several classes, as before there were others."""
    return {} if problem is SINGLE_LABEL else {"problem": problem.name}


def problem_of_type(problem_type: str | None) -> Problem:
    """Returns the problem of a `transformers` config: one of several classes where it names none."""
    return next((one for one in PROBLEMS.values() if one.problem_type == problem_type), SINGLE_LABEL)


def problem_of(config: dict) -> Problem:
    """Returns the problem of a run, from its config.json: one of several classes where nothing is recorded.

    Raises:
        UserError: the file names another one.
    """
    name = config.get("problem", SINGLE_LABEL.name)
    if name not in PROBLEMS:
        raise UserError(f"config.json: problem is {str(name)[:60]!r}; expected one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name]
