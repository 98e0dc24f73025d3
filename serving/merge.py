"""A fine-tuned classifier as a plain `transformers` checkpoint: no adapter, no code of this project.

    python run.py merge runs/LoRA-12345 --out merged
"""
from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from adapters import peft_layout
from machine.errors import UserError
from model import TextClassifier, lora_layers
from record.files import json_text, new_folder, write_file

# Of logits, relative where they are large; False: the run computed in bfloat16. Merged weights are rounded to float32: the
# built-in model's logits then move by 2e-5, others' by 1e-7; a wrong merge moves them by far more.
TOLERANCE = {True: 1e-4, False: 1e-2}


def for_others(tokenizer, max_length: int, truncate: str):
    """Copies a tokenizer for users of `transformers` alone: the copy pads on the right and cuts as the run did.

    A checkpoint of `transformers` pools a decoder at the last token that is no pad. GPT-2, which has no pad token, gets
    its end-of-text mark; a tokenizer that ends each text with that mark gets another of its own, and one that has no
    other is left without.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_length
    tokenizer.truncation_side = "left" if truncate == "head" else "right"
    tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        closing = tokenizer("a")["input_ids"][-1]
        free = [token for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
                if token is not None and tokenizer.convert_tokens_to_ids(token) != closing]
        if free:
            tokenizer.pad_token = free[0]
    return tokenizer


def tokenizer_files(tokenizer) -> dict[str, bytes]:
    """Returns a tokenizer's files by name, without the entries that say where it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    config = json.loads(files["tokenizer_config.json"])
    entries = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "gguf_file")}
    return {**files, "tokenizer_config.json": json_text(entries).encode()}


def label_maps(classes: list[str]) -> dict[str, dict]:
    """Returns class names as a `transformers` config has them."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: label for label, name in enumerate(classes)}}


def plain_state(classifier: TextClassifier) -> dict[str, Tensor]:
    """Returns the weights under the names of `transformers`, adapters merged, float32. Changes the classifier.

    Raises:
        UserError: the adapter or the head holds values that are not finite.
    """
    net = classifier.net.float()
    try:
        peft_layout.merge_adapter(net)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, layer in lora_layers(net).items():
        net.set_submodule(name, layer.base)
    state = net.state_dict()
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds values that are not finite; nothing was merged")
    return state


def write_checkpoint(classifier: TextClassifier, tokenizer, classes: list[str], sentences: list[str], out: Path, *,
                     max_length: int, truncate: str = "tail", exact: bool = True, say: Callable[[str], None] = print
                     ) -> None:
    """Writes config, safetensors and tokenizer into a new folder, loads them again and compares logits.

    Args:
        classifier: on the CPU, in evaluation mode, without a feature head. It is changed.
        sentences: on which the checkpoint, in padded batches, has to give the classifier's logits.
        out: must not exist yet, or be empty.
        max_length: tokens to which a text is cut, recorded in the tokenizer, as is the end that `truncate` cuts.
        exact: whether the classifier computes in float32.

    Raises:
        UserError: the folder is not new, the adapter is not finite, the tokenizer has nothing to pad
            with, or the checkpoint does not give the same logits.
    """
    tokenizer = for_others(tokenizer, max_length, truncate)
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no pad token, and no other special token that could stand in for it")
    batches = [tokenizer(sentences[start:start + 32], padding=True, truncation=True, return_tensors="pt")
               for start in range(0, len(sentences), 32)]
    expected = _logits(lambda **inputs: classifier(**inputs), batches)
    state = plain_state(classifier)
    with new_folder(out) as folder:
        config = config_of(classifier.net.config, classes, tokenizer)
        with torch.device("meta"):
            plain = AutoModelForSequenceClassification.from_config(config)
        plain.load_state_dict(state, assign=True)
        plain.save_pretrained(folder)
        for name, data in tokenizer_files(tokenizer).items():
            write_file(folder / name, data)
        for path in folder.iterdir():  # let whoever may read the config read the weights
            path.chmod((folder / "config.json").stat().st_mode)
        written = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        logits = _logits(lambda **inputs: written.eval()(**inputs).logits, batches)
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE[exact]:
            raise UserError(f"{out}: the merged checkpoint's logits differ from the run's by {difference:.1e}; expected at "
                            f"most {TOLERANCE[exact]:.0e}; nothing was written")
        say(f"  the checkpoint's logits equal the run's on {len(sentences):,} sentences (largest difference "
            f"{difference:.1e})")


def config_of(config: PreTrainedConfig, classes: list[str], tokenizer) -> PreTrainedConfig:
    """Returns the model's configuration with class names and the pad id."""
    config = copy.deepcopy(config)
    config.num_labels = len(classes)
    for name, value in label_maps(classes).items():
        setattr(config, name, value)
    config.pad_token_id = tokenizer.pad_token_id
    config.problem_type = "single_label_classification"
    config.dtype = torch.float32
    return config


@torch.inference_mode()
def _logits(model: Callable[..., Tensor], batches: list) -> Tensor:
    return torch.cat([model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]) for batch in batches])
