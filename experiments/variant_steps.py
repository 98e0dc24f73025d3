"""Declares the steps of two studies that the paper runs only when asked: `paper --only variants,losses`.

Every variant of LoRA, and the class weights, against plain LoRA: the same epochs, seeds, and number of learning rates to
choose from. Every KD loss against KL: the same teacher, epochs and seeds, and the rate of KL, which was not chosen either.
"""
from __future__ import annotations

from pathlib import Path

from experiments.step import RUN, Step, to

# Four rates for each entry, wide enough for a handful of vectors (1e-2) and for all of W (1e-4).
RATES = "1e-4,5e-4,2e-3,1e-2"
SEEDS = {"polarity": "5", "cola": "3"}
VARIANTS = {name: f"variant={name}" for name in ("rslora", "dora", "pissa", "loraplus", "lora-fa", "adalora")} | {
    "vera": "variant=vera,rank=64", "ia3": "method=ia3", "bitfit": "method=bitfit"}
WEIGHTS = {"balanced": "class_weights=balanced", "focal": "loss=focal",
           "focal-balanced": "loss=focal,class_weights=balanced"}
# name -> options of `distil`; KL is the paper's student itself.
LOSSES = {**{name: ["--kd-loss", name] for name in ("mse", "hard", "reverse-kl", "js", "dkd", "dist", "rkd")},
          "kl-annealed": ["--temperature", "4", "--temperature-schedule", "anneal"]}


def variant_steps(sr: str, data: Path, out: Path) -> list[Step]:
    """Returns the comparisons of the variants: on sentence polarity with MiniLM, and on CoLA with SmolLM2."""
    tasks = {"polarity": ["--model", "minilm", "--task", "rotten_tomatoes", "--data", f"{data}/rotten_tomatoes", "--head-lr",
                          "5e-3"],
             "cola": ["--model", "smollm2", "--data", f"{data}/cola"]}
    minutes = {"polarity": 200, "cola": 900}
    found = []
    for task, words in tasks.items():
        ending = "" if task == "polarity" else f"-{task}"
        # SmolLM2 has no biases to train.
        sets = {name: text for name, text in VARIANTS.items() if name != "bitfit" or task == "polarity"}
        found += [_compare(f"variants{ending}", minutes[task], [sr, *words, "--lr-grid", RATES], sets, SEEDS[task], out),
                  # Plain LoRA at the default rate, without a choice.
                  _compare(f"variants-default{ending}", minutes[task] / 20, [sr, *words], {}, SEEDS[task], out)]
    return [*found, _compare("class-weights", 200, [sr, *tasks["cola"]], WEIGHTS, SEEDS["cola"], out)]


def _compare(name: str, minutes: float, words: list[str], sets: dict[str, str], seeds: str, out: Path) -> Step:
    """Returns a comparison of plain LoRA and the entries of `sets`, against plain LoRA."""
    added = [word for entry, text in sets.items() for word in ("--set", f"{entry}:{text}")]
    return Step(name, minutes, [RUN, "compare", *words, "--methods", "lora", *added, "--against", "lora", "--seeds", seeds,
                                "--epochs", "3", *to(out, name)], f"{name}/compare.json", part_of="variants")


def loss_steps(sr: str, seeds: str, teacher: str, text: list[str], out: Path) -> list[Step]:
    """Returns a distillation for each loss, of the student in stages and of the plain one.

    Args:
        teacher: folder of the paper's teacher.
        text: options that name the plain text.
    """
    found = []
    for kind, minutes, words in (("", 60, [*text, "--cache", str(out)]), ("plain-", 8, ["--plain"])):
        for loss, flags in LOSSES.items():
            name = f"losses-{kind}{loss}"
            found.append(Step(name, minutes, [RUN, "distil", sr, "--seeds", seeds, "--teacher", teacher, *words, *flags,
                                              "--no-control", *to(out, name)],
                              f"{name}/distil-{sr}-seeds/seeds.json", ("teacher",), ("distil",), f"{name}/distil-*",
                              part_of="losses"))
    return found
