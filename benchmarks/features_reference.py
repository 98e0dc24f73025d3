"""Scores scikit-learn's logistic regression on the numeric features alone: the figure that a run must beat.

    python benchmarks/features_reference.py --task buzzer --data DIR --feature-columns Gpr_confidence,Length_char

Rows, classes and evaluation split are those of `run.py LoRA` with the same options; features are standardised on the
training rows; a missing value is replaced by the mean and marked.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
from benchmarks import common
from machine.errors import UserError
from options.schema import TableOptions
from record.files import write_file


def reference(task: data_utils.Task) -> dict[str, dict[str, float]]:
    """Returns n, accuracy, MCC, macro-F1 and the majority's accuracy of logistic regression on each evaluation split."""
    # Missing values get the mean and a mark of their own, as in a run's feature head.
    model = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(np.array(task.train.features), task.train.labels)
    result = {}
    for name, split in task.dev.items():
        predicted = model.predict(np.array(split.features))
        result[name] = {"n": len(split), "accuracy": float(accuracy_score(split.labels, predicted)),
                        "mcc": float(matthews_corrcoef(split.labels, predicted)),
                        "macro_f1": float(f1_score(split.labels, predicted, average="macro")),
                        "majority_accuracy": max(np.bincount(split.labels)) / len(split)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="csv", choices=("csv", "buzzer"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--feature-columns", required=True, help="separated by commas")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--text-column", default="", help="separated by commas")
    parser.add_argument("--eval-split")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file")
    args = parser.parse_args()
    # The options of `run.py LoRA`, read by the same reader, so that both sides have the same rows.
    try:
        names = {name: tuple(filter(None, getattr(args, name).split(","))) for name in ("text_column", "feature_columns")}
        task = data_utils.load_task(args.task, args.data, TableOptions(
            label_column=args.label_column, eval_split=args.eval_split, **names))
    except UserError as error:
        print(f"features_reference.py: {error}", file=sys.stderr)
        return 2
    result = reference(task)
    if args.out:
        write_file(args.out, common.result({"splits": result}) + "\n")
    if args.json:
        print(common.result({"splits": result}))
    else:
        for name, row in result.items():
            print(f"{name}: n {row['n']}, accuracy {row['accuracy']:.4f} (majority {row['majority_accuracy']:.4f}), "
                  f"MCC {row['mcc']:.4f}, macro-F1 {row['macro_f1']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
