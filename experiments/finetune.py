"""Fine-tunes a classifier: LoRA, every weight, the head alone, or numeric features.

    python run.py LoRA 12345

`finetune` takes typed options, leaves a folder under `runs/` and returns its summary; nothing here parses a command line.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import train_utils
from data.backbones import is_decoder, load_config, load_tokenizer, max_length_of
from data_utils import Task
from experiments.inputs import load_task, make_all_batches, seed_everything
from lora import adapters, amx, frozen
from lora.linear import lora_layers
from model import FeatureHead, TextClassifier, count_parameters, inject_lora, load_classifier
from record import processes, tensors
from record.files import UserError, write_file
from record.folder import Recorder, finish, provenance, run_folder, use_recorded_threads
from record.machine import device
from record.options import LoRAOptions, RunOptions, as_json, settings_of
from train_utils import best_and_last, selection_split, training_summary

SANITY_PROMPT, SANITY_TOKENS = "The", 12


def parameter_table(counts: dict) -> str:
    """Total, trainable and frozen parameters and the reduction, for the terminal."""
    rows = [("total", f"{counts['total']:,}"), ("trainable", f"{counts['trainable']:,}"),
            ("frozen", f"{counts['total'] - counts['trainable']:,}"), ("reduction", f"{counts['reduction_percent']:.2f} %")]
    return "\n".join(f"  {name:<10} {value:>16}" for name, value in rows)


# ---------------------------------------------------------------- LoRA

def greedy(lm, tokenizer, prompt: str, tokens: int) -> Tensor:
    """Token ids (1, T) of a greedy continuation, prompt included."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(lm.device)
    with torch.inference_mode():
        return lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                           pad_token_id=lm.generation_config.eos_token_id)


@torch.inference_mode()
def is_greedy(lm, ids: Tensor, prompt: int) -> bool:
    """Whether each token of (1, T) after the first `prompt` ones is the model's likeliest: one pass, not one a token."""
    logits = lm(input_ids=ids, use_cache=False).logits  # (1, T, vocabulary)
    return torch.equal(logits[:, prompt - 1:-1].argmax(-1), ids[:, prompt:])


def adapt(classifier: TextClassifier, method: str, lora: LoRAOptions) -> None:
    """Marks what trains: LoRA and the head, everything, the head alone, or nothing."""
    classifier.full = method == "full"
    if method == "lora":
        inject_lora(classifier.net, lora)
    elif method == "head":
        classifier.net.base_model.requires_grad_(False)
    elif method == "features":
        classifier.net.requires_grad_(False)
        classifier.reads_text = False
    elif method == "none":
        classifier.requires_grad_(False)


def to_precision(classifier: TextClassifier, precision: str) -> None:
    """How the products with frozen weights are computed; what trains stays float32.

    bf16: frozen weights become bfloat16. On a CPU that is the adapted projections alone, and activations stay
    float32: its matrix products gain from bfloat16, its other operations lose.

    bf16x3: all numbers stay float32, and a product of the fused blocks with a frozen weight, the update's second factor
    beside it, is three of bfloat16 (amx.py).

    Raises:
        UserError: bf16x3, and this machine cannot do it.
    """
    if precision == "fp32" or classifier.full:
        return
    if precision == "bf16x3":
        if device().type != "cpu":
            raise UserError("--precision bf16x3: is for CPUs; on a GPU use bf16 or fp32")
        amx.load()
        for module in classifier.net.base_model.modules():
            if isinstance(module, nn.Linear | Conv1D) and not module.weight.requires_grad:
                module.tiles = True  # read by lora.product
        return
    adapted = [layer.base for layer in lora_layers(classifier.net).values()]
    for module in adapted if adapted and device().type == "cpu" else [classifier.net.base_model]:
        for p in module.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()


