"""Damages every kind of file that is read, thousands of times, and counts what is neither a result nor one clear line.

    make fuzz                                  # or: python benchmarks/fuzz.py --cases 12000
    python benchmarks/fuzz.py --cases 10000 --only table

Two generators make tables instead of damaging them: rows with wrong numbers of cells, stray quotes, marks and line ends, and
cells that are no text, label or number. Training and prediction must read the same cells or refuse the same row, and no row
may be lost without a word. Another one makes adapters in PEFT's layout with other settings and tensors. Each computes as in
PEFT, or is refused.

The cases are hypothesis's, generated from --seed; a failing one is shrunk and printed. Prints tried/failed by reader; exit
status 0 if none failed.
"""
from __future__ import annotations

import argparse
import codecs
import copy
import functools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

import readers  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402 (needs the path above)
from hypothesis import strategies as st  # noqa: E402

# ---------------------------------------------------------------- tables

CELLS = st.text('ab",;\t\\\'\ufeff |', max_size=5) | st.sampled_from(
    ["1", "01", "0.5", "-1", "nan", "", " ", "caf\u00e9", "\u2028", "7" * 5000, "$5$", "1e999", "sep=;", "true"])
ODD = st.sampled_from(["\ud83d", "a\ufeffb", "a\nb"])
VALUES = st.recursive(
    CELLS | ODD | st.none() | st.booleans() | st.integers(-2, 10 ** 400) | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2), max_leaves=3)
HEADERS = st.sampled_from([["text", "label"], ["", "text", "label"], ["text", "label", "x"], ["text"], ["a", "b"],
                           ["text", "text"], ["\ufefftext", " label "], ["sep=;"], ["text;label"]])
MARKS = st.sampled_from([b"", b"", codecs.BOM_UTF8, b"\xff", b"\n\n"])
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


# Strings rather than rows are generated: what a program writes wrongly is often no table at all.
@st.composite
def separated(draw) -> tuple[str, bytes]:
    """Makes a CSV or TSV; returns its ending and its bytes."""
    ending, end, header = draw(st.sampled_from(["csv", "tsv"])), draw(ENDS), draw(HEADERS)
    delimiter = "," if ending == "csv" else "\t"
    rows = draw(st.lists(st.lists(CELLS, max_size=len(header) + 1), max_size=5))
    if ending == "csv" and draw(st.booleans()):
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    lines = [delimiter.join(row) for row in rows]
    content = draw(MARKS) + end.join([delimiter.join(header), *lines, ""]).encode()
    return ending, content


@st.composite
def objects(draw) -> tuple[str, bytes]:
    """Makes a JSON Lines file whose values have any type; returns what `separated` does."""
    keys = st.sampled_from(["text", "label", "x", "\ufefftext"])
    rows = draw(st.lists(st.dictionaries(keys, VALUES, max_size=3), min_size=1, max_size=5))
    end = draw(ENDS)
    return "jsonl", draw(MARKS) + "".join(json.dumps(row) + end for row in rows).encode()


def check_table(folder: Path, ending: str, content: bytes) -> None:
    """Reads a made table as training and as prediction do.

    Raises:
        AssertionError: they read different cells, a row is lost without a word, or an error has several lines.
        Exception: whatever else a reader raised.
    """
    from data import splits, stream, tables
    from machine.errors import UserError
    from options.schema import TableOptions

    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    # Prediction's way: row by row, with errors in their places.
    try:
        opened = stream.open_rows(path)
        with opened.file:
            rows = list(opened.rows)
    except UserError as error:
        rows, refused = [], error
    else:
        refused = next((row.error for row in rows if row.error), None)
        check_lines(content, [row.line for row in rows], ending)
    # Training's way: all rows, or one line.
    try:
        table = tables.read_table(path)
    except UserError as error:
        assert refused or not rows or not any(row.columns for row in rows), f"prediction reads on: {error}"
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"the message {str(error)[:2000]!r}"
        return
    assert not refused, f"training reads on: {refused}"
    for name, cells in table.columns.items():
        assert repr(list(cells)) == repr([row.columns.get(name) for row in rows]), f"another column {name}"
    # Cells that are no text, label or number are refused; the others can be written as UTF-8.
    for features in ((), ("x",)):
        try:
            split, _ = splits.read_split(table, TableOptions(feature_columns=features), " ")
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"the message {str(error)[:2000]!r}"
        else:
            assert len(split) == len(split.sentences) == len(rows), "another number of sentences"
            json.dumps([[*split.sentences], [*split.features]], allow_nan=True, ensure_ascii=False).encode()


