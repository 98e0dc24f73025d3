"""Text generation from a causal language model, with or without a LoRA adapter.

    python run.py gen 12345 --model tiny --prompt "The"
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

import speed
from adapters import peft_layout
from data.backbones import load_causal_lm, load_tokenizer, max_length_of
from experiments.inputs import check_base
from machine.errors import UserError
from machine.hardware import device
from record.files import check_sums, read_json
from sampling import Sampling


def base_model(adapter: Path) -> str:
    """Returns the base model of a saved adapter, as `--model` names it, after checking the run's files.

    A run recorded what it was started with; `adapter_config.json` has the base's name for others.
    """
    check_sums(adapter)
    base = peft_layout.base_of(adapter)
    options = read_json(adapter / "config.json").get("options") if (adapter / "config.json").exists() else None
    return options["model"] if isinstance(options, dict) and isinstance(options.get("model"), str) else base


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 file, one a line; blank lines are skipped.

    Raises:
        UserError: missing, unreadable, not UTF-8, or without a prompt.
    """
    try:
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


def generate(model: str, prompts: list[str], *, max_new_tokens: int, sampling: Sampling, num_samples: int,
             adapter: Path | None, batch_size: int = 64, precision: str = "fp32") -> Iterator[str]:
    """Yields `num_samples` texts of each prompt, prompt included, in order.

    An empty prompt starts from the model's beginning-of-text token.

    Raises:
        UserError: the model or adapter cannot be loaded, or a prompt leaves no room in the context.
    """
    lm, tokenizer = load_causal_lm(model), load_tokenizer(model)
    lm.requires_grad_(False)
    if adapter is not None:
        check_sums(adapter)
        if (adapter / "config.json").exists():
            check_base(adapter, read_json(adapter / "config.json"), model, lm, tokenizer)
        peft_layout.load_adapter(lm, adapter, head=False)
    lm.to(device()).eval()
    speed.install(lm)
    speed.set_precision(lm, precision)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context = max_length_of(lm)
    encoded = [tokenizer(prompt, verbose=False).input_ids or [start] for prompt in prompts]
    for ids in encoded:  # before the first text, not after half of them
        if len(ids) + max_new_tokens > context:
            raise UserError(f"prompt of {len(ids)} tokens plus --max-new-tokens {max_new_tokens}: the model's context holds "
                            f"{context}")
    rows = [ids for ids in encoded for _ in range(num_samples)]
    with tqdm(total=len(rows) * max_new_tokens, unit="token", desc="generating", dynamic_ncols=True) as bar:
        texts = speed.sample_tokens(lm, rows, sampling, max_new_tokens=max_new_tokens, end=end_tokens(lm),
                                    batch_size=batch_size, progress=bar.update)
        for ids, new in zip(rows, texts, strict=True):
            yield tokenizer.decode([*ids, *new], skip_special_tokens=True)
