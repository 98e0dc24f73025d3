"""An option is one field: its flag, help, checks and row of docs/options.md follow; presets and --config in their order."""
import json
import re
import shlex
from argparse import ArgumentTypeError
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import options_page
from experiments import arguments
from experiments.parser import Parser
from model import CELLS
from options import modes
from options.declare import names_in, option, options_of
from options.modes import MODES
from options.schema import FREE, NUMBER, POSITIVE, DistilOptions, LoRAOptions, RunOptions, TrainOptions
from record.config_json import as_json, rebuild
from record.files import read_json

CLASSES = (RunOptions, TrainOptions, LoRAOptions, DistilOptions)


def one_option(annotation, default, **declared):
    """The option that a dataclass of one field declares."""
    made = dataclass(type("Made", (), {"__annotations__": {"x": annotation}, "x": option(default, "help", **declared)}))
    return next(options_of(made, "gen"))


# ---------------------------------------------------------------- one field

def test_a_field_is_all_that_an_option_needs(monkeypatch, capsys):
    @dataclass(frozen=True)
    class More:
        new_size: int = option(3, "size of something new", least=2)

    monkeypatch.setitem(MODES, "report", modes.Mode("hand_in:report", "help", "report 12345", (modes.Sr, More)))
    assert Parser("report").parse(["12345"]).new_size == 3
    assert Parser("report").parse(["12345", "--new-size", "4"]).new_size == 4
    assert "| `--new-size` | size of something new | a whole number of at least 2 | `3` |" in options_page.page()
    with pytest.raises(SystemExit):
        Parser("report").parse(["12345", "--new-size", "1"])
    assert "--new-size: '1': expected a whole number of at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("annotation, declared, good, bad", [
    (int, {}, {"-3": -3, "7": 7}, ["two", "1.5", "10000000000", ""]),
    (int, {"least": 0, "most": 9}, {"0": 0, "9": 9}, ["-1", "10"]),
    (float, {"above": 0, "most": 1}, {"1": 1.0, "1e-9": 1e-9}, ["0", "1.1", "nan", "inf", "-inf"]),
    (float | None, {}, {"-1e30": -1e30}, ["nan", "1e31", "x"]),
    (str, {"choices": ("a", "b")}, {"a": "a"}, ["A", "", "a,b"]),
    (int | None, {"choices": (1, 2)}, {"2": 2}, ["3", "a"]),
    (tuple[str, ...], {}, {"a, b": ("a", "b"), "a,a": ("a", "a")}, ["a,,b", ""]),
    (tuple[float, ...] | None, {"above": 0, "unique": True}, {"1,2": (1.0, 2.0)}, ["1,1", "1,x", "0,1"])])
def test_words_are_read_within_their_bounds(annotation, declared, good, bad):
    made = one_option(annotation, None, **declared)
    assert {word: made.read(word) for word in good} == good
    for word in bad:
        with pytest.raises(ArgumentTypeError, match="expected|twice"):
            made.read(word)


@given(st.from_regex(re.compile(NUMBER, re.ASCII), fullmatch=True))
def test_a_positive_number_is_one_that_python_reads_above_0(text):
    assert bool(re.fullmatch(POSITIVE, text, re.ASCII)) == (Decimal(text) > 0)


@pytest.mark.parametrize("name, good, bad", [
    ("save_every", ["10", "0.5min", "1e-05", "50steps"], ["0", "0e5", "0steps", "1.5steps", "-1", "nan", "min", "1 min"]),
    ("class_weights", ["balanced", "none", "2.5,1", "0,1e3"], ["1", "0,0", "0e5,0", "1,", "-1,2", "1,inf", "Balanced"]),
    ("rank_pattern", ["c_attn=2", "h.1.mlp=1,a=b=3"], ["c_attn", "=2", "c_attn=0", "c_attn=1.5", "c_attn=2,"]),
    ("alpha_pattern", ["c_attn=0.5"], ["c_attn=0", "c_attn=0e5", "c_attn=-1"])])
def test_patterns_of_words_take_what_the_option_means(name, good, bad):
    made = Parser("LoRA").options[name]
    assert [made.read(word) for word in good] == [tuple(word.split(",")) if made.several else word for word in good]
    for word in bad:
        with pytest.raises(ArgumentTypeError, match="expected"):
            made.read(word)


