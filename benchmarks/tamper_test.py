"""Flips bits and cuts files of run folders, reads each folder through run.py, and counts the damage noticed.

    python benchmarks/tamper_test.py --flips 500

Each file of a finished LoRA run, of a finished distillation and of an unfinished one of each gets this number of flips at
random places, and a tenth of it in cuts. Noticed means exit status 2 and one line that names the file. TensorBoard's
events, and the files that an unfinished run writes anew from its checkpoint, are harmless: nothing reads them.
Prints a line for each file; exit status 0 if every flip and cut was noticed or harmless.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import toy  # noqa: E402 (needs the path above)

SMALL = ("--epochs", "2", "--batch-size", "8")
# An unfinished run writes them anew; nothing reads them before.
WRITTEN_ANEW = ("metrics.jsonl", "student.safetensors", "student_config.json")


def call(*arguments) -> tuple[int, str]:
    """Calls run.py; returns exit status and stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = toy.main(*arguments)
    return status, errors.getvalue()


def stopping_after(steps: int):
    """Returns a patch that makes SIGTERM seem to arrive after a number of steps."""
    calls = []
    return mock.patch("machine.signals.received", lambda: 15 if (calls.append(1) or len(calls) == steps) else None)


def folders(work: Path) -> dict[str, tuple[Path, list[tuple]]]:
    """Makes the run folders; returns each with the command lines that read it."""
    toy.write_model(work / "model")
    toy.write_cola(work / "cola")
    plots = ("--plots", str(work / "plots"))
    lora = ("LoRA", "12345", "--model", str(work / "model"), "--data", str(work / "cola"), *SMALL, *plots, "--out")
    distil = ("distil", "12345", "--plain", "--teacher", str(work / "runs/LoRA-12345"), "--embedding-size", "4",
              "--hidden-size", "4",
              *SMALL, *plots, "--out")
    with mock.patch("report.figures.plot_run", lambda *_: []):
        made = [call(*lora, str(work / "runs/LoRA-12345"))[0], call(*distil, str(work / "runs/distil-12345"))[0]]
        with stopping_after(7):
            made.append(call(*lora, str(work / "lora"))[0])
        with stopping_after(13):
            made.append(call(*distil, str(work / "distil"))[0])
    if made != [0, 0, 143, 143]:
        raise RuntimeError(f"the runs to tamper with ended with {made}")
    readers = [("eval", "RUN", "--data", str(work / "cola/in_domain_dev.tsv")), ("repeat", "RUN"),
               ("report", "12345", "--runs", str(work / "runs"), *plots)]
    more = [("gen", "12345", "--adapter", "RUN", "--max-new-tokens", "1"),
            ("distil", "12345", "--plain", "--teacher", "RUN", "--out", str(work / "none"), *plots)]
    # Each folder is read by every mode that takes one; an unfinished one can only be resumed.
    return {"LoRA": (work / "runs/LoRA-12345", readers + more),
            "distil": (work / "runs/distil-12345", readers),
            "LoRA, unfinished": (work / "lora", [(*lora, "RUN", "--resume")]),
            "distil, unfinished": (work / "distil", [(*distil, "RUN", "--resume")])}


def damaged(whole: bytes, draw: random.Random, cut: bool) -> bytes:
    """Returns the bytes with one bit flipped, or cut at a random place."""
    place = draw.randrange(len(whole))
    if cut:
        return whole[:place]
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1:]


def harmless(name: str, path: Path) -> bool:
    return path.parent.name == "tensorboard" or "unfinished" in name and path.name in WRITTEN_ANEW


def tamper(work: Path, flips: int, seed: int) -> list[dict]:
    """Returns a row for each file: the number of flips and cuts tried and noticed, and the failures in words."""
    # The places are random, but the same for the same seed: a miss can be looked at again.
    draw, rows = random.Random(seed), []
    for name, (folder, readers) in folders(work).items():
        for path in sorted(folder.rglob("*")):
            # A lock is empty, and no part of the run.
            if not path.is_file() or path.name == ".lock":
                continue
            whole, row = path.read_bytes(), {"run": name, "file": str(path.relative_to(folder)), "tried": 0, "noticed": 0,
                                             "harmless": harmless(name, path), "wrong": []}
            rows.append(row)
            if row["harmless"]:
                continue
            # Flips first, then cuts; every command that reads the folder has its turn.
            for number in range(flips + max(2, flips // 10)):
                reader = [str(folder) if word == "RUN" else word for word in readers[number % len(readers)]]
                path.write_bytes(damaged(whole, draw, cut=number >= flips))
                status, errors = call(*reader)
                lines = [line for line in errors.splitlines() if line]
                # Noticed only if the one line names the file: "damaged" alone would not help a user.
                row["tried"] += 1
                if status == 2 and len(lines) == 1 and lines[0].startswith("run.py: ") and path.name in lines[0]:
                    row["noticed"] += 1
                else:
                    row["wrong"].append(f"{reader[0]}: status {status}, {errors[-300:]!r}")
            path.write_bytes(whole)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=500, help="of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = tamper(Path(work), args.flips, args.seed)
    tried, noticed = sum(row["tried"] for row in rows), sum(row["noticed"] for row in rows)
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"tried": tried, "noticed": noticed, "seed": args.seed, "files": rows}))
    else:
        for row in rows:
            found = "harmless: not read" if row["harmless"] else f"{row['noticed']}/{row['tried']}"
            print(f"{row['run']:<20}{row['file'][:40]:<42}{found}" + "".join(f"\n  {text}" for text in row["wrong"][:3]))
        print(f"{noticed}/{tried} flips and cuts noticed")
    return 0 if noticed == tried else 1


if __name__ == "__main__":
    sys.exit(main())
