"""Fine-tunes a classifier: LoRA, every weight, the head alone, or numeric features.

    python run.py LoRA 12345

`run_finetune` takes typed options, leaves a folder under `runs/` and returns its summary; it parses no command line.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import speed
import train_utils
from adapters import peft_layout
from data.backbones import is_decoder, load_config, load_tokenizer, max_length_of, public_name
from data.digests import config_digest, tokenizer_digest
from data.glue import glue_scores
from data_utils import Batch, Task
from experiments import endings
from experiments.arguments import finetune_options
from experiments.inputs import (
    BASE,
    about,
    load_task,
    make_all_batches,
    read_as,
    resolve_precision,
    seed_everything,
    with_problem,
    with_recorded_join,
)
from experiments.model_card import write_repository
from experiments.trained_on import rows_in_training
from machine import processes, signals
from machine.errors import UserError
from machine.hardware import device
from metrics.problems import PROBLEMS, problem_of, recorded_problem
from model import TextClassifier, count_parameters, load_classifier
from options.schema import RunOptions
from record import tensors
from record.config_json import as_json, settings_of
from record.files import unchanged, write_file
from record.folder import Recorder, check_run_folder, finish, provenance, read_run, run_folder
from serving.merge import label_maps, logits_layer
from train_utils import Checkpointing, Data, Hooks, selection_split
from training import trackers
from training.losses import classification_loss
from training.summary import best_and_last, training_summary
from variants import injection
from variants.bitfit import is_bias

# The text that a fresh adapter must not change: a prompt, and the number of tokens generated after it.
SANITY_PROMPT, SANITY_TOKENS = "The", 12


def parameter_table(counts: dict) -> str:
    """Formats total, trainable and frozen parameters and the reduction, for the terminal."""
    rows = [("total", f"{counts['total']:,}"), ("trainable", f"{counts['trainable']:,}"),
            ("frozen", f"{counts['total'] - counts['trainable']:,}"), ("reduction", f"{counts['reduction_percent']:.2f} %")]
    return "\n".join(f"  {name:<10} {value:>16}" for name, value in rows)


# ---------------------------------------------------------------- a fresh adapter changes nothing

def greedy(lm, tokenizer, prompt: str, tokens: int) -> Tensor:
    """Generates greedily: returns token ids (1, T), prompt included."""
    ids, end = tokenizer(prompt, return_tensors="pt").input_ids.to(lm.device), lm.generation_config.eos_token_id
    with torch.inference_mode():
        # Instruct models have several end tokens; any of them may fill up a text, and one text has nothing to fill up.
        return lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                           pad_token_id=end[0] if isinstance(end, list) else end)


@torch.inference_mode()
def is_greedy(lm, ids: Tensor, prompt: int) -> bool:
    """Returns whether each token of (1, T) after the first `prompt` tokens is the likeliest, by one forward pass."""
    logits = lm(input_ids=ids, use_cache=False).logits  # (1, T, vocabulary)
    return torch.equal(logits[:, prompt - 1:-1].argmax(-1), ids[:, prompt:])


def check_fresh_adapter(lm, tokenizer, ids: Tensor) -> dict:
    """Compares greedy text of the base model, generated before injection, with the text after it.

    Args:
        lm: the language model; its backbone has a fresh adapter by now.
        ids: (1, T), the result of `greedy` before injection.

    Returns:
        summary.json's `sanity`.

    Raises:
        RuntimeError: the adapter changed the text.
    """
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    # One pass over the text costs less than generating it again. Rounding may part two tokens that are nearly equally
    # likely, so that a difference here is a doubt only, and the text is generated again.
    if not is_greedy(lm, ids, len(tokenizer(SANITY_PROMPT).input_ids)):
        after = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS)
        if not torch.equal(after, ids):
            raise RuntimeError(f"a fresh adapter changed the generated text: {text!r} became "
                               f"{tokenizer.decode(after[0], skip_special_tokens=True)!r}")
    return {"prompt": SANITY_PROMPT, "text": text, "equal_to_base": True}


# ---------------------------------------------------------------- the run, step by step

@dataclass
class FineTuning:
    """A fine-tuning that is ready to start: task, adapted model and batches."""

    task: Task
    tokenizer: object
    classifier: TextClassifier
    batches: Sequence[Batch]  # the training split's
    dev: dict[str, Sequence[Batch]]  # the development splits', by name
    max_length: int  # tokens
    counts: dict  # total and trainable parameters, and the reduction in percent
    sanity: dict | None  # the result of `check_fresh_adapter`; None without LoRA on a language model
    init_files: dict[str, str]  # SHA-256 of the files of --init by name
    base: dict  # digests of the base model, as config.json records them


def prepare(options: RunOptions, say: Callable[[str], None]) -> FineTuning:
    """Loads task and model, adapts the model, and makes the batches; writes nothing.

    Raises:
        UserError: bad input.
    """
    if options.init and options.method != "lora":
        raise UserError(f"--init: starts from an adapter, which --method {options.method} does not train")
    injection.check(options)
    seed_everything(int(options.sr), options.deterministic)
    tokenizer = load_tokenizer(options.model)
    task = load_task(options, tokenizer)
    problem = PROBLEMS[task.problem]
    tokenizer_sha256 = tokenizer_digest(tokenizer)
    classifier, lm = load_classifier(options.model, task.num_labels)
    read_as(options.table, problem, tokenizer, classifier)
    max_length = min(options.max_length or 10 ** 9, max_length_of(classifier.net))
    # Generated before injection, and compared with the text after it.
    sane = lm is not None and options.method == "lora"
    ids = greedy(lm, tokenizer, SANITY_PROMPT, SANITY_TOKENS) if sane else None
    # The digest of the base is computed on a core that tokenising leaves idle.
    weights = tensors.digest_meanwhile(classifier.net.base_model)
    # Seeded again, so that A does not depend on the random numbers used in loading.
    torch.manual_seed(int(options.sr))
    features = torch.from_numpy(np.asarray(task.train.features)) if task.train.features else None
    problem.start(logits_layer(classifier), task.train.labels)
    injection.configure(classifier, options.method, options.lora, features)
    counts = count_parameters(classifier)
    say(f"{options.model}, {options.method} on {task.name}: {len(task.train):,} training sentences, "
        f"{problem.line(task.class_names)}\n{parameter_table(counts)}")
    for name, rows in task.missing.items():
        if rows:
            say(f"  feature {name}: no value in {rows:,} of {len(task.train):,} training rows; the mean stands in, marked")
    # For its errors, before the folder exists.
    classification_loss(options.train, task.train.labels, task.num_labels, problem)
    batches, dev = make_all_batches(task, tokenizer, max_length, options.train, options.table.truncate, classifier.decoder)
    sanity = check_fresh_adapter(lm, tokenizer, ids) if sane else None
    if sanity:
        say(f"  sanity: greedy text after injection equals the base model's: {sanity['text']!r}")
    base = {"base_sha256": weights.result(), "base_config_sha256": config_digest(classifier.net.config),
            "tokenizer_sha256": tokenizer_sha256}
    init_files = start_from(options.init, classifier, task, base, say) if options.init else {}
    # The fast path last: injection and the adapter of --init find the library's own classes.
    way = speed.install(classifier)
    speed.set_precision(classifier.net.base_model, options.train.precision)
    say(f"  precision {options.train.precision}, {way}")
    classifier.to(device())
    return FineTuning(task, tokenizer, classifier, batches, dev, max_length, counts, sanity, init_files, base)


def start_from(init: Path, classifier: TextClassifier, task: Task, base: dict, say: Callable[[str], None]) -> dict[str, str]:
    """Replaces the fresh adapter by that of another run: training on an intermediate task (Phang et al. 2018).

    The head of that run is taken too if both tasks have the same classes.

    Args:
        base: digests of this run's base model.

    Returns:
        SHA-256 of the adapter's files by name.

    Raises:
        UserError: no finished LoRA run, another base, or an adapter of another rank, scaling, target or layer.
    """
    config, summary = read_run(init, "LoRA")
    if summary.get("method") != "lora":
        raise UserError(f"--init {init}: a run with --method {summary.get('method')}; expected one with an adapter")
    # An update of one matrix is noise on another: the base must be the same by content, not by name.
    for key, part in BASE.items():
        if config.get(key) not in (None, base[key]):
            raise UserError(f"--init {init}: adapter for another base: it was made for {config['options']['model']}, with "
                            f"{part} than the model here")
    head = config.get("classes") == list(task.classes) and problem_of(config).name == task.problem
    # The digests must be those of the files that were loaded.
    with unchanged([init / name for name in (peft_layout.CONFIG_FILE, peft_layout.WEIGHTS_FILE)]) as digests:
        peft_layout.start_from(classifier, init, head)
    say(f"  starts from the adapter of {init}, trained on {summary['task']}; "
        + ("its head too" if head else "the head is new: the classes are others"))
    return {path.name: digest for path, digest in digests.items()}


def run_finetune(options: RunOptions, say: Callable[[str], None] = print, stop: Callable[[], int | None] = lambda: None,
                 on_epoch: Callable[[list[dict], dict], None] = lambda history, counts: None) -> dict:
    """Fine-tunes a classifier and writes the run's folder.

    Args:
        stop: called after each step; a signal number ends the run, and --resume continues it.
        on_epoch: called after each epoch with the lines of metrics.jsonl so far and the parameters' counts; its exceptions
            end the run.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: bad input, before anything is written.
        train_utils.Diverged, signals.Interrupted: the last good checkpoint stays.
    """
    # Errors in options, data or model come before the folder exists: a failed command leaves nothing behind.
    check_run_folder(options, *([options.init] if options.init else []))
    trackers.check(options.track)
    speed.use_recorded_machine(options)
    options = with_recorded_join(resolve_precision(options))
    run = prepare(options, say)
    options, problem = with_problem(options, run.task, say), PROBLEMS[run.task.problem]
    settings = {**asdict(options.lora), **asdict(options.train), **settings_of(options), "max_length": run.max_length}
    config = {**provenance(as_json(settings), run.task.files), **speed.in_use(), **run.base, "init_files": run.init_files,
              "classes": list(run.task.classes), **about(run.task, run.classifier),
              "rows_in_training": rows_in_training(run.task, say), **label_maps(run.task.classes),
              **recorded_problem(problem)}
    with trackers.tracker(options, config["options"]) as follow, run_folder(options, config) as folder:
        follow.begin(folder)
        recorder = Recorder(folder, say, follow.log)

        def record(history: list[dict]) -> None:
            recorder(history)
            on_epoch(history, run.counts)

        # The floor of every comparison: the model as it is, scored like an epoch.
        if options.method == "none":
            progress, history = train_utils.Progress(), [untrained(run)]
        else:
            # Frozen blocks give each batch the same output in every epoch. Each process caches its own development batches.
            if options.keep and speed.has_frozen_blocks(run.classifier):
                # Results are attached to batches: from now on those of a large split stay in memory too.
                run.batches, run.dev = list(run.batches), {name: list(batches) for name, batches in run.dev.items()}
                splits = [run.batches, *map(processes.shard, run.dev.values())]
                if said := speed.cache_frozen(run.classifier, splits, folder, options.keep_memory):
                    say(said)
            progress = train_utils.fit(
                run.classifier, Data(run.batches, run.dev, selection_split(run.task.dev), problem=problem),
                objective_of(run, options), options.train, Checkpointing(folder, resume=options.resume),
                Hooks(record, stop, after_update=injection.after_update(run.classifier, options.method, options.lora)))
            history = progress.history
        # By now the model has its best epoch's weights.
        save_trained(run.classifier, options.method, folder, options.model)
        # As before there were variants: rsLoRA's flag stands in config.json alone.
        variant = {} if options.lora.variant in ("lora", "rslora") else {"variant": options.lora.variant}
        summary = {"mode": options.mode, "sr": options.sr, "model": options.model, "task": run.task.name,
                   "method": options.method, **variant, "classes": list(run.task.classes), "parameters": run.counts,
                   **recorded_problem(problem),
                   **best_and_last(progress.best_epoch, history, run.task.classes, problem),
                   "train": training_summary(progress, run.batches), "sanity": run.sanity}
        if glue := glue_scores(run.task.name, summary["validation"], summary["by_class"]):
            summary["glue"] = glue
        shared = options.method in peft_layout.METHODS
        finish(folder, summary, *(write_repository(folder, options, run.task, run.tokenizer, run.max_length, summary)
                                  if shared else ()))
    return summary


def objective_of(run: FineTuning, options: RunOptions) -> train_utils.Objective:
    """Returns the loss of a fine-tuning: the loss of the labels plus the variant's penalty."""
    labels, problem = run.task.train.labels, PROBLEMS[run.task.problem]
    objective = (classification_loss(options.train, labels, run.task.num_labels, problem)
                 or train_utils.label_loss(options.train.label_smoothing, problem))
    penalty = injection.penalty(run.classifier, options.method, options.lora)
    return objective if penalty is None else lambda logits, batch: objective(logits, batch) + penalty()


