"""A fine-tuned classifier as a plain `transformers` checkpoint: no adapter, no code of this project.

    python run.py merge runs/LoRA-12345 --out merged
"""
from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

import data_utils
from adapters import peft_layout
from data.segments import add_token_types, arguments_of, reads_pairs
from machine.errors import UserError
from model import TextClassifier, lora_layers
from record.calibration import LIKELIEST
from record.files import json_text, new_folder, write_file
from serving.texts import Reading

# Of logits, relative where they are large; False: the run computed in bfloat16. Merged weights are rounded to float32: the
# built-in model's logits then move by 2e-5, others' by 1e-7; a wrong merge moves them by far more.
TOLERANCE = {True: 1e-4, False: 1e-2}
BATCH = 32  # sentences that the check computes at a time


def for_others(tokenizer, max_length: int, truncate: str):
    """Copies a tokenizer for users of `transformers` alone: it pads on the right, and cuts with `truncation=True`.

    It cuts a head or a tail as the run did. No tokenizer of `transformers` cuts the middle: for such a run it cuts the tail,
    and `kept_ends` tells how to cut by hand.

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


def kept_ends(tokenizer, max_length: int) -> tuple[int, int]:
    """Returns the numbers of tokens that stay at either end of a text whose middle is cut, special tokens included."""
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    opening, closing = special.index(0), special[::-1].index(0)
    # As in `data_utils.encode`: half of the text's own room, rounded down, is at the front.
    front = opening + (max_length - opening - closing) // 2
    return front, max_length - front


def tokenizer_files(tokenizer) -> dict[str, bytes]:
    """Returns a tokenizer's files by name, without the entries about the place it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    config = json.loads(files["tokenizer_config.json"])
    entries = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "gguf_file")}
    return {**files, "tokenizer_config.json": json_text(entries).encode()}


