"""The command line: help at once, and every bad input is one line on stderr, status 2 and nothing written."""
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import warm
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from machine.errors import UserError
from record import tensors

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, str(ROOT / "run.py")]
GOOD = "s\t1\t\tGood.\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two toy models, toy data and a finished run."""
    folder = tmp_path_factory.mktemp("work")
    toy.write_model(folder / "model")
    toy.write_model(folder / "narrow", channels=16)
    toy.write_cola(folder / "cola")
    assert toy.main("LoRA", "12345", "--model", folder / "model", "--data", folder / "cola", "--out", folder / "run",
                    "--no-plots", "--epochs", 1) == 0
    return folder


@pytest.fixture
def refused(work, tmp_path, monkeypatch, capsys):
    """Calls run.py in an empty folder; returns the one line of stderr after checking that it is all that happened."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> str:
        before, run_before = toy.tree(tmp_path), toy.tree(work / "run")
        folders = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = toy.main(*arguments)
        lines = capsys.readouterr().err.splitlines()
        assert status == 2
        assert len(lines) == 1 and lines[0].startswith("run.py: "), lines
        assert toy.tree(tmp_path) == before and sorted(tmp_path.rglob("*")) == folders
        assert toy.tree(work / "run") == run_before
        return lines[0]
    return call


# ---------------------------------------------------------------- help

def test_help_answers_in_under_half_a_second():
    """Of processor time, because the clock counts other programs too."""
    seconds = []
    for _ in range(3):
        begin = sum(os.times()[2:4])
        done = subprocess.run([*PYTHON, "--help"], capture_output=True, text=True)
        seconds.append(sum(os.times()[2:4]) - begin)
        assert done.returncode == 0 and "LoRA" in done.stdout and done.stderr == ""
    assert min(seconds) < 0.5


def test_help_and_a_wrong_option_import_nothing_heavy():
    code = ("import sys, run\n"
            "for argv in (['--help'], ['LoRA', '--help'], ['sweep', '--help'], ['distil', '1'], ['LoRA', '12345', '--x']):\n"
            "    try: run.main(argv)\n    except SystemExit: pass\n"
            "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_first_step_waits_for_nothing_that_it_does_not_need(work, tmp_path):
    """Not for what an epoch's end needs; and the garbage collector rests while libraries are imported, no longer."""
    code = ("import gc, os, sys, run\n"
            "function_of = run.function_of\n"
            "def until_the_loss(args):\n"
            "    import train_utils\n"
            "    def loss(*_):\n"
            "        late = {'matplotlib', 'tensorboard', 'sklearn', 'datasets', 'pyarrow', 'optuna'} & set(sys.modules)\n"
            "        print('HEAVY', sorted(late), gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)\n"
            "        os._exit(0)\n"
            "    train_utils.label_loss = lambda *_: loss\n"
            "    return function_of(args)(args)\n"
            "run.function_of = lambda args: until_the_loss\n"
            "run.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, "LoRA", "12345", "--model", work / "model", "--data", work / "cola",
                           "--out", tmp_path / "run", "--plots", tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "HEAVY [] True True", done.stderr


def test_an_error_beside_the_main_thread_is_refused_like_any_other(work, refused, monkeypatch):
    def fails(pieces):
        raise UserError("weights: gone")
    monkeypatch.setattr(tensors, "_digest", fails)
    assert refused("LoRA", "12345", "--model", work / "model", "--data", work / "cola") == "run.py: weights: gone"


@pytest.mark.parametrize("mode", ["gen", "LoRA", "distil", "compare", "sweep", "eval", "export", "merge", "repeat", "paper",
                                  "report", "submit"])
def test_every_mode_has_a_help_of_its_own(mode, capsys):
    assert toy.main(mode, "--help") == 0
    assert f"usage: run.py {mode}" in capsys.readouterr().out


# ---------------------------------------------------------------- the command line itself

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sr=st.text(max_size=8) | st.from_regex("[0-9]{0,7}", fullmatch=True))
@example(sr="12345\n")
@example(sr="1234")
@example(sr="١٢٣٤٥")  # digits, but not ASCII's
@example(sr="-1234")
@example(sr="--\n")
@example(sr="")
def test_a_run_is_named_by_exactly_five_digits(refused, sr):
    is_name = len(sr) == 5 and all(character in "0123456789" for character in sr)
    if is_name or sr in ("-h", "--help"):
        return
    line = refused("LoRA", sr)
    assert "five digits" in line or sr.startswith("-")