def test_sentences_stand_before_the_options_or_after_them_or_both():
    for words in (("run", "a", "b", "--json"), ("run", "a", "--json", "b"), ("--json", "run", "a", "b")):
        args = Parser("predict").parse(list(words))
        assert (str(args.run), args.texts, args.json) == ("run", ("a", "b"), True)


def test_words_lead_back_to_the_value():
    for mode in ("LoRA", "distil", "compare", "sweep"):
        parser = Parser(mode)
        for one in parser.options.values():
            if one.default in (None, (), False, True) or one.name == "save_every":
                continue
            (word,) = one.words(one.default)
            assert getattr(parser.parse(["12345", word, "--search=rank=1"][:3 if mode == "sweep" else 2]),
                           one.name) == one.default


def test_a_misspelt_property_of_a_field_is_an_error():
    with pytest.raises(TypeError, match="at_leest"):
        option(1, "help", at_leest=0)


def test_choices_are_read_from_a_modules_dictionary_or_tuple(tmp_path):
    (tmp_path / "losses.py").write_text("import torch\nLOSSES: dict = {'kl': torch.add, 'mse': torch.sub}\nA = ('x', 'y')\n")
    assert names_in(f"{tmp_path}/losses.py:LOSSES") == ("kl", "mse") and names_in(f"{tmp_path}/losses.py:A") == ("x", "y")
    with pytest.raises(LookupError):
        names_in(f"{tmp_path}/losses.py:B")


def test_a_students_cells_are_those_of_the_model():
    assert Parser("distil").options["cell"].choices == tuple(CELLS)


def test_only_recorded_options_are_free_of_the_result():
    assert set(FREE) == {"keep", "keep_memory", "save_every", "save_steps", "anomaly", "cache", "track"}


# ---------------------------------------------------------------- help and the page

@pytest.mark.parametrize("mode", MODES)
def test_help_shows_at_most_twenty_options_and_an_example_first(mode, capsys):
    shown = {}
    for words in (("--help",), ("--help", "all")):
        assert toy.main(mode, *words) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"python run.py {mode} ")
        shown[words] = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    assert len(shown["--help",]) <= 20
    assert shown["--help", "all"] == {
        one.flag for one in Parser(mode).options.values() if not one.hidden}


@pytest.mark.parametrize("mode", MODES)
def test_each_example_is_one_that_the_mode_takes(mode):
    assert Parser(mode).parse(shlex.split(MODES[mode].example)[1:]).mode == mode


def test_without_a_mode_every_mode_has_a_line(capsys):
    assert toy.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in MODES if not any(line.split()[:1] == [name] for line in lines)] == []


def test_the_page_of_options_is_current():
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()


# ---------------------------------------------------------------- default, preset, --config, flag

def options_from(*words) -> RunOptions:
    return arguments.finetune_options(Parser("LoRA").parse(["12345", "--model", "tiny", "--task", "tiny", *map(str, words)]))


def test_a_preset_sets_fields_that_say_so_to_values_that_they_take():
    declared = {one.name: one for cls in CLASSES for one in options_of(cls, "")}
    names = [path.stem for path in arguments.PRESETS.glob("*.toml")]
    assert "LoRA-tiny" in names and "distil-plain-tiny" in names
    for name in names:
        for method in ("lora", "full", "head", "features", "none"):
            for key, value in arguments.preset(name, method).items():
                assert declared[key].preset and declared[key].read(str(value)) == value


def test_flags_come_before_config_config_before_preset_preset_before_default(tmp_path):
    assert (LoRAOptions.rank, TrainOptions.epochs, TrainOptions.lr) == (8, 3, 4e-4)
    options = options_from()
    assert (options.preset, options.train.epochs, options.train.lr, options.lora.rank) == ("LoRA-tiny", 12, 2e-3, 8)
    assert options_from("--method", "none").train.lr == 4e-4 and options_from("--method", "features").train.lr == 3e-3
    (tmp_path / "my.toml").write_text('epochs = 5\nrank = 2\ntargets = ["q", "v"]\nsave-every = "50steps"\nkeep = false\n')
    options = options_from("--config", tmp_path / "my.toml", "--rank", 4)
    assert (options.train.epochs, options.train.lr, options.lora.rank) == (5, 2e-3, 4)
    assert (options.lora.targets, options.train.save_steps, options.keep) == (("q", "v"), 50, False)
    (tmp_path / "my.json").write_text(json.dumps({"epochs": 6, "lr": 1e-3, "rslora": True, "head_lr": None}))
    options = options_from("--config", tmp_path / "my.json")
    assert (options.train.epochs, options.train.lr, options.lora.rslora) == (6, 1e-3, True)
    assert options_from("--preset", "LoRA").train.epochs == 3


