"""The main path in a copy of the tree without fast/: the same predictions, logits within 1e-4, one line that says so."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import toy
import warm

ROOT = Path(__file__).parents[1]
CODE = ("run.py", "train_utils.py", "speed.py", "model.py", "layers.py", "sampling.py", "data_utils.py", "experiments",
        "serving", "distillation", "training", "adapters", "variants", "data", "record", "metrics", "options", "machine",
        "report")
# The whole main path in one process, as a user would start it mode by mode.
MAIN_PATH = """
import contextlib, io, json, sys
from pathlib import Path
# No other tree, whose fast/ or tests/fast/ would be found.
sys.path = [sys.argv[1], *(folder for folder in sys.path if not Path(folder, "fast").exists())]
import run
model, cola, out = sys.argv[2:5]

def call(*words):
    sys.argv = ["run.py", *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = run.main()
    assert not status, (words, said.getvalue())
    return said.getvalue()

data, short = ["--data", cola], ["--epochs", "2", "--batch-size", "4", "--no-plots"]
said = call("LoRA", "12345", "--model", model, *data, "--out", out + "/lora", "--lr", "1e-3", *short)
call("distil", "12345", "--plain", "--teacher", out + "/lora", *data, "--out", out + "/distil",
     "--embedding-size", "8", "--hidden-size", "8", *short)
for name in ("lora", "distil"):
    call("eval", out + "/" + name, "--data", cola + "/in_domain_dev.tsv", "--predictions", out + "/" + name + ".tsv")
texts = call("gen", "12345", "--model", model, "--prompt", "the cat", "--num-samples", "3", "--max-new-tokens", "8")

from experiments import evaluate
logits = {name: evaluate.score_rows(Path(out) / name, Path(cola) / "in_domain_dev.tsv").logits.tolist()
          for name in ("lora", "distil")}
print(json.dumps({"said": said, "texts": texts, "logits": logits,
                  "fast": sorted(name for name in sys.modules if name.partition(".")[0] == "fast")}))
"""


def main_path(tree: Path, model: Path, cola: Path, out: Path) -> dict:
    out.mkdir()
    words = [*warm.command(hub=True), "-c", MAIN_PATH, *map(str, (tree, model, cola, out))]
    done = subprocess.run(words, cwd=out, text=True, capture_output=True,
                          env={**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, dict, Path]:
    """The main path with fast/, and in a tree without it."""
    work = tmp_path_factory.mktemp("without-fast")
    model, cola, tree = toy.write_model(work / "model"), work / "cola", work / "tree"
    toy.write_cola(cola)
    tree.mkdir()
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    return main_path(ROOT, model, cola, work / "with"), main_path(tree, model, cola, work / "without"), work


def test_the_tree_without_fast_says_so_in_one_line(both):
    fast, plain, _ = both
    assert fast["fast"] and plain["fast"] == []
    lines = [line for line in plain["said"].splitlines() if "the fast path is not there" in line]
    assert len(lines) == 1 and "the fast path is not there" not in fast["said"]


@pytest.mark.parametrize("run", ["lora", "distil"])
def test_predictions_are_the_same_and_logits_within_1e_4(both, run):
    fast, plain, work = both
    for one, other in zip(fast["logits"][run], plain["logits"][run], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    rows = [[line.split("\t")[:3] for line in (work / tree / f"{run}.tsv").read_text().splitlines()]
            for tree in ("with", "without")]
    assert rows[0] == rows[1] and len(rows[0]) > 10
    assert len({tuple(logits) for logits in plain["logits"][run]}) > 5


def test_texts_are_the_same(both):
    fast, plain, _ = both
    assert fast["texts"] == plain["texts"] and len(set(plain["texts"].splitlines())) > 1