@pytest.mark.parametrize("word, expected", [("lora", "LoRA"), ("LORA", "LoRA"), ("distill", "distil"), ("evall", "eval"),
                                            ("generate", "gen"), ("reports", "report")])
def test_a_mistyped_mode_is_answered_with_the_closest(refused, word, expected):
    line = refused(word, "12345")
    assert f"unknown mode {word}; " in line and expected in line


@pytest.mark.parametrize("mode, option, expected", [
    ("LoRA", "--ranks", "--rank"), ("LoRA", "--weigth-decay", "--weight-decay"), ("LoRA", "--batchsize", "--batch-size"),
    ("LoRA", "--epoch=3", "--epochs"), ("distil", "--temprature", "--temperature"), ("gen", "--promt", "--prompt"),
    ("gen", "--Adapter", "--adapter")])
def test_a_mistyped_option_is_answered_with_the_closest(refused, mode, option, expected):
    line = refused(mode, "12345", option)
    assert f"unknown option {option}; " in line
    assert f"did you mean {expected}?" in line


def test_words_that_are_close_to_nothing_are_answered_with_what_there_is(refused):
    assert "unknown mode xyz; expected one of gen, LoRA, distil, compare, sweep, eval, " in refused("xyz", "12345")
    assert "unknown option --000000; expected one of --model, " in refused("gen", "12345", "--000000")
    assert "unknown option --folds=5; an option of LoRA" in refused("distil", "12345", "--folds=5")


def test_a_line_break_in_a_word_breaks_no_line(refused, work):
    refused("a\nb")
    refused("LoRA", "12345", "--x\ny")
    refused("LoRA", "12345", "--model", work / "model", "--data", "no\nwhere")


@pytest.mark.parametrize("option, value, what", [
    ("--epochs", "0", "a whole number of at least 1"), ("--epochs", "two", "a whole number"), ("--lr", "0", "above 0"),
    ("--lr", "nan", "above 0"), ("--lr", "inf", "above 0"), ("--warmup", "1.5", "from 0 to 1"), ("--dropout", "1", "0.99"),
    ("--weight-decay", "-1", "at least 0"), ("--schedule", "step", "linear"), ("--method", "loar", "lora"),
    ("--task", "colla", "cola"), ("--precision", "fp16", "bf16"), ("--limit", "0", "at least 1"),
    ("--save-every", "0", "minutes, such as 10min"), ("--save-every", "3.5steps", "or 50steps"),
    ("--save-every", "often", "such as 10min, or 50steps")])
def test_a_value_out_of_range_names_its_option_and_what_was_expected(refused, work, option, value, what):
    line = refused("LoRA", "12345", "--model", work / "model", "--data", work / "cola", option, value)
    assert option in line and what in line


# ---------------------------------------------------------------- data

BAD_FILES = {
    "missing": (None, "in_domain_train.tsv: cannot be read"), "empty": (b"", "in_domain_train.tsv: the file is empty"),
    "three columns": ((GOOD + "s\t1\tThree.\n").encode(), "in_domain_train.tsv, line 2: 3 column(s); expected 4"),
    "label": ((GOOD * 2 + "s\tyes\t\tLabel.\n").encode(), "in_domain_train.tsv, line 3: label 'yes'; expected 0 or 1"),
    "not UTF-8": (GOOD.encode() + b"s\t0\t\tCaf\xe9.\n", "in_domain_train.tsv, line 2: not UTF-8"),
    "no sentence": ((GOOD + "s\t0\t\t\n").encode(), "in_domain_train.tsv, line 2: the sentence is empty"),
    "one class": ((GOOD * 3).encode(), "in_domain_train.tsv: every label is 1; training needs both classes"),
}