def run_finetune(options: RunOptions, say: Callable[[str], None] = print, stop: Callable[[], int | None] = lambda: None,
             on_epoch: Callable[[list[dict], dict], None] = lambda history, counts: None) -> dict:
    """Fine-tunes a classifier and writes the run's folder.

    Args:
        stop: asked after each step; a signal number ends the run, which can be resumed.
        on_epoch: called after each epoch with the lines of metrics.jsonl so far and the parameters' counts; what it
            raises ends the run.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, before anything is written.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint is kept.
    """
    use_recorded_threads(options)
    seed_everything(int(options.sr), options.deterministic)
    tokenizer = load_tokenizer(options.model)
    task = load_task(options, tokenizer)
    classifier, lm = load_classifier(options.model, task.num_labels)
    max_length = min(options.max_length or 10 ** 9, max_length_of(classifier.net.config))
    if lm is not None and options.method == "lora":
        ids = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS)
    base = tensors.digest_meanwhile(classifier.net.base_model)  # on a core that tokenising leaves idle
    torch.manual_seed(int(options.sr))  # again: A must not depend on what loading drew
    adapt(classifier, options.method, options.lora)
    if task.train.features:
        classifier.feature_head = FeatureHead(torch.tensor(task.train.features, dtype=torch.float64), task.num_labels)
        classifier.feature_head.requires_grad_(options.method != "none")
    counts = count_parameters(classifier)
    say(f"{options.model}, {options.method} on {task.name}: {len(task.train):,} training sentences, classes "
        f"{', '.join(task.classes[:10])}{', ...' if task.num_labels > 10 else ''}\n{parameter_table(counts)}")
    for name, rows in task.missing.items():
        if rows:
            say(f"  feature {name}: no value in {rows:,} of {len(task.train):,} training rows; the mean stands in, marked")
    batches, dev = make_all_batches(task, tokenizer, max_length, options.train, options.table.truncate, classifier.decoder)
    sanity = None
    if lm is not None and options.method == "lora":
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        # Generated again only where a pass over the text leaves a doubt, as rounding may between near equals.
        if not is_greedy(lm, ids, len(tokenizer(SANITY_PROMPT).input_ids)):
            after = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS)
            if not torch.equal(after, ids):
                raise RuntimeError(f"a fresh adapter changed the generated text: {text!r} became "
                                   f"{tokenizer.decode(after[0], skip_special_tokens=True)!r}")
        sanity = {"prompt": SANITY_PROMPT, "text": text, "equal_to_base": True}
        say(f"  sanity: greedy text after injection equals the base model's: {text!r}")
    to_precision(classifier, options.train.precision)
    classifier.to(device())
    settings = {**asdict(options.lora), **asdict(options.train), **settings_of(options), "max_length": max_length}
    record_config = {**provenance(as_json(settings), task.files), "base_sha256": base.result(),
                     "classes": list(task.classes)}
    with run_folder(options, record_config) as folder:
        record = Recorder(folder, say)
        if options.method == "none":
            progress = train_utils.Progress(best_epoch=0, history=[])
            validation, matrices = train_utils.validate(classifier, dev)
            result = best_and_last(0, [{"epoch": 0, "validation": validation, "confusion": matrices}], task.classes)
        else:
            prefix = frozen.FrozenPrefix(classifier)
            if options.keep and prefix.lowest > 0 and classifier.reads_text:
                start, used = time.perf_counter(), 0
                for split in (batches, *map(processes.own, dev.values())):
                    used = prefix.cache(split, folder, int(options.keep_memory * 2 ** 30), used)
                say(f"  kept what the {prefix.lowest} frozen blocks below the lowest trained one compute: "
                    f"{used / 2 ** 20:.0f} MiB in memory, {time.perf_counter() - start:.1f} s")
            progress = train_utils.fit(classifier, batches, dev, train_utils.cross_entropy(options.train.label_smoothing),
                                       options.train, folder=folder, resume=options.resume, select=selection_split(task.dev),
                                       on_epoch=lambda history: (record(history), on_epoch(history, counts)),
                                       stop=stop)
            result = best_and_last(progress.best_epoch, progress.history, task.classes)
        save_trained(classifier, options.method, folder, options.model)
        summary = {"mode": options.mode, "sr": options.sr, "model": options.model, "task": task.name,
                   "method": options.method, "classes": list(task.classes), "parameters": counts, **result,
                   "train": training_summary(progress, batches), "sanity": sanity}
        finish(folder, summary)
    return summary


def check(options: RunOptions) -> Task:
    """Raises what `finetune` would of a task, model, target, layer or rank, without loading weights; returns the task."""
    config = load_config(options.model)
    is_decoder(config)  # or says that there is no classifier of that kind
    task = load_task(options, load_tokenizer(options.model))
    config.num_labels = task.num_labels
    with torch.device("meta"):
        classifier = TextClassifier(AutoModelForSequenceClassification.from_config(config))
    adapt(classifier, options.method, options.lora)
    return task


def save_trained(classifier: TextClassifier, method: str, folder: Path, base: str) -> None:
    """Writes what was trained: an adapter with its head in PEFT's layout, else the trained tensors by name.

    A feature head, of which PEFT knows nothing, goes into a file of its own.
    """
    def write(name: str, tensors: dict[str, Tensor]) -> None:
        write_file(folder / name, save({n: t.cpu().contiguous() for n, t in tensors.items()}))

    if method == "lora":
        adapters.save_adapter(classifier, folder, base)
    elif method != "features":
        state = classifier.net.state_dict(prefix="net.")
        heads = tuple(f"net.{head}." for head in classifier.head_names())
        write("trained.safetensors", {n: t for n, t in state.items() if method == "full" or n.startswith(heads)})
    if classifier.feature_head is not None:
        write("features.safetensors", classifier.feature_head.state_dict())


