"""Damages every kind of file that is read, thousands of times, and counts what is neither a result nor one clear line.

    make fuzz                                  # or: python benchmarks/fuzz.py --cases 12000

The cases are hypothesis's, drawn from --seed; a failing one is shrunk and printed. Prints tried/failed by reader; exit
status 0 if none failed.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import readers  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402 (needs the path above)


def fuzz(name: str, path: Path, call, cases: int, number: int = 0) -> dict:
    """Tries `cases` damaged files on one reader; stops at the first that fails, and shrinks it."""
    whole, row = path.read_bytes(), {"reader": name, "tried": 0, "failed": 0, "error": None}

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(content=readers.damaged(whole, path))
    def one(content: bytes) -> None:
        row["tried"] += 1
        readers.attempt(path, content, call)
    try:
        one()
    except Exception as error:
        row["failed"] = 1
        notes = " ".join(getattr(error, "__notes__", []))
        row["error"] = f"{type(error).__name__}: {str(error)[:300]} {notes[:600]}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = readers.readers(readers.make(Path(folder)))
        rows = [fuzz(name, path, call, -(-args.cases // len(known)), args.seed) for name, (path, call) in known.items()]
    tried, failed = (sum(row[key] for row in rows) for key in ("tried", "failed"))
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"tried": tried, "failed": failed, "seed": args.seed, "readers": rows}))
    else:
        for row in rows:
            print(f"{row['reader']:<28}{row['tried']:>7} tried {row['failed']:>3} failed" +
                  (f"\n  {row['error']}" if row["error"] else ""))
        print(f"{'all':<28}{tried:>7} tried {failed:>3} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
