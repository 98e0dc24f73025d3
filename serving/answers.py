"""The parts of an exported example that depend on the problem and on pairs of texts, and the cost of int8."""
from __future__ import annotations

import numpy as np
import torch

from data.segments import arguments_of, joins_pairs, reads_pairs
from metrics.problems import SHOWN, Problem

# What example.py prints of the logits.
ANSWERS = {
    "single-label": '''probabilities = np.exp(logits - logits.max(-1, keepdims=True))
probabilities /= probabilities.sum(-1, keepdims=True)
for sentence, row in zip(sentences, probabilities):
    best = CHOICE
    print(f"{labels[best]}\\t{row[best]:.4f}\\t{sentence}")
''',
    "multi-label": '''for sentence, row in zip(sentences, logits):
    # A label is chosen where its probability, the sigmoid of its logit, is above a half.
    found = [label for label, logit in zip(labels, row) if logit > 0]
    print(f"{','.join(found) or 'none'}\\t{sentence}")
''',
    "regression": '''for sentence, row in zip(sentences, logits):
    print(f"{row[0]:.4f}\\t{sentence}")
'''}


def texts_in_example(tokenizer) -> tuple[str, str]:
    """Returns two expressions of example.py: its own texts, and the texts as the tokenizer takes them."""
    if not reads_pairs(tokenizer):
        return '["The cat sat on the mat.", "The cat sat mat the on."]', "sentences"
    # The two texts of a pair have a tab between them.
    texts = '["The cat sat on the mat.\\tA cat is sitting.", "The cat sat on the mat.\\tIt rains."]'
    if joins_pairs(tokenizer):
        return texts, '[(sentence + "\\t").split("\\t")[:2] for sentence in sentences]'
    return texts, f'[sentence.replace("\\t", {tokenizer.pair_separator!r}, 1) for sentence in sentences]'


def texts_of(tokenizer, sentences: list[str]) -> list:
    """Returns texts as the library `tokenizers` takes them: strings, or pairs of strings."""
    arguments = arguments_of(tokenizer, sentences)
    return arguments[0] if len(arguments) == 1 else list(zip(*arguments, strict=True))


def cost_of_int8(problem: Problem, before: np.ndarray, after: np.ndarray, labels: list) -> dict:
    """Returns the cost of int8: equal verdicts and, where labels are given, the scores of either.

    Args:
        before, after: logits (N, outputs) in float32 and int8.
    """
    one, other = torch.from_numpy(before), torch.from_numpy(after)
    cost = {"sentences": len(before)}
    # Numbers are never quite the same.
    if not problem.right_name:
        cost["largest_difference"] = float(np.abs(after - before).max())
    else:
        chosen = [problem.choose(logits).reshape(len(logits), -1) for logits in (one, other)]
        cost["same_verdicts"] = int((chosen[0] == chosen[1]).all(-1).sum())
    for name, logits in (("float32", one), ("int8", other)) if labels else ():
        scores = problem.scores(logits, torch.tensor(labels))
        cost[name] = {key: scores[key] for key in problem.shown}
    return cost


def in_words(cost: dict) -> str:
    """Describes int8.json in one line."""
    changes = [f"{SHOWN[key]} {score:.4f} -> {cost['int8'][key]:.4f} ({cost['int8'][key] - score:+.4f})"
               for key, score in cost.get("float32", {}).items()]
    if "same_verdicts" in cost:
        changes.append(f"{cost['same_verdicts']:,} of {cost['sentences']:,} verdicts are float32's")
    else:
        changes.append(f"numbers differ by up to {cost['largest_difference']:.2g}")
    sizes = f"{cost['megabytes']:.2f} MB (float32: {cost['float32_megabytes']:.2f} MB)"
    return f"{sizes}, {'; '.join(changes)}"
