"""eval, test and diagnose refuse a file that was trained on, count single rows of it, and score held-out rows again."""
import json
import shutil

import pytest
import toy

import data_utils
from experiments import evaluate, trained_on
from experiments.inputs import load_task
from machine.errors import UserError
from options.schema import RunOptions
from record.config_json import rebuild
from record.files import read_json, sha256


@pytest.fixture(scope="module")
def table(work, tmp_path_factory):
    """One table, of which a run held out a share, and its run; beside it the same rows as train and validation files."""
    folder = tmp_path_factory.mktemp("table")
    rows = [f"{text},{'abc'[len(text) % 3]}\n" for text, _ in toy.toy_rows(60, 3)]
    (folder / "rows.csv").write_text("text,label\n" + "".join(rows))
    (folder / "two").mkdir()
    (folder / "two" / "train.csv").write_text("text,label\n" + "".join(rows[:45]))
    (folder / "two" / "validation.csv").write_text("text,label\n" + "".join(rows[45:]))
    for name, data in (("held", "rows.csv"), ("files", "two")):
        assert toy.main("LoRA", "12345", "--model", work / "model", "--data", folder / data, "--epochs", 1, "--out",
                        folder / name, "--no-plots") == 0
    return folder


def commands(run, data, out):
    return {"eval": ("eval", run, "--data", data), "test": ("test", run, run, "--data", data, "--resamples", 100),
            "diagnose": ("diagnose", run, "--data", data, "--limit", 1, "--out", out)}


@pytest.mark.parametrize("command", ["eval", "test", "diagnose"])
@pytest.mark.parametrize("run", ["LoRA", "distilled"])
def test_the_training_file_is_refused_whatever_its_name(work, distilled_run, tmp_path, capsys, command, run):
    copy = tmp_path / "development.tsv"
    shutil.copy(work / "cola" / "in_domain_train.tsv", copy)
    for data in (work / "cola" / "in_domain_train.tsv", copy):
        words = commands(work / run, data, tmp_path / "out")[command]
        capsys.readouterr()
        assert toy.main(*words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith(f"run.py: {data}: {work / run} was trained on this file")
        assert "--allow-training-data scores it all the same" in err and not (tmp_path / "out").exists()
        assert (f"(as {work / 'cola' / 'in_domain_train.tsv'}: the same SHA-256)" in err) == (data == copy)
        # A diagnosis takes seconds: of the copy alone.
        if command == "diagnose" and data != copy:
            continue
        assert not toy.main(*words, "--allow-training-data", "--json")
        out, err = capsys.readouterr()
        assert f"warning: TRAINING DATA: {data}: {work / run} was trained on this file" in err
        found = json.loads(out)
        counts = {"eval": found.get("trained_on"), "test": found.get("a", {}).get("trained_on"),
                  "diagnose": found.get("trained_on") if command != "diagnose" else list(found["trained_on"].values())[0]}
        assert counts[command] == 40  # every row of it
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_file_that_a_teacher_or_an_intermediate_task_was_trained_on_is_refused(work, tmp_path, capsys):
    """The student learned from it by its teacher, and the adapter by the one that it began with."""
    toy.write_cola(tmp_path / "other", train=30, dev=8)
    rows = toy.tsv(toy.toy_rows(30, 99))
    (tmp_path / "other" / "in_domain_train.tsv").write_text(rows)
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "other", "--epochs", 1, "--out",
                    tmp_path / "first", "--no-plots") == 0
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--init", tmp_path / "first",
                    "--epochs", 1, "--out", tmp_path / "second", "--no-plots") == 0
    assert toy.main("distil", "12345", "--plain", "--teacher", tmp_path / "second", "--out", tmp_path / "third", "--epochs",
                    1, "--embedding-size", 6, "--hidden-size", 5, "--no-plots") == 0
    for run in ("second", "third"):
        capsys.readouterr()
        assert toy.main("eval", tmp_path / run, "--data", tmp_path / "other" / "in_domain_train.tsv") == 2
        assert f"{tmp_path / run} learned from {tmp_path / 'first'}, trained on this file" in capsys.readouterr().err