def check_lines(content: bytes, numbers: list[int], ending: str) -> None:
    """Checks that each line is the beginning of a row, blank, the header, or inside a cell in quotes.

    Args:
        numbers: of the lines with which rows begin, from 1.

    Raises:
        AssertionError: a line is lost without a word.
    """
    # Bytes that are not UTF-8 stay one character each, so that no line is lost here.
    lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig", "replace"))
    header = ending != "jsonl"
    begins, spans = set(numbers), False
    for number, line in enumerate(lines, 1):
        if number in begins:
            spans = ending == "csv" and '"' in line
        elif not line.strip("\ufeff \u2028"):
            continue
        elif header:
            header = False
        else:
            assert spans, f"line {number} is lost: {line[:40]!r}"


TABLES = {"table: CSV and TSV": separated(), "table: JSON Lines": objects()}


# ---------------------------------------------------------------- adapters

PREFIX, LAYER = "base_model.model.", "transformer.h.0.attn.c_attn"
SETTINGS = st.fixed_dictionaries({}, optional={
    "r": st.sampled_from([2, 4, None, "4"]), "lora_alpha": st.sampled_from([8, 0.5, None, [1]]), "use_rslora": st.booleans(),
    "rank_pattern": st.sampled_from([{"c_attn": 4}, {"h.0.attn.c_attn": 2}, {"(": 4}, None]),
    "alpha_pattern": st.sampled_from([{"c_attn": 3}, {"h.1.attn.c_attn": 30, "c_attn": 1}, {"x": 2}, ["c_attn"]]),
    "bias": st.sampled_from(["none", "all", "lora_only", None]), "fan_in_fan_out": st.booleans(),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "OLoRA", "loftq"]),
    "modules_to_save": st.lists(st.sampled_from(["score", "lm_head", "wte", "ln_f", "transformer.wpe", "x"]), max_size=3),
    "use_dora": st.booleans(), "lora_bias": st.booleans(), "new_setting": st.booleans(),
    "ensure_weight_tying": st.booleans()})
# Tensors of the file, by their names without prefix; the number of them is small, so that cases meet.
TENSORS = st.sampled_from([f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "score.weight", "lm_head.weight",
                           "transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
                           "transformer.wpe.weight", f"{LAYER}.bias", "transformer.wte.lora_embedding_A",
                           f"{LAYER}.lora_A.default.weight", f"{LAYER}.base_layer.weight", "lm_head.lora_A.weight",
                           "transformer.ln_f.lora_B.weight", "h.0.attn.c_attn.lora_A.weight"])
CHANGES = st.tuples(st.sampled_from(["drop", "add", "add", "no prefix", "two prefixes", "cut"]), TENSORS)