@pytest.mark.parametrize("data, what", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("mode", ["LoRA", "distil"])
def test_bad_data_is_refused_by_file_and_line(refused, work, tmp_path, mode, data, what):
    folder = toy.write_cola(tmp_path / "cola")
    (folder / "in_domain_train.tsv").unlink()
    if data is not None:
        (folder / "in_domain_train.tsv").write_bytes(data)
    start = ("--model", work / "model") if mode == "LoRA" else ("--teacher", work / "run")
    assert what in refused(mode, "12345", *start, "--data", folder)


def test_a_data_folder_that_is_none_is_refused(refused, work):
    assert "--data nowhere: not a folder; expected one with in_domain_train.tsv" in refused(
        "LoRA", "12345", "--model", work / "model", "--data", "nowhere")


def test_eval_refuses_bad_data_by_file_and_line(refused, work, tmp_path):
    (tmp_path / "bad.tsv").write_text(GOOD + "s\t3\t\tLabel.\n")
    assert "bad.tsv, line 2: label '3'; expected 0 or 1" in refused("eval", work / "run", "--data", "bad.tsv")
    assert "none.tsv: cannot be read" in refused("eval", work / "run", "--data", "none.tsv", "--predictions", "out.tsv")


# ---------------------------------------------------------------- model, adapter, teacher

@pytest.mark.parametrize("options, what", [
    (("--rank", "0"), "--rank 0: expected 1 to 32"), (("--rank", "33"), "--rank 33: expected 1 to 32"),
    (("--rank", "-1"), "--rank -1: expected 1 to 32"),
    (("--targets", "q,attn.c_atn"), "--targets attn.c_atn: matches no linear layer; expected any of q, k, v, o, mlp"),
    (("--layers", "2"), "--layers 2: expected block numbers 0 to 1"), (("--layers", "1-0"), "--layers 1-0: expected"),
    (("--layers", "all"), "--layers all: expected"), (("--layers", "0-99999"), "expected block numbers 0 to 1")])
def test_lora_that_does_not_fit_the_model_names_the_option(refused, work, options, what):
    assert what in refused("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--plots", "p", *options)


def test_a_model_folder_without_weights_or_that_is_none_is_named(refused, work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for mode in (("LoRA", "12345", "--data", work / "cola"), ("gen", "12345")):
        assert "--model bare: the folder has no weights; expected a *.safetensors file" in refused(
            *mode, "--model", "bare")
        assert "--model ./nowhere: no such folder" in refused(*mode, "--model", "./nowhere")


def test_damaged_weights_are_the_users_error(refused, work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "--model cut: cannot be loaded" in refused("LoRA", "12345", "--model", "cut", "--data", work / "cola")


def test_an_adapter_for_another_base_is_refused(refused, work):
    line = refused("gen", "12345", "--model", work / "narrow", "--adapter", work / "run")
    assert f"{work / 'run'}: adapter for another base" in line and f"it was made for {work / 'model'}" in line


def test_an_adapter_that_is_none_is_refused(refused, work, tmp_path):
    assert "nowhere/adapter_config.json: cannot be read" in refused("gen", "12345", "--adapter", "nowhere")
    shutil.copytree(work / "run", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    for call in (("gen", "12345", "--adapter", "cut"), ("eval", "cut", "--data", work / "cola" / "in_domain_dev.tsv")):
        assert "adapter_model.safetensors: damaged or changed" in refused(*call)
    (tmp_path / "cut" / "SHA256SUMS").unlink()  # somebody else's adapter has none
    (tmp_path / "cut" / "config.json").unlink()
    assert "adapter_model.safetensors: missing or damaged" in refused("gen", "12345", "--adapter", "cut")


def test_a_teacher_that_is_none_names_the_command_that_makes_it(refused, work, tmp_path):
    assert "teacher runs/LoRA-12345: no such run; python run.py LoRA 12345 makes it" in refused("distil", "12345")
    (tmp_path / "empty").mkdir()
    assert "empty: not a run's folder; python run.py LoRA SR makes one" in refused("distil", "12345", "--teacher", "empty")
    shutil.copytree(work / "run", tmp_path / "half")
    (tmp_path / "half" / "summary.json").unlink()
    assert "half: the run is not finished" in refused("distil", "12345", "--teacher", "half")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff", '{"mode": "LoRA"}'])
def test_a_damaged_run_is_refused_by_its_file(refused, work, tmp_path, name, text):
    shutil.copytree(work / "run", tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(text.encode("latin-1"))
    for call in (("eval", "damaged", "--data", work / "cola" / "in_domain_dev.tsv"),
                 ("distil", "12345", "--teacher", "damaged")):
        assert "damaged" in refused(*call)


def test_a_student_that_cannot_fit_says_what_to_give(refused, work):
    assert "give --embedding-size and --hidden-size" in refused("distil", "12345", "--teacher", work / "run")


# ---------------------------------------------------------------- outputs

def test_an_output_folder_that_cannot_be_written_is_refused(refused, work, tmp_path):
    """Below a regular file, where not even root can write."""
    (tmp_path / "file").write_text("here")
    good = ("LoRA", "12345", "--model", work / "model", "--data", work / "cola")
    assert "file/run: the output folder cannot be made" in refused(*good, "--out", "file/run", "--plots", "plots")
    assert "file/plots: the output folder cannot be made" in refused(*good, "--out", "run", "--plots", "file/plots")
    assert "file/out.tsv: cannot be written" in refused("eval", work / "run", "--data", work / "cola" / "in_domain_dev.tsv",
                                                        "--predictions", "file/out.tsv")


def test_a_finished_run_is_not_written_to(refused, work):
    line = refused("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", work / "run",
                   "--epochs", "1")
    assert f"{work / 'run'}: holds a finished run" in line


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    """The rest of this file calls `main`; this is the command itself."""
    done = subprocess.run([*PYTHON, "LoRA", "1234"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run.py: argument SR: '1234': expected exactly five digits, such as 12345\n"
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- streams and bytes that are not as usual

def shell(command: str, **environment) -> subprocess.CompletedProcess:
    """Runs a shell command in which run.py is `$RUN`."""
    return subprocess.run(["sh", "-c", command], capture_output=True, timeout=300, cwd=ROOT, env={
        **os.environ, "RUN": f"{sys.executable} {ROOT / 'run.py'}", **environment})


def test_a_word_that_is_not_utf_8_is_refused():
    for words in ("gen 12345 --prompt $(printf 'caf\\351')", "$(printf '\\377')"):
        done = shell(f"$RUN {words}")
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1) and b"not UTF-8" in done.stderr


def test_characters_that_the_output_cannot_write_are_escaped(work):
    prompt = ("gen", "12345", "--model", work / "model", "--max-new-tokens", "1", "--prompt", "caf\u00e9")
    done = subprocess.run([*PYTHON, *map(str, prompt)], capture_output=True, cwd=ROOT, timeout=300,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "TQDM_DISABLE": "1"})
    assert done.returncode == 0 and rb"caf\xe9" in done.stdout


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&-"])
def test_a_closed_stream_gives_its_number_to_no_file(tmp_path, streams):
    code = ("import os, sys, run; run.main([]); file = open(sys.argv[1], \"w\"); "
            "os.write(1, b\"lost\"); os.write(2, b\"lost\"); file.write(\"kept\")")
    done = shell(f"{sys.executable} -c '{code}' {tmp_path / 'out.txt'} {streams}")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (tmp_path / "out.txt").read_text() == "kept"


@pytest.mark.slow
def test_a_run_without_streams_ends_well(work, tmp_path):
    done = shell(f"$RUN eval {work / 'run'} --data {work / 'cola' / 'in_domain_dev.tsv'} --predictions "
                 f"{tmp_path / 'out.tsv'} <&- >&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "out.tsv").read_text().startswith("sentence\tlabel")


@pytest.mark.slow
def test_a_closed_standard_input_is_an_empty_one(work):
    arguments = f"predict {work / 'run'} --file - --format text"
    closed = shell(f"$RUN {arguments} <&-")
    empty = shell(f"{shlex.join(warm.command())} {arguments} </dev/null")
    assert (closed.returncode, closed.stdout, closed.stderr) == (empty.returncode, empty.stdout, empty.stderr)
    assert b"Traceback" not in closed.stderr


# ---------------------------------------------------------------- what it prints when all is well

def test_a_warning_is_one_line_that_counts(work, tmp_path, capsys):
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", tmp_path / "run",
                    "--no-plots", "--method", "none", "--max-length", "3") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 3 and all("are longer than 3 tokens and were truncated" in line for line in warned)


def test_eval_prints_one_json_object(work, capsys):
    assert toy.main("eval", work / "run", "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["n"] == 12


def test_gen_prints_the_same_text_for_the_same_seed(work, capsys):
    texts = []
    for seed in ("12345", "12345", "54321"):
        assert toy.main("gen", seed, "--model", work / "model", "--prompt", "the cat", "--max-new-tokens", 10) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the cat")