def test_single_rows_are_counted_said_and_recorded(work, tmp_path, capsys):
    train = data_utils.read_cola_tsv(work / "cola" / "in_domain_train.tsv")
    known = {sentence.casefold() for sentence in train.sentences}
    rows = [(train.sentences[0], 1), (train.sentences[1].upper() + " !", 0), (f"“{train.sentences[2]}”", 1)]
    rows += [row for row in toy.toy_rows(20, 123) if row[0].casefold() not in known]
    data = tmp_path / "new.tsv"
    data.write_text(toy.tsv(rows))
    said = f"warning: {data}: 3 of {len(rows)} rows stand in the training data of {work / 'LoRA'} too"
    assert toy.main("eval", work / "LoRA", "--data", data, "--json") == 0
    out, err = capsys.readouterr()
    assert said in err and json.loads(out)["trained_on"] == 3
    assert toy.main("test", work / "LoRA", work / "LoRA", "--data", data, "--resamples", 100, "--json") == 0
    out, err = capsys.readouterr()
    assert said in err and [json.loads(out)[side]["trained_on"] for side in "ab"] == [3, 3]
    assert toy.main("diagnose", work / "LoRA", "--data", data, "--limit", 1, "--out", tmp_path / "out") == 0
    assert "3 of" in capsys.readouterr().err and read_json(tmp_path / "out" / "diagnose.json")["trained_on"] == {"new": 3}


def test_without_the_training_data_the_count_is_not_known(work, tmp_path, capsys):
    shutil.copytree(work / "cola", tmp_path / "cola")
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "cola", "--epochs", 1, "--out",
                    tmp_path / "run", "--no-plots") == 0
    dev = tmp_path / "cola" / "in_domain_dev.tsv"
    (tmp_path / "cola" / "in_domain_train.tsv").unlink()
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run", "--data", dev, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trained_on"] is None and "rows of them are not counted" in err
    shutil.copy(dev, tmp_path / "cola" / "in_domain_train.tsv")  # there again, but other rows
    assert toy.main("eval", tmp_path / "run", "--data", work / "cola" / "out_of_domain_dev.tsv", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trained_on"] is None and "in_domain_train.tsv: changed since the run read it" in err


@pytest.mark.parametrize("run, split", [("held", "held_out"), ("files", "validation")])
def test_without_data_the_runs_own_development_rows_are_scored(table, capsys, run, split):
    assert toy.main("eval", table / run, "--json") == 0
    result, summary = json.loads(capsys.readouterr().out), read_json(table / run / "summary.json")
    assert result["data"] == split and result.pop("by_class") == summary["by_class"][split]
    assert {key: result[key] for key in toy.SCORES} == summary["validation"][split]
    assert toy.main("eval", table / run) == 0
    assert capsys.readouterr().out.startswith(f"{split}: n {result['n']}, ")


def test_a_students_held_out_rows_are_those_of_its_own_run(table, tmp_path, capsys):
    assert toy.main("distil", "12345", "--plain", "--teacher", table / "held", "--out", tmp_path / "student", "--epochs", 1,
                    "--embedding-size", 6, "--hidden-size", 5, "--no-plots") == 0
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "student", "--json") == 0
    result, summary = json.loads(capsys.readouterr().out), read_json(tmp_path / "student" / "summary.json")
    assert {key: result[key] for key in toy.SCORES} == summary["student"]["validation"]["held_out"]
    assert toy.main("eval", tmp_path / "student", "--data", table / "rows.csv") == 2


def test_the_file_of_a_held_out_share_is_refused_with_what_to_do(table, capsys):
    assert toy.main("eval", table / "held", "--data", table / "rows.csv") == 2
    assert "eval without --data scores the rows held out of it" in capsys.readouterr().err


def test_without_data_several_splits_are_named(work, capsys):
    assert toy.main("eval", work / "LoRA") == 2
    err = capsys.readouterr().err
    assert "--data: missing" in err and str(work / "cola" / "out_of_domain_dev.tsv") in err and err.count("\n") == 1
    assert "in_domain_train.tsv" not in err


def test_splits_without_files_are_not_named_as_files(work, tmp_path, capsys):
    """The built-in pair's names in config.json, such as tiny/in_domain_dev.tsv, are no paths."""
    assert toy.main("LoRA", "12345", "--model", work / "model", "--task", "tiny", "--limit", 8, "--epochs", 1, "--out",
                    tmp_path / "run", "--no-plots") == 0
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "several development splits, in_domain, out_of_domain" in err and "summary.json" in err and ".tsv" not in err
    assert err.count("\n") == 1