def untrained(run: FineTuning) -> dict:
    """Scores a classifier as it is: the line of epoch 0."""
    problem = PROBLEMS[run.task.problem]
    validation, matrices = train_utils.validate(run.classifier, run.dev, problem)
    return {"epoch": 0, "validation": validation, problem.counts: matrices}


def check(options: RunOptions) -> Task:
    """Checks task, model, targets, layers and rank without loading weights.

    Returns:
        The task.

    Raises:
        UserError: as `run_finetune` would.
    """
    config = load_config(options.model)
    # These calls are for their errors: no meaning of the variant, no classifier of this kind, no LoRA run.
    injection.check(options)
    trackers.check(options.track)
    is_decoder(config)
    if options.init:
        read_run(options.init, "LoRA")
    task = load_task(options, load_tokenizer(options.model))
    config.num_labels = task.num_labels
    # On the meta device weights have shapes and no memory.
    with torch.device("meta"):
        classifier = TextClassifier(AutoModelForSequenceClassification.from_config(config))
    injection.configure(classifier, options.method, options.lora)
    return task


def save_trained(classifier: TextClassifier, method: str, folder: Path, base: str) -> None:
    """Writes the trained weights: an adapter with its head in PEFT's layout, else the trained tensors by name.

    A feature head goes into a file of its own, because PEFT's layout has no place for it.
    """
    def write(name: str, tensors: dict[str, Tensor]) -> None:
        write_file(folder / name, save({n: t.cpu().contiguous() for n, t in tensors.items()}))

    if method in peft_layout.METHODS:
        peft_layout.save_adapter(classifier, folder, public_name(base))
    elif method != "features":
        state = classifier.net.state_dict(prefix="net.")
        # Tied weights (BART's embeddings) are written under one of their names.
        state = dict(sorted({(t.data_ptr(), t.shape): (name, t) for name, t in state.items()}.values()))
        heads = tuple(f"net.{head}." for head in classifier.head_names())
        write("trained.safetensors", {n: t for n, t in state.items() if method == "full" or n.startswith(heads)
                                      or method == "bitfit" and is_bias(n)})
    if classifier.feature_head is not None:
        write("features.safetensors", classifier.feature_head.state_dict())


# ---------------------------------------------------------------- the command line


def main(args) -> int:
    """Fine-tunes, prints the scores of the best and the last epoch, and returns the exit status."""
    options = finetune_options(args)

    def start() -> None:
        summary = run_finetune(options, stop=signals.received)
        best, problem = summary["validation"], problem_of(summary)
        # A classifier that always says the commonest class has an MCC of 0.
        print(endings.score_table({problem.baseline_name: problem.baseline(best), f"best epoch ({summary['best_epoch']})":
                                   best, f"last epoch ({summary['last_epoch']})": summary["last_validation"]}, problem))
        for split, scores in summary.get("glue", {}).items():
            print(f"  GLUE's scores, {split}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        train = summary["train"]
        print(f"{train['tokens_per_second']:.0f} tokens/s, {train['padding_percent']:.1f} % padding, "
              f"{train['peak_memory_bytes'] / 2 ** 20:.0f} MiB peak memory")

    return endings.train(args, options, start)