@functools.cache
def toy_gpt2(classifier: bool):
    """Returns a GPT-2 of two layers, made once for all cases: a classifier, or a language model with a shared embedding."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_layer=2, n_embd=8, n_head=2, n_positions=8, initializer_range=0.2, bos_token_id=0,
                        eos_token_id=0, pad_token_id=0)
    return (GPT2ForSequenceClassification if classifier else GPT2LMHeadModel)(config).eval()


def write_adapter(folder: Path, classifier: bool, settings: dict, changes: list[tuple[str, str]]) -> None:
    """Writes an adapter as PEFT does, with other settings and other tensors.

    Args:
        changes: kind of change and name of a tensor, one after the other.
    """
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(len(changes))
    own = toy_gpt2(classifier).state_dict()
    state = {}
    for block in (0, 1):
        name = f"{PREFIX}transformer.h.{block}.attn.c_attn"
        state[f"{name}.lora_A.weight"] = torch.randn(4, 8, generator=random)
        state[f"{name}.lora_B.weight"] = torch.randn(24, 4, generator=random)
    if classifier:
        state[f"{PREFIX}score.weight"] = torch.randn(2, 8, generator=random)
    # Whole modules that the settings name stand in the file, unless a change takes them out.
    for name in own:
        if any(name.rpartition(".")[0].endswith(saved) for saved in settings.get("modules_to_save") or ()):
            state[PREFIX + name] = torch.randn(own[name].shape, generator=random)
    for kind, name in changes:
        value = state.pop(PREFIX + name, None)
        if kind == "add":
            value = torch.randn(own[name].shape if name in own else (4, 8), generator=random)
            state[PREFIX + name] = value
        elif value is not None and kind != "drop":
            renamed = {"no prefix": name, "two prefixes": PREFIX * 2 + name, "cut": PREFIX + name}[kind]
            state[renamed] = value[:2].clone() if kind == "cut" else value
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM", "r": 4, "lora_alpha": 6,
              "target_modules": ["c_attn"], "base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": True,
              "modules_to_save": ["score"] if classifier else None, **settings}
    if classifier and settings.get("modules_to_save") is not None:
        config["modules_to_save"] = [*settings["modules_to_save"], "score"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")


def check_adapter(folder: Path, classifier: bool, settings: dict, changes: list[tuple[str, str]]) -> None:
    """Loads a made adapter here and in PEFT.

    Raises:
        AssertionError: other logits than PEFT's, an error of several lines, or a model that changed although it was refused.
        Exception: whatever else the reader raised.
    """
    import peft
    import torch

    from adapters import peft_layout
    from machine.errors import UserError

    write_adapter(folder, classifier, settings, changes)
    net, ids = copy.deepcopy(toy_gpt2(classifier)), torch.tensor([[3, 5, 7, 2]])
    with torch.no_grad():
        base = net(ids).logits
        try:
            peft_layout.load_adapter(net, folder, head=classifier)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"the message {str(error)[:2000]!r}"
            assert torch.equal(net(ids).logits, base), "refused, and yet the model changed"
            return
        found = net.eval()(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reference = peft.PeftModel.from_pretrained(copy.deepcopy(toy_gpt2(classifier)), folder).eval()
            except Exception:
                # PEFT refuses more of the settings.
                return
            expected = reference(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4), "other logits than PEFT's"


ADAPTERS = {f"adapter of a {kind}": st.tuples(st.just(kind == "classifier"), SETTINGS, st.lists(CHANGES, max_size=3))
            for kind in ("classifier", "language model")}


# ---------------------------------------------------------------- trying

def fuzz(name: str, path: Path, call, cases: int, number: int = 0) -> dict:
    """Tries `cases` damaged files on one reader; stops at the first that fails, and shrinks it."""
    return tried(name, readers.damaged(path.read_bytes(), path), lambda content: readers.attempt(path, content, call), cases,
                 number)


def fuzz_table(name: str, folder: Path, cases: int, number: int = 0) -> dict:
    """Tries `cases` made tables on training's and prediction's reader; see `fuzz`."""
    return tried(name, TABLES[name], lambda made: check_table(folder, *made), cases, number)


def fuzz_adapter(name: str, folder: Path, cases: int, number: int = 0) -> dict:
    """Tries `cases` made adapters on the reader of PEFT's layout; see `fuzz`."""
    return tried(name, ADAPTERS[name], lambda made: check_adapter(folder, *made), cases, number)


def tried(name: str, strategy: st.SearchStrategy, attempt: Callable, cases: int, number: int) -> dict:
    """Calls `attempt` with `cases` examples of a strategy; returns how many were tried, and the shrunk one that failed."""
    row = {"reader": name, "tried": 0, "failed": 0, "error": None}

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def one(case) -> None:
        row["tried"] += 1
        attempt(case)
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
    parser.add_argument("--only", default="", metavar="PREFIX", help="readers whose names begin like this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = [name for name in [*TABLES, *ADAPTERS] if name.startswith(args.only)]
        # The runs that other readers read take a minute to train.
        known = {} if args.only and made else readers.readers(readers.make(Path(folder)))
        known = {name: reader for name, reader in known.items() if name.startswith(args.only)}
        cases = -(-args.cases // max(1, len(known) + len(made)))
        rows = [fuzz(name, path, call, cases, args.seed) for name, (path, call) in known.items()]
        for name in made:
            call = fuzz_table if name in TABLES else fuzz_adapter
            rows.append(call(name, Path(folder), cases, args.seed))
    count, failed = (sum(row[key] for row in rows) for key in ("tried", "failed"))
    if args.json:
        from benchmarks import common  # late: it sets the environment that libraries read when imported

        print(common.result({"tried": count, "failed": failed, "seed": args.seed, "readers": rows}))
    else:
        for row in rows:
            print(f"{row['reader']:<28}{row['tried']:>7} tried {row['failed']:>3} failed" +
                  (f"\n  {row['error']}" if row["error"] else ""))
        print(f"{'all':<28}{count:>7} tried {failed:>3} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