def test_a_held_out_share_of_a_changed_file_is_not_scored(work, table, tmp_path, capsys):
    """Its rows would be others, and some of them trained on."""
    shutil.copytree(table / "held", tmp_path / "held")
    (tmp_path / "rows.csv").write_text((table / "rows.csv").read_text() + "the cat,a\n")
    config = tmp_path / "held" / "config.json"
    config.write_text(config.read_text().replace(str(table / "rows.csv"), str(tmp_path / "rows.csv")))
    toy.reseal(tmp_path / "held")
    assert toy.main("eval", tmp_path / "held") == 2
    assert f"{tmp_path / 'rows.csv'}: changed since the run read it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_a_development_file_that_is_a_copy_of_the_training_file_is_refused(work, table, tmp_path, capsys, command):
    shutil.copytree(table / "two", tmp_path / "two")
    shutil.copy(tmp_path / "two" / "train.csv", tmp_path / "two" / "validation.csv")
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "two", "--epochs", 1, "--out",
                    tmp_path / "run", "--no-plots") == 0
    capsys.readouterr()
    assert toy.main(command, tmp_path / "run") == 2
    assert "validation.csv: " in (err := capsys.readouterr().err) and "--allow-training-data" in err


def test_every_kind_of_task_records_its_training_file_first(work, table, tmp_path):
    """`training_files` relies on it."""
    (tmp_path / "plain.txt").write_text("".join(f"{text}.\n" for text, _ in toy.toy_rows(200, 9)))
    cases = {"cola": (work / "cola", "in_domain_train.tsv"), "tiny": (None, "in_domain_train.tsv"),
             "csv": (table / "two", "train.csv"), "edits": (tmp_path / "plain.txt", "plain.txt")}
    for task, (data, expected) in cases.items():
        files = data_utils.load_task(task, data).files
        names = trained_on.training_files({"data_files": files, "options": {"task": task}})
        assert [name.rpartition("/")[2] for name in names.values()] == [expected], task


def test_runs_that_start_from_each_other_or_from_a_damaged_one_are_followed_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a"), ("c", "d")):
        (tmp_path / name).mkdir()
        options = {"task": "cola", "init": str(tmp_path / other)}
        (tmp_path / name / "config.json").write_text(json.dumps({"options": options, "data_files": {name: name}}))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("no JSON")
    found = trained_on.sources(tmp_path / "a", read_json(tmp_path / "a" / "config.json"))
    assert list(found) == [tmp_path / "a", tmp_path / "b"]
    assert list(trained_on.sources(tmp_path / "c", read_json(tmp_path / "c" / "config.json"))) == [tmp_path / "c"]


def test_a_changed_development_file_does_not_hide_the_count(work, tmp_path, capsys):
    shutil.copytree(work / "cola", tmp_path / "cola")
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "cola", "--epochs", 1, "--out",
                    tmp_path / "run", "--no-plots") == 0
    dev, train = (tmp_path / "cola" / f"in_domain_{name}.tsv" for name in ("dev", "train"))
    dev.write_text(train.read_text().split("\n")[0] + "\n" + dev.read_text())
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run", "--data", dev, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trained_on"] >= 1 and f"{dev}: changed since the run read it" in err


@pytest.mark.parametrize("files", [None, [], {"a": None, "b": ["x"]}, {"a": {}}, "text"])
def test_a_config_of_other_types_has_no_training_files(files):
    assert trained_on.training_files({"data_files": files, "options": {"task": "cola", "text": [1, None]}}) == {}


def test_a_transfer_sets_plain_sentences_are_trained_on():
    config = {"data_files": {"a": "1", "b": "2", "c": "3"}, "options": {"task": "cola", "text": ["c"]}}
    assert trained_on.training_files(config) == {"1": "a", "3": "c"}


def test_the_training_rows_of_a_run_are_those_that_it_had(work, tmp_path):
    """With --limit fewer than the file has."""
    config = read_json(work / "LoRA" / "config.json")
    config["options"]["limit"] = 10
    _, tokenizer, _ = evaluate.load_finetuned(work / "LoRA")
    task = load_task(rebuild(RunOptions, config["options"], out=tmp_path), tokenizer)
    assert len(task.train) == 10
    counts, notes = trained_on.count_trained_on(work / "LoRA", config, tokenizer, {"train": task.train})
    assert counts == {"train": 10} and notes[0].startswith("train: 10 of 10 rows stand in the training data of")
    config["data_files"] = {name: sha256(name)[::-1] for name in config["data_files"]}
    with pytest.raises(UserError, match="changed since the run read it"):
        trained_on.recorded_task(work / "LoRA", config, tokenizer)
