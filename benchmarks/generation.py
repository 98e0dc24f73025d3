"""Measures text generation in new tokens a second at batch 64: this project against `transformers.generate`.

    python benchmarks/generation.py --threads 1            GPT-2 124M and SmolLM2-135M, float32
    python benchmarks/generation.py --precision bf16       bfloat16 against bfloat16

Both sides take the likeliest token after the same prompts, the first words of CoLA's sentences, and no text ends early.
`transformers` has its own model, cached keys and values, and GPT-2's activation in its fused form. In float32 both must
give the same texts. In bfloat16 the sides round at different places: this project's first tokens are held to float32's.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForCausalLM

from benchmarks import common  # first: it sets the environment that libraries read when imported
from benchmarks.common import Report, device, synchronize
from data.backbones import load_causal_lm, load_config
from fast.generation import sample_together
from fast.installation import install
from fast.matmul import set_precision
from machine import hardware
from sampling import Sampling

BATCH_SIZE, PROMPT_TOKENS = 64, 6
MODELS = ("gpt2", "smollm2")
TARGET = 2.0


class Ours:
    """`fast.generation.sample_together`."""

    def __init__(self, base: str, precision: str):
        self.lm = load_causal_lm(base).to(device())
        install(self.lm.requires_grad_(False))
        set_precision(self.lm, precision)

    def texts(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return list(sample_together(self.lm, prompts, Sampling(greedy=True), max_new_tokens=new, batch_size=len(prompts)))


class Library:
    """Generates by `transformers.generate`; shorter prompts are padded on the left."""

    def __init__(self, base: str, precision: str):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.lm = AutoModelForCausalLM.from_pretrained(base, config=load_config(base), dtype=dtype).to(device()).eval()

    @torch.inference_mode()
    def texts(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        # On the left, so that the new tokens of all rows begin in the same column.
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device())
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device())
        out = self.lm.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                               use_cache=True, eos_token_id=None, pad_token_id=0)
        return out[:, width:].tolist()


def measure(report: Report, model: str, args: argparse.Namespace, work: Path) -> None:
    """Checks and measures both sides with one model."""
    base = common.base_of(model, work)
    tokenizer = common.tokenizer_of(base)
    # Prompts of one to six tokens, so that rows of different lengths share a batch.
    step = len(args.task.train) // BATCH_SIZE
    prompts = [tokenizer(sentence).input_ids[:1 + i % PROMPT_TOKENS]
               for i, sentence in enumerate(args.task.train.sentences[::step][:BATCH_SIZE])]
    new, rounds = (8, 2) if args.quick else (32, 5)
    sides = {"ours": Ours(base, args.precision), "transformers": Library(base, args.precision)}
    if args.precision == "fp32":
        ours, theirs = (side.texts(prompts, new) for side in sides.values())
        different = 0
        for one, other in zip(ours, theirs, strict=True):
            different += sum(a != b for a, b in zip(one, other, strict=True))
        report.check(f"{model}: tokens that differ", different, 0)
    else:
        # Later tokens follow from the first that differs, and say nothing of rounding.
        exact = Ours(base, "fp32").texts(prompts, 1)
        report.check(f"{model}: share of first tokens that differ from float32's", sum(
            a != b for a, b in zip(sides["ours"].texts(prompts, 1), exact, strict=True)) / len(exact), 0.25)
        sides["transformers"].texts(prompts, 2)

    def seconds(side) -> float:
        synchronize()
        start = time.perf_counter()
        side.texts(prompts, new)
        synchronize()
        return time.perf_counter() - start

    # The same prompts and number of tokens on both sides: the ratio of times is that of rates.
    times = common.alternate({name: lambda number, side=side: seconds(side) for name, side in sides.items()}, rounds)
    for name, values in times.items():
        report.measure(f"{model}: {name}", [len(prompts) * new / value for value in values], "tokens/s")
    report.target(f"{model}: {args.precision}, ours / transformers.generate",
                  common.paired_ratios(times["transformers"], times["ours"]), TARGET)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    # Of both sides, which share this process.
    hardware.keep_freed_memory()
    report = Report()
    for model in MODELS:
        if args.model in (model, None):
            measure(report, model, args, work)
    return report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, help="both if not given")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the weights, on both sides (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(common.main(__doc__, benchmark, options))
