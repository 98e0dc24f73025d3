"""Records of the paper's steps: a recorded step is not run again, and a record is written and read with care."""
import json
import shutil
from dataclasses import replace

import pytest
from paper_steps import states, three_steps

from experiments import paper, step_records
from experiments.paper import PaperOptions, make_paper, plan
from experiments.steps import RUN, Step
from machine.errors import UserError


@pytest.fixture
def three(tmp_path, monkeypatch):
    return three_steps(tmp_path, monkeypatch)


@pytest.fixture
def recorded(three, tmp_path):
    """The same paper with a folder of records; also on another machine, where its folder is empty."""
    options, fate, ran = three
    here = replace(options, records=tmp_path / "records")
    make_paper(here)
    ran.clear()

    def elsewhere(**changes) -> PaperOptions:
        shutil.rmtree(options.out)
        return replace(here, **changes)
    return here, elsewhere, ran


def test_a_recorded_step_is_not_run_again_elsewhere(recorded):
    here, elsewhere, ran = recorded
    before = (here.out / "one" / "result.json").read_bytes()
    options = elsewhere()
    assert plan(options).count("(recorded)") == 3
    assert make_paper(options)[1] == [] and ran == []
    assert states(options) == ["done"] * 3 and (options.out / "one" / "result.json").read_bytes() == before
    assert not (options.out / "one" / "run").exists()  # no weights
    assert make_paper(options)[1] == [] and ran == []


def test_a_record_that_changed_is_taken_again(recorded):
    here, elsewhere, ran = recorded
    options = elsewhere()
    make_paper(options)
    record = json.loads((here.records / "one.json").read_text())
    record["state"]["seconds"] = 1234.0
    (here.records / "one.json").write_text(json.dumps(record))
    assert make_paper(replace(options, no_run=True))[1] == [] and ran == []
    assert json.loads((options.out / "paper.json").read_text())["steps"][0]["seconds"] == 1234.0


def test_a_step_whose_weights_are_needed_is_run_whatever_its_record(recorded):
    here, elsewhere, ran = recorded
    (here.records / "three.json").unlink()
    options = elsewhere()
    assert make_paper(options)[1] == [] and ran == ["two", "three"]  # three reads what two left
    assert (here.records / "three.json").exists()


def test_so_it_is_when_its_record_was_taken_before(recorded):
    here, elsewhere, ran = recorded
    options = elsewhere()
    make_paper(options)
    (here.records / "three.json").unlink()
    shutil.rmtree(options.out / "three")
    only = replace(options, only=("three",))
    assert make_paper(only)[1] == ["step three failed: it needs the step two, which is not done"] and ran == []
    assert make_paper(options)[1] == [] and ran == ["two", "three"]
    assert (options.out / "two" / "run" / "weights").exists()


def test_a_record_of_another_command_is_not_taken(recorded, monkeypatch):
    _, elsewhere, ran = recorded
    declared = paper.steps()
    monkeypatch.setattr(paper, "steps", lambda *_: [Step("one", 1, [RUN, "one", "--x"], "one/result.json"), *declared[1:]])
    options = elsewhere()
    assert plan(options).count("(recorded)") == 2
    assert make_paper(options)[1] == [] and ran == ["one"]


def test_what_a_step_needs_is_run_down_to_the_first(recorded, monkeypatch):
    here, elsewhere, ran = recorded
    one, two, three = paper.steps()
    monkeypatch.setattr(paper, "steps", lambda *_: [one, replace(two, needs=("one",)), three])
    options = elsewhere()
    make_paper(options)
    (here.records / "three.json").unlink()
    shutil.rmtree(options.out / "three")
    assert make_paper(options)[1] == [] and ran == ["one", "two", "three"]


def test_no_run_builds_the_paper_of_what_is_there(recorded, monkeypatch):
    here, elsewhere, ran = recorded
    (here.records / "one.json").unlink()
    monkeypatch.setattr(paper, "check", lambda options: pytest.fail("models and data are not needed"))
    options = elsewhere(no_run=True)
    assert make_paper(options)[1] == [] and ran == [] and states(options) == ["not run", "done", "done"]