def test_the_config_of_a_run_gives_its_options_again(tmp_path):
    options = options_from("--rank", 4, "--targets", "q,mlp", "--save-every", "50steps", "--no-keep", "--ema", 0.5)
    recorded = as_json({**vars(options.lora), **vars(options.train), **vars(options.table), **{
        field.name: getattr(options, field.name) for field in fields(RunOptions)
        if field.name not in ("train", "lora", "table", "out", "resume", "overwrite", "repeats")}})
    (tmp_path / "config.json").write_text(json.dumps({"command": "", "options": recorded}))
    again = arguments.finetune_options(Parser("LoRA").parse(["12345", "--config", str(tmp_path / "config.json")]))
    assert again == options == rebuild(RunOptions, recorded, out=options.out)


@pytest.mark.parametrize("name, text, said", [
    ("x.toml", "rnk = 2", "unknown option rnk; did you mean rank?"), ("x.toml", "rank = true", "rank is true; expected a"),
    ("x.toml", "rank = 'two'", "argument --rank: 'two': expected a whole number"),
    ("x.toml", "rank =", "neither JSON nor TOML"), ("x.toml", "[1]", "unknown option 1"),
    ("x.toml", "rslora = 1", "rslora is 1; expected true or false"), ("x.json", '{"warmup": 2}', "from 0 to 1"),
    ("x.toml", "[train]\nepochs = 3", "unknown option train"), ("x.toml", "[rank]\na = 3", 'rank is {"a": 3}; expected'),
    ("x.json", '{"rank": 2', "neither JSON nor TOML"), ("x.json", '{"options": {"mode": "distil"}}', "records a distil run"),
    ("x.toml", "\xff", "neither JSON nor TOML"), (".", None, "cannot be read"), ("none.toml", None, "cannot be read")])
def test_a_bad_config_is_one_line(tmp_path, capsys, name, text, said):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert toy.main("LoRA", "12345", "--config", tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run.py: --config {tmp_path / name}: ") and said in line


def test_runs_recorded_before_an_option_existed_are_read_as_they_were(tmp_path):
    old = rebuild(DistilOptions, {"teacher": "runs/LoRA-12345", "temperature": 4.0, "kd_alpha": 0.9})
    recipe = {key: value for key, value in arguments.preset("distil-plain").items() if key not in ("epochs", "lr")}
    assert old == DistilOptions(old.teacher, plain=True, transfer_version=1, **recipe)
    run = {"mode": "LoRA", "sr": "12345", "model": "tiny", "task": "tiny", "data": None, "seed": 12345}
    assert rebuild(RunOptions, run, out=tmp_path).fast == "auto" and rebuild(RunOptions, run, out=tmp_path).preset is None


def test_a_run_records_its_preset_and_its_kernels(tmp_path):
    assert toy.main("LoRA", "12345", "--model", "tiny", "--task", "tiny", "--method", "none", "--limit", 8, "--no-plots",
                    "--out", tmp_path / "run") == 0
    recorded = read_json(tmp_path / "run" / "config.json")["options"]
    assert (recorded["preset"], recorded["fast"]) == ("LoRA-tiny", "auto")
    assert options_from("--kernels", "reference").fast == "reference"


def test_every_option_has_help_that_stands_alone_and_a_known_default():
    for mode, declared in MODES.items():
        for one in (one for cls in declared.options for one in options_of(cls, mode)):
            text = one.help
            assert len(text) > 10 and not text.startswith(("of ", "in ", "on ", "as for")) and " there" not in text
            assert one.default is not MISSING
