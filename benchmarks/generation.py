"""Text generation in new tokens a second at batch 64: this project against `transformers.generate`.

    python benchmarks/generation.py --threads 1            GPT-2 124M and SmolLM2-135M, float32
    python benchmarks/generation.py --precision bf16       bfloat16 against bfloat16

Both sides draw the likeliest token from the same prompts, the first words of CoLA's sentences, and none of them ends early.
`transformers` has its own model, cached keys and values, and GPT-2's activation in its fused form. In float32 both must
draw the same texts; in bfloat16, where each rounds elsewhere, this project's first tokens are held to those of float32.
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
    """`transformers.generate`; shorter prompts are padded on the left."""

    def __init__(self, base: str, precision: str):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.lm = AutoModelForCausalLM.from_pretrained(base, config=load_config(base), dtype=dtype).to(device()).eval()

    @torch.inference_mode()
    def texts(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device())
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device())
        out = self.lm.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                               use_cache=True, eos_token_id=None, pad_token_id=0)
        return out[:, width:].tolist()


def measure(report: Report, model: str, args: argparse.Namespace, work: Path) -> None:
    base = common.base_of(model, work)
    tokenizer = common.tokenizer_of(base)
    step = len(args.task.train) // BATCH_SIZE
    prompts = [tokenizer(sentence).input_ids[:1 + i % PROMPT_TOKENS]
               for i, sentence in enumerate(args.task.train.sentences[::step][:BATCH_SIZE])]
    new, rounds = (8, 2) if args.quick else (32, 5)
    sides = {"ours": Ours(base, args.precision), "transformers": Library(base, args.precision)}
    if args.precision == "fp32":
        ours, theirs = (side.texts(prompts, new) for side in sides.values())
        report.check(f"{model}: tokens that differ", sum(a != b for row in zip(ours, theirs, strict=True)
                                                         for a, b in zip(*row, strict=True)), 0)
    else:
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

    times = common.alternate({name: lambda number, side=side: seconds(side) for name, side in sides.items()}, rounds)
    for name, values in times.items():
        report.measure(f"{model}: {name}", [len(prompts) * new / value for value in values], "tokens/s")
    report.target(f"{model}: {args.precision}, ours / transformers.generate",
                  common.paired_ratios(times["transformers"], times["ours"]), TARGET)


def benchmark(args: argparse.Namespace, work: Path) -> Report:
    hardware.keep_freed_memory()  # both sides: they share this process
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
