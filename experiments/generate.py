"""Generates text with a causal language model, with or without a LoRA adapter.

    python run.py gen 12345 --model tiny --prompt "The"
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

import speed
from adapters import peft_layout
from data.backbones import load_causal_lm, load_tokenizer, max_length_of
from experiments.inputs import check_base, choose
from machine.errors import UserError
from machine.hardware import device
from machine.progress import Bar
from machine.streams import note
from record.files import check_sums, read_json
from sampling import Sampling


def base_model(adapter: Path) -> str:
    """Returns the base model of a saved adapter, as `--model` names it, after checking the run's files.

    Raises:
        UserError: no adapter, or a damaged file.
    """
    check_sums(adapter)
    base = peft_layout.base_of(adapter)
    # A run's own record comes first: adapter_config.json has the base's public name for PEFT and others.
    options = read_json(adapter / "config.json").get("options") if (adapter / "config.json").exists() else None
    return options["model"] if isinstance(options, dict) and isinstance(options.get("model"), str) else base


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a UTF-8 file, one a line; blank lines are skipped.

    Raises:
        UserError: missing, unreadable, not UTF-8, or without a prompt.
    """
    try:
        # Not `splitlines`: a line separator of Unicode inside a prompt is part of it.
        prompts = [line for line in path.read_bytes().decode("utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not prompts:
        raise UserError(f"{path}: no prompt in it; expected one a line")
    return [prompt.rstrip("\r") for prompt in prompts]


def end_tokens(lm: PreTrainedModel) -> set[int]:
    """Returns the tokens that end a text; an instruct model may have several."""
    end = lm.generation_config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, list) else {end}


@dataclass(frozen=True)
class GenerateOptions:
    """Holds the model, its adapter, and the number and length of the texts."""

    model: str
    adapter: Path | None = None  # folder of a LoRA run
    max_new_tokens: int = 64
    num_samples: int = 1  # texts of each prompt
    sampling: Sampling = Sampling()
    batch_size: int = 64  # texts at a time
    precision: str = "fp32"


def generate(prompts: list[str], options: GenerateOptions) -> Iterator[str]:
    """Yields the samples of each prompt, prompt included, in order.

    An empty prompt starts from the model's beginning-of-text token.

    Raises:
        UserError: the model or adapter cannot be loaded, or a prompt leaves no room in the context.
    """
    lm, tokenizer = load_adapted_lm(options)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context, new_tokens = max_length_of(lm), options.max_new_tokens
    encoded = [tokenizer(prompt, verbose=False).input_ids or [start] for prompt in prompts]
    # Checked before the first text, not after half of them.
    for ids in encoded:
        if len(ids) + new_tokens > context:
            raise UserError(f"prompt of {len(ids)} tokens plus --max-new-tokens {new_tokens}: the model's context holds "
                            f"{context}")
    rows = [ids for ids in encoded for _ in range(options.num_samples)]
    with Bar(total=len(rows) * new_tokens, unit="token", desc="generating") as bar:
        texts = speed.sample_tokens(lm, rows, options.sampling, max_new_tokens=new_tokens, end=end_tokens(lm),
                                    batch_size=options.batch_size, progress=bar.update)
        for ids, new in zip(rows, texts, strict=True):
            yield tokenizer.decode([*ids, *new], skip_special_tokens=True)


def load_adapted_lm(options: GenerateOptions) -> tuple[PreTrainedModel, object]:
    """Loads the language model with its adapter, and its tokenizer.

    Raises:
        UserError: one of them cannot be loaded, or the adapter was made for another base.
    """
    lm, tokenizer = load_causal_lm(options.model), load_tokenizer(options.model)
    lm.requires_grad_(False)
    adapter = options.adapter
    if adapter is not None:
        check_sums(adapter)
        # PEFT's own adapters have no config.json: nothing is known of their base but its name.
        if (adapter / "config.json").exists():
            check_base(adapter, read_json(adapter / "config.json"), options.model, lm, tokenizer)
        peft_layout.load_adapter(lm, adapter, head=False)
    lm.to(device()).eval()
    # After the adapter: only the frozen weights are stored in another precision.
    speed.install(lm)
    speed.set_precision(lm, options.precision)
    return lm, tokenizer


# ---------------------------------------------------------------- the command line


def main(args) -> None:
    """Prints samples; the same SR gives the same text."""
    model = args.model or (base_model(args.adapter) if args.adapter else None)
    model, _, _ = choose(model, None, None, note, need_task=False)
    prompts = [*args.prompt, *(read_prompts(args.prompt_file) if args.prompt_file else ())]
    sampling = Sampling(args.greedy, args.temperature, args.top_k, args.top_p, int(args.sr))
    options = GenerateOptions(model, args.adapter, args.max_new_tokens, args.num_samples, sampling, args.batch_size,
                              args.precision)
    for sample in generate(prompts or [""], options):
        # To stdout, with the bar out of the way.
        Bar.write(sample)