def label_maps(classes: list[str]) -> dict[str, dict]:
    """Returns class names in the form of a `transformers` config."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: label for label, name in enumerate(classes)}}


@torch.no_grad()
def scale_logits(head: nn.Linear, temperature: float) -> None:
    """Divides the weights of a layer by the temperature, so that the softmax of its outputs is calibrated."""
    for parameter in head.parameters():
        parameter /= temperature


def logits_layer(classifier: TextClassifier) -> nn.Linear:
    """Returns the last linear layer of the head, which computes the logits."""
    return [layer for name in classifier.head_names() for layer in classifier.net.get_submodule(name).modules()
            if isinstance(layer, nn.Linear)][-1]


def card(reading: Reading) -> str:
    """Returns the model card of a calibrated checkpoint: its probabilities, and the class that they choose."""
    rule, lines = reading.calibration, [
        "# Calibrated text classifier", "",
        f"The logits are divided by the temperature {reading.calibration.temperature:.6g}, in the weights of the head: "
        "softmax gives calibrated probabilities."]
    if rule.threshold is not None:
        one, other = reading.shown[rule.positive], reading.shown[1 - rule.positive]
        lines += ["", f"Choose `{one}` where its probability is at least {rule.threshold:.6g}, else `{other}`; `pipeline` "
                  "shows the likeliest class, as if the threshold were 0.5."]
    return "\n".join(lines) + "\n"


def plain_state(classifier: TextClassifier) -> dict[str, Tensor]:
    """Merges the adapters, and returns the weights under the names of `transformers`, float32. Changes the classifier.

    Raises:
        UserError: the adapter or the head holds values that are not finite.
    """
    net = classifier.net.float()
    try:
        peft_layout.merge_adapter(net)
    except ValueError as error:
        raise UserError(str(error)) from None
    # The merged layers still hold A and B. Their plain layers have the names that `transformers` expects.
    for name, layer in lora_layers(net).items():
        net.set_submodule(name, layer.base)
    state = net.state_dict()
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds values that are not finite; nothing was merged")
    return state


def write_checkpoint(classifier: TextClassifier, tokenizer, reading: Reading, sentences: list[str], out: Path, *,
                     exact: bool = True, say: Callable[[str], None] = print) -> None:
    """Writes config, safetensors and tokenizer into a new folder, loads them again and compares tokens and logits.

    The run's own token ids go through both models, so that the check sees a text as the run read it. `say` is told about
    texts that the folder's users read in another way.

    Args:
        classifier: on the CPU, in evaluation mode, without a feature head. It is changed.
        reading: the classes, the way the run cut long texts, and its calibration.
        sentences: the checkpoint has to give the classifier's logits on them, in padded batches.
        out: must not exist yet, or be empty.
        exact: whether the classifier computes in float32.

    Raises:
        UserError: the folder is not new, the adapter is not finite, the tokenizer has nothing to pad
            with, or the checkpoint does not give the same tokens or logits.
    """
    plain_tokenizer = for_others(tokenizer, reading.max_length, reading.truncate)
    scale_logits(logits_layer(classifier), reading.calibration.temperature)
    pad = plain_tokenizer.pad_token_id
    if pad is None:
        raise UserError("the tokenizer has no pad token, and no other special token that could stand in for it")
    ids = data_utils.encode(tokenizer, sentences, reading.max_length, reading.truncate)
    # The last row asks about a text that ends with the pad token: transformers may take that one for padding.
    shortest = min(ids, key=len)
    rows = [*ids, [*(shortest if len(shortest) < reading.max_length else shortest[:-1]), pad]]
    expected = _logits(lambda **inputs: classifier(**inputs), rows, pad)
    state = plain_state(classifier)
    with new_folder(out) as folder:
        config = config_of(classifier.net.config, reading, plain_tokenizer)
        with torch.device("meta"):
            plain = AutoModelForSequenceClassification.from_config(config)
        plain.load_state_dict(state, assign=True)
        plain.save_pretrained(folder)
        # transformers saves the side that is cut only after a call that cuts.
        plain_tokenizer("a", truncation=True)
        for name, data in tokenizer_files(plain_tokenizer).items():
            write_file(folder / name, data)
        if reading.calibration != LIKELIEST:
            write_file(folder / "README.md", card(reading))
        # Whoever may read the config may read the weights.
        for path in folder.iterdir():
            path.chmod((folder / "config.json").stat().st_mode)
        written = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        # The hook that gives a run's own model the token types of pairs is no part of a checkpoint.
        if reads_pairs(tokenizer):
            add_token_types(written, tokenizer)
        logits = _logits(lambda **inputs: written.eval()(**inputs).logits, rows, pad)
        differences = (logits - expected).abs().amax(-1) / expected.abs().max().clamp(min=1)  # (N + 1,)
        # A tokenizer that ends every text with its pad token leaves no row to compare without it: then all have to agree.
        compared = [row for row, tokens in enumerate(ids) if tokens[-1] != pad] or list(range(len(ids)))
        difference = float(differences[compared].max())
        if not difference <= TOLERANCE[exact]:
            raise UserError(f"{out}: the merged checkpoint's logits differ from the run's by {difference:.1e}; expected at "
                            f"most {TOLERANCE[exact]:.0e}; nothing was written")
        say(f"  the checkpoint's logits equal the run's on {len(compared):,} sentences (largest difference "
            f"{difference:.1e})")
        if not float(differences[-1]) <= TOLERANCE[exact]:
            say(f"  a text that ends with {plain_tokenizer.pad_token}, the pad token, is another one to transformers, which "
                f"takes that end for padding; {len(ids) - len(compared):,} of the {len(ids):,} sentences do")
        _check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(folder), reading, sentences, say)


def _check_tokenizer(tokenizer, written, reading: Reading, sentences: list[str], say: Callable[[str], None]) -> None:
    """Compares the tokens of the run's tokenizer with those of the written one, long texts included.

    Raises:
        UserError: they differ in a text that need not be cut.
    """
    # The development sentences may all be short. Together they are a text that has to be cut.
    long = " ".join(sentences * (1 + reading.max_length // len(sentences)))
    texts = [*sentences, long]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = data_utils.encode(tokenizer, texts, reading.max_length, reading.truncate)
    arguments = arguments_of(tokenizer, texts)
    lengths = [len(ids) for ids in tokenizer(*arguments, verbose=False)["input_ids"]]
    found = written(*arguments, truncation=True)["input_ids"]
    other = [i for i, ids in enumerate(found) if ids != expected[i]]
    for i in other:
        if lengths[i] <= reading.max_length:
            raise UserError(f"the written tokenizer makes other tokens of {texts[i][:60]!r} than the run's; nothing was "
                            "written")
    if other:
        count = sum(length > reading.max_length for length in lengths[:-1])
        end = {"right": "tail", "left": "head"}[written.truncation_side]
        say(f"  texts of more than {reading.max_length} tokens: the run cut the {reading.truncate}, the checkpoint's "
            f"tokenizer cuts the {end}, so that their classes may differ; {count:,} of {len(sentences):,} sentences are so "
            "long")
        if reading.truncate == "middle":
            front, back = kept_ends(tokenizer, reading.max_length)
            say(f"  ids[:{front}] + ids[-{back}:] of a text's token ids cuts as the run did")


def config_of(config: PreTrainedConfig, reading: Reading, tokenizer) -> PreTrainedConfig:
    """Returns the model's configuration with class names, problem type and the pad id."""
    config = copy.deepcopy(config)
    config.num_labels = len(reading.classes)
    for name, value in label_maps(list(reading.shown)).items():
        setattr(config, name, value)
    config.pad_token_id = tokenizer.pad_token_id
    config.problem_type = reading.problem.problem_type
    config.dtype = torch.float32
    return config


@torch.inference_mode()
def _logits(model: Callable[..., Tensor], rows: list[list[int]], pad: int) -> Tensor:
    """Computes logits (N, classes) of token ids, in padded batches."""
    logits = []
    for start in range(0, len(rows), BATCH):
        batch = [torch.tensor(row) for row in rows[start:start + BATCH]]
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)  # (B, T)
        logits.append(model(input_ids=pad_sequence(batch, batch_first=True, padding_value=pad), attention_mask=mask))
    return torch.cat(logits)
