"""Trains SmolLM2-135M on a few hundred CoLA sentences: the loss falls, and the saved adapter's logits are PEFT's.

    python benchmarks/real_check.py --data DIR_WITH_THE_COLA_TSV_FILES

Trains through the command line as a user would, then loads the run's adapter with `peft` on
`transformers`' own classifier and compares. Exit status 1 if either claim fails.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from peft import PeftModel

import data_utils
import run
from benchmarks.peft_reference import load_smollm2
from experiments import evaluate
from machine.hardware import device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=320, help="rows of each split")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        status = run.main(["LoRA", "12345", "--model", "smollm2", "--data", args.data, "--limit", str(args.limit),
                           "--epochs", "2", "--lr", "1e-3", "--out", str(out), "--plots", str(Path(folder) / "plots")])
        if status:
            return status
        losses = [json.loads(line)["train"]["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        ours, tokenizer, options = evaluate.load_finetuned(out)
        # An independent path: transformers' classifier under PEFT's adapter, nothing of this project's model.
        reference, _ = load_smollm2()
        reference = PeftModel.from_pretrained(reference, out).eval()
        split = data_utils.load_task("cola", args.data).limit(args.limit).dev["in_domain"]
        batches = data_utils.make_batches(split, tokenizer, options["max_length"], 32, 0)[:4]
        with torch.inference_mode():
            difference = max(float((ours(*batch.to(device()).inputs()).cpu() - reference(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits).abs().max()) for batch in batches)
            size = float(ours(*batches[0].to(device()).inputs()).abs().max())
    result = {"loss_epoch_1": losses[0], "loss_epoch_2": losses[1], "logits_difference": difference, "largest_logit": size}
    print(json.dumps(result) if args.json else result)
    # Relative to the largest logit, above 1: rounding grows with the size.
    if losses[1] >= losses[0] or difference > 1e-4 * max(1.0, size):
        print("FAILED: the loss must fall and the logits equal PEFT's", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