def test_overwriting_runs_a_step_whatever_its_record_and_records_it_anew(recorded):
    here, elsewhere, ran = recorded
    options = elsewhere(only=("one",), overwrite=True)
    before = (here.records / "two.json").read_bytes()
    assert make_paper(options)[1] == [] and ran == ["one"] and states(options) == ["done"] * 3
    assert (options.out / "one" / "run" / "weights").exists() and not (options.out / "two" / "run").exists()
    assert (here.records / "two.json").read_bytes() == before


def test_a_record_cannot_remove_a_file_outside_the_folder(recorded):
    here, elsewhere, _ = recorded
    options = elsewhere()
    make_paper(options)
    outside = options.out.parent / "outside.json"
    outside.write_text("mine")
    record = json.loads((here.records / "one.json").read_text())
    (here.records / "one.json").write_text(json.dumps(record | {"files": {"../outside.json": "{}"}}))
    with pytest.raises(UserError, match="one.json: ../outside.json lies outside the paper's folder"):
        step_records.forget(options.steps[0], options.out, here.records)
    assert outside.read_text() == "mine"


def test_a_record_cannot_write_outside_the_folder(recorded):
    here, elsewhere, _ = recorded
    record = json.loads((here.records / "one.json").read_text())
    (here.records / "one.json").write_text(json.dumps(record | {"files": {"../outside.json": "{}"}}))
    with pytest.raises(UserError, match="one.json: ../outside.json lies outside the paper's folder"):
        make_paper(elsewhere())
    assert not (here.out.parent / "outside.json").exists()


def test_a_study_of_seeds_is_recorded_with_what_the_report_reads_of_its_runs(tmp_path):
    step = Step("lora", 1, [], "cola/LoRA-12345-seeds/seeds.json", runs="cola/LoRA-*")
    out, again = tmp_path / "out", tmp_path / "again"
    for folder, name in (("grid/x", "summary.json"), ("cola/LoRA-12345-seeds", "seeds.json"), ("steps", "lora.json")):
        (out / folder).mkdir(parents=True)
        (out / folder / name).write_text('{"words": []}\n')
    (out / "grid" / "x" / "adapter.safetensors").write_text("weights")
    (out / "cola" / "LoRA-12345").symlink_to("../grid/x")
    step_records.keep(step, out, tmp_path / "records")
    step_records.restore(step, again, tmp_path / "records")
    assert sorted(str(path.relative_to(again)) for path in again.rglob("*.*")) == [
        "cola/LoRA-12345-seeds/seeds.json", "cola/LoRA-12345/summary.json", "steps/lora.json"]
    step_records.forget(step, again, tmp_path / "records")
    assert not any(path.is_file() for path in again.rglob("*")) and not (again / "cola" / "LoRA-12345").exists()


def test_a_diagnosis_is_recorded_with_no_more_sentences_than_the_report_shows(tmp_path):
    step, rows = Step("diagnose", 1, [], "diagnose/diagnose.json"), [{"sentence": str(number)} for number in range(50)]
    for folder, content in (("diagnose", {"disagreements": rows, "all_wrong": {"n": 60, "rows": rows}, "kept": rows}),
                            ("steps", {"words": []})):
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / "diagnose.json").write_text(json.dumps(content))
    step_records.keep(step, tmp_path / "out", tmp_path)
    found = json.loads(json.loads((tmp_path / "diagnose.json").read_text())["files"]["diagnose/diagnose.json"])
    assert found == {"disagreements": rows[:8], "all_wrong": {"n": 60, "rows": rows[:8]}, "kept": rows}


def test_a_step_that_needs_weights_says_so_where_only_the_record_is(recorded):
    here, elsewhere, ran = recorded
    options = elsewhere()
    make_paper(options)
    shutil.rmtree(options.out / "three")
    assert make_paper(replace(options, records=None))[1] == [
        "step three failed: it needs the weights of the step two, of which only the record is here; give --records too"]
    assert ran == []


@pytest.mark.parametrize("text", ["{}", '{"state": {"words": ["run.py", "one"]}}', '{"files": {}, "state": {}}', "no JSON"])
def test_a_file_that_is_no_record_is_told(recorded, text):
    here, elsewhere, _ = recorded
    (here.records / "one.json").write_text(text)
    with pytest.raises(UserError, match="one.json: "):
        make_paper(elsewhere())
