"""Makes toy inputs for tests and benchmarks (a GPT-2 folder, CoLA folders), and calls run.py in this process."""
from __future__ import annotations

import json
import random
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = ("the", "cat", "dog", "mat", "saw", "fed", "a", "old", "red", "bird")
COLA_FILES = ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv")
SPLITS = {"in_domain": 12, "out_of_domain": 12, "all": 24}  # rows of write_cola's evaluation splits
SCORES = {"n", "loss", "accuracy", "mcc", "macro_f1", "majority_accuracy"}


def write_model(folder: Path, channels: int = 32, seed: int = 0) -> Path:
    """Writes a GPT-2 of two layers with random weights and a byte-level BPE tokenizer, as `save_pretrained` does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([" ".join(WORDS)] * 2, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                        unk_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    # Weights ten times a fresh model's: its last hidden state would hardly differ between sentences.
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=channels, n_head=4, n_positions=64,
                               initializer_range=0.2, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def other_weights(model: Path) -> None:
    """Changes the weights of a model and nothing else."""
    write_model(model, seed=1)


def other_config(model: Path) -> None:
    """Changes the configuration of a model, so that the same weights give other logits."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_norm_epsilon": 10 * config["layer_norm_epsilon"]}))


def other_tokenizer(model: Path) -> None:
    """Removes the last merge of a model's tokenizer: the same vocabulary, other tokens."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def toy_rows(rows: int, seed: int) -> list[tuple[str, int]]:
    """Returns sentences of two to nine words with labels: 1 if the last word is one of the first five of WORDS."""
    generator = random.Random(seed)
    sentences = []
    for _ in range(rows):
        length = generator.randint(2, 9)
        sentences.append([generator.choice(WORDS) for _ in range(length)])
    return [(" ".join(words), int(words[-1] in WORDS[:5])) for words in sentences]


def tsv(rows: list[tuple[str, int]]) -> str:
    """Returns rows in the format of CoLA."""
    return "".join(f"toy\t{label}\t{'' if label else '*'}\t{sentence}\n" for sentence, label in rows)


def write_cola(folder: Path, train: int = 40, dev: int = 12) -> Path:
    """Writes the three files of CoLA with toy sentences into a folder, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, rows) in enumerate(zip(COLA_FILES, (train, dev, dev), strict=True)):
        (folder / name).write_text(tsv(toy_rows(rows, seed)), encoding="utf-8")
    return folder


def main(*arguments) -> int:
    """Runs `python run.py ARGUMENTS` in this process and returns the exit status; restores signal handlers and warnings."""
    import run

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    show, argv = warnings.showwarning, sys.argv
    sys.argv = ["run.py", *map(str, arguments)]
    try:
        return run.main(sys.argv[1:])
    except SystemExit as end:
        return end.code or 0
    finally:
        warnings.showwarning, sys.argv = show, argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def import_for_children() -> None:
    """Imports every library that a run needs, here and once, for the children that this process forks.

    A run imports some of them at its first use; in each child that would take longer than the toy's training.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
    from transformers import conversion_mapping
    from transformers.models.gpt2 import modeling_gpt2  # noqa: F401

    import run  # noqa: F401
    from experiments import distil, finetune  # noqa: F401
    from metrics.classification import metrics
    from report import figures  # noqa: F401

    metrics()
    # A thousand regular expressions, compiled at the first model and kept.
    conversion_mapping.get_checkpoint_conversion_mapping("gpt2")


def lora(work: Path, out: Path, *more) -> int:
    """Fine-tunes `work`/model on `work`/cola into `out`, in three epochs of five steps, and returns the exit status.

    Without `--plots` none are made: they take four times as long as the training.
    """
    plots = () if "--plots" in more or "--no-plots" in more else ("--no-plots",)
    return main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", out, "--epochs", 3,
                "--batch-size", 8, "--lr", 0.01, "--dropout", 0.2, *plots, *more)


def lines_of(folder: Path) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reseal(folder: Path) -> None:
    """Writes SHA256SUMS anew, so that changed files of a run pass its check."""
    from record.files import read_sums, sha256, write_sums

    write_sums(folder, {name: sha256(folder / name) for name in read_sums(folder)})


def tree(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder with its bytes, hidden files too, except the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def until(condition, limit: float = 300) -> None:
    """Returns as soon as `condition()` is true; an assertion fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
