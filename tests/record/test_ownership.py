"""Only folders that this project made are written to, and only its own files are removed or checksummed."""
import json
import random
import shutil
import sqlite3
from contextlib import closing

import pytest
import toy

from machine.errors import UserError
from options.schema import DistilOptions, RunOptions, TrainOptions
from record import folder as run_folders
from record import ownership
from record.files import read_sums, write_json, write_sums
from record.ownership import check_out, checkpoints, remove_child, remove_run, run_files, weights

CONFIG = {"command": "python run.py LoRA 12345", "options": {"mode": "LoRA", "sr": "12345"}, "versions": {"torch": "2"}}
STRANGE = {"notes.txt": "mine", "extra.json": "{}", "my.safetensors": "weights", "my_checkpoint.safetensors": "weights",
           "other.checkpoint.safetensors": "weights", "results.jsonl": "{}", ".hidden": "x", ".mine.tmp": "x",
           ".notes.txt.123.tmp": "x", "tensorboard/mine.txt": "x", "tensorboard/events.out.tfevents.1.host.2.0": "x",
           "student.onnx": "x", "sub/config.json": "{}"}


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def made_run(folder, mode: str = "LoRA", finished: bool = True):
    """A run's folder as it looks, with files of no content."""
    described = {"LoRA": ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
                 "distil": ("student_config.json", "student.safetensors", "scratch.safetensors",
                            "teacher_logits.safetensors")}[mode]
    names = {name: "{}" for name in ("metrics.jsonl", *described)}
    if mode == "LoRA":
        names["README.md"] = "---\ntags:\n- lora-distil\n---\n"
    write(folder, {"tensorboard/events.out.tfevents.17.42": "x", **names})
    write_json(folder / "config.json", {**CONFIG, "options": {"mode": mode}})
    if finished:
        write_json(folder / "summary.json", {"mode": mode})
        names["summary.json"] = "{}"
    else:
        write(folder, {"student.pretrain.checkpoint.safetensors" if mode == "distil" else "checkpoint.safetensors": "x"})
    write_sums(folder, {name: run_folders.sha256(folder / name) for name in (*names, "config.json")})
    return folder


def options(out, **more) -> RunOptions:
    return RunOptions(**{"mode": "LoRA", "sr": "12345", "model": "m", "task": "t", "data": None, "out": out,
                         "train": TrainOptions(seed=1), **more})


# ---------------------------------------------------------------- whose folder

@pytest.mark.parametrize("maker", ownership.MAKERS)
@pytest.mark.parametrize("files", [
    {"config.json": "{}"}, {"config.json": '{"model_type": "gpt2", "options": {"mode": "LoRA"}}', "model.safetensors": "w"},
    {"notes.txt": "x"}, {".git/config": "x"}, {"adapter_config.json": "{}", "adapter_model.safetensors": "x"},
    {"SHA256SUMS": f"{'0' * 64}  config.json\n", "config.json": "{}"}, {"study.db": "no database"}, {"a/b": "x"},
    {"summary.json": '{"mode": "LoRA"}'}, {"compare.json": "[]"}, {"in_domain_train.tsv": "x"}, {".mine.tmp": ""},
    {"config.json": "\xff"}, {"model.safetensors": "x", ".lock": ""}, {"README.md": "---\ntags:\n- lora-distil\n---\n"}])
def test_a_folder_that_is_not_ours_is_refused_by_every_command_and_left_as_it_is(tmp_path, maker, files):
    write(tmp_path / "out", files)
    before = toy.tree(tmp_path)
    with pytest.raises(UserError, match="--out .*: holds files that no .* of this project wrote .*nothing was") as told:
        check_out(tmp_path / "out", maker)
    assert len(str(told.value).splitlines()) == 1 and toy.tree(tmp_path) == before


@pytest.mark.parametrize("maker", ownership.MAKERS)
def test_new_and_empty_folders_are_taken(tmp_path, maker):
    check_out(tmp_path / "none", maker)
    write(tmp_path / "begun", {".lock": "", ".config.json.123.tmp": "{", ".DS_Store": "", ".cached-a1b2": ""})
    check_out(tmp_path / "begun", maker)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        check_out(tmp_path / "file", maker)


@pytest.mark.parametrize("name, files", [
    ("run", {"config.json": json.dumps(CONFIG), "notes.txt": "mine"}),
    ("compare", {"config.json": json.dumps({**CONFIG, "options": {"methods": ["lora"]}}), "x": ""}),
    ("compare", {"compare.json": '{"mode": "compare"}', "x": ""}), ("sweep", {"sweep.json": '{"mode": "sweep"}', "x": ""}),
    ("sweep", {"trial-00000/.trial.lock": ""}), ("sweep", {"study.db": ""}),
    ("seeds", {"seeds.json": '{"mode": "seeds"}', "x": ""}),
    ("diagnose", {"diagnose.json": '{"mode": "diagnose"}', "x": ""}),
    ("paper", {"config.json": json.dumps({**CONFIG, "options": {"profile": "quick"}}), "x": ""}),
    ("paper", {"paper.json": '{"mode": "paper"}', "x": ""})])
def test_a_folder_is_taken_by_the_command_that_made_it_and_by_no_other(tmp_path, name, files):
    write(tmp_path, files)
    for maker in ownership.MAKERS:
        if maker == name:
            check_out(tmp_path, maker)
        else:
            with pytest.raises(UserError):
                check_out(tmp_path, maker)


@pytest.mark.parametrize("study, ours", [("sweep-12345", True), ("mine", False), (None, True)])
def test_a_database_is_ours_by_the_names_of_its_studies(tmp_path, study, ours):
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("CREATE TABLE studies (study_name TEXT)" if study else "CREATE TABLE version_info (x INT)")
        if study:
            connection.execute("INSERT INTO studies VALUES (?)", (study,))
        connection.commit()
    if ours:
        check_out(tmp_path, "sweep")
    else:
        with pytest.raises(UserError, match="no sweep command"):
            check_out(tmp_path, "sweep")


def test_a_damaged_config_with_whole_checksums_is_still_ours_so_that_overwrite_mends_it(tmp_path):
    made_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(b"\0")
    check_out(tmp_path / "run", "run")
    remove_run(tmp_path / "run")
    assert toy.tree(tmp_path / "run") == {}
    made_run(tmp_path / "two")
    for name in ("config.json", "SHA256SUMS"):
        (tmp_path / "two" / name).write_bytes(b"\0")
    with pytest.raises(UserError):
        check_out(tmp_path / "two", "run")


# ---------------------------------------------------------------- what is removed

@pytest.mark.parametrize("mode", ["LoRA", "distil"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_runs_own_files_go_and_no_other(tmp_path, mode, finished):
    made_run(tmp_path, mode, finished)
    write(tmp_path, STRANGE)
    other = {"LoRA": "student.safetensors", "distil": "tokenizer.json"}[mode]  # the name of a file of the other mode
    write(tmp_path, {other: "mine"})
    remove_run(tmp_path)
    assert set(toy.tree(tmp_path)) == {*STRANGE, other}


def test_a_readme_that_took_the_cards_place_stays(tmp_path):
    write(made_run(tmp_path), {"README.md": "My notes\n"})
    remove_run(tmp_path)
    assert toy.tree(tmp_path) == {"README.md": b"My notes\n"}


def test_a_folder_of_somebody_elses_loses_nothing(tmp_path):
    write(tmp_path, {**STRANGE, "config.json": "{}", "tokenizer.json": "{}", "checkpoint.safetensors": "x"})
    before = toy.tree(tmp_path)
    remove_run(tmp_path)
    remove_child(tmp_path)
    assert toy.tree(tmp_path) == before


def test_files_that_a_newer_version_listed_go_too_and_a_list_leads_to_no_other_folder(tmp_path):
    run = made_run(tmp_path / "run")
    write(tmp_path, {"run/newer.bin": "x", "above": "mine", "run/sub/file": "mine"})
    write_sums(run, {**read_sums(run), "newer.bin": "0" * 64, "../above": "0" * 64, "sub/file": "0" * 64, "sub": "0" * 64,
                     str(tmp_path / "above"): "0" * 64})
    remove_run(run)
    assert set(toy.tree(tmp_path)) == {"above", "run/sub/file"}


def test_a_link_is_removed_and_not_followed(tmp_path):
    run = made_run(tmp_path / "run")
    write(tmp_path, {"elsewhere/events.out.tfevents.1.2": "mine", "weights": "mine"})
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    remove_run(run)
    assert {name for name in toy.tree(tmp_path) if not name.startswith("run")} == {
        "elsewhere/events.out.tfevents.1.2", "weights"}


@pytest.mark.parametrize("mode", ["LoRA", "distil"])
def test_a_removal_that_is_killed_at_any_file_leaves_a_folder_of_ours_that_is_not_finished(tmp_path, mode, monkeypatch):
    for stop in range(len(run_files(made_run(tmp_path / "whole", mode)))):
        run = made_run(tmp_path / str(stop), mode)
        write(run, {"notes.txt": "mine"})
        removed, unlink = [], type(run).unlink

        def limited(path, missing_ok=False, removed=removed, stop=stop, unlink=unlink):
            if len(removed) == stop:
                raise KeyboardInterrupt
            removed.append(path.name)
            unlink(path, missing_ok)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(run), "unlink", limited)
            remove_run(run)
        check_out(run, "run")
        assert (run / "summary.json").exists() == (stop == 0)


def test_temporary_files_of_a_killed_run_go_and_no_others(tmp_path):
    mine = {name: "x" for name in STRANGE if name.startswith(".")}
    write(tmp_path, {**mine, ".summary.json.12.tmp": "{", ".student.gold.checkpoint.safetensors.7.tmp": "x",
                     ".checkpoint.safetensors.7.tmp": "x", ".cached-x1_y": "x", ".config.json.1.tmp/mine": "x"})
    ownership.remove_temporaries(tmp_path)
    assert set(toy.tree(tmp_path)) == {*mine, ".config.json.1.tmp/mine"}


def test_checkpoints_and_weights_are_told_by_their_whole_names(tmp_path):
    write(tmp_path, {**STRANGE, **{name: "x" for name in (
        "checkpoint.safetensors", "student.checkpoint.safetensors", "scratch.transfer.checkpoint.safetensors",
        "adapter_model.safetensors", "student.safetensors")}})
    write_json(tmp_path / "config.json", CONFIG)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint.safetensors", "scratch.transfer.checkpoint.safetensors", "student.checkpoint.safetensors"]
    assert [path.name for path in weights(str(tmp_path))] == ["adapter_model.safetensors"]


# ---------------------------------------------------------------- a run's folder

def test_checksums_cover_the_runs_own_files_alone(tmp_path):
    run = made_run(tmp_path, finished=False)
    write(run, STRANGE)
    run_folders.finish(run, {"mode": "LoRA"}, "tokenizer.json")
    assert set(read_sums(run)) == {"config.json", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors",
                                   "summary.json", "tokenizer.json"}
    assert set(STRANGE) <= set(toy.tree(run)) and "checkpoint.safetensors" not in toy.tree(run)


@pytest.mark.parametrize("more, message", [
    ({}, "holds a finished run; choose another SR or --out, or pass --overwrite"),
    ({"resume": True}, "holds a finished run"), ({"overwrite": True}, None)])
def test_a_finished_run_is_refused_at_once_unless_it_is_to_be_overwritten(tmp_path, more, message):
    run = made_run(tmp_path / "run")
    before = toy.tree(run)
    if message:
        with pytest.raises(UserError, match=message):
            run_folders.check_run_folder(options(run, **more))
    else:
        run_folders.check_run_folder(options(run, **more))
    assert toy.tree(run) == before


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": True}])
def test_a_run_that_is_read_is_not_written_to(tmp_path, more):
    """The teacher of a student, or the run whose adapter another one starts from; by whatever name."""
    teacher = made_run(tmp_path / "teacher", finished=False)
    (tmp_path / "link").symlink_to(teacher)
    for out in (teacher, tmp_path / "link", tmp_path / "teacher" / ".." / "teacher"):
        with pytest.raises(UserError, match="is a run that this one reads|holds an unfinished run"):
            run_folders.check_run_folder(options(out, **more), tmp_path / "none", teacher)


@pytest.mark.parametrize("seed", range(20))
def test_overwriting_any_mixture_keeps_every_strange_file(tmp_path, seed):
    draw = random.Random(seed)
    run = made_run(tmp_path / "run", draw.choice(["LoRA", "distil"]), draw.random() < 0.5)
    strange = dict(draw.sample(sorted(STRANGE.items()), draw.randint(1, len(STRANGE))))
    write(run, strange)
    with run_folders.run_folder(options(run, overwrite=True), {**CONFIG, "data_files": {}}):
        pass
    left = toy.tree(run)
    assert set(left) == {*strange, "config.json", "SHA256SUMS"}
    assert all(left[name] == text.encode() for name, text in strange.items())


# ---------------------------------------------------------------- every command that writes a folder

@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A base model's folder, as `save_pretrained` writes it, and data."""
    work = tmp_path_factory.mktemp("foreign")
    toy.write_model(work / "model")
    toy.write_cola(work / "cola")
    return work


@pytest.mark.parametrize("out", ["model", "cola"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_a_fine_tuning_into_the_base_models_or_the_datas_folder_is_refused_before_anything_is_loaded(
        foreign, capsys, monkeypatch, out, more):
    from experiments import finetune

    monkeypatch.setattr(finetune, "prepare", lambda *_: pytest.fail("loaded something"))
    before = toy.tree(foreign)
    assert toy.main("LoRA", "12345", "--model", foreign / "model", "--data", foreign / "cola", "--out", foreign / out, *more,
                    "--no-plots") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--out {foreign / out}: holds files that no run of this project wrote" in line
    assert toy.tree(foreign) == before


def test_a_distillation_into_its_teachers_or_a_strange_folder_is_refused_before_anything_is_loaded(foreign, monkeypatch,
                                                                                                    tmp_path):
    from experiments import distil

    monkeypatch.setattr(distil, "prepare", lambda *_: pytest.fail("loaded something"))
    teacher = made_run(tmp_path / "teacher")
    before = toy.tree(tmp_path)
    for out, message in ((foreign / "model", "holds files that no run"), (teacher, "is a run that this one reads")):
        with pytest.raises(UserError, match=message):
            distil.run_distil(options(out, mode="distil", overwrite=True), DistilOptions(teacher=teacher))
    assert toy.tree(tmp_path) == before


@pytest.mark.parametrize("words", [
    ("compare", "12345", "--methods", "lora", "--out", "OUT"), ("compare", "12345", "--methods", "lora", "--out", "OUT",
                                                                "--overwrite"),
    ("sweep", "12345", "--search", "rank=1,2", "--out", "OUT"),
    ("sweep", "12345", "--search", "rank=1,2", "--out", "OUT", "--overwrite")])
def test_studies_refuse_a_strange_folder_before_they_load_a_task(foreign, capsys, monkeypatch, words):
    from experiments import finetune

    monkeypatch.setattr(finetune, "check", lambda *_: pytest.fail("loaded something"))
    before = toy.tree(foreign)
    words = [foreign / "model" if word == "OUT" else word for word in words]
    assert toy.main(*words, "--model", foreign / "model", "--data", foreign / "cola", "--no-plots") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds files that no" in line and toy.tree(foreign) == before


def test_seeds_refuse_a_strange_folder_of_one_seed(foreign, capsys, tmp_path):
    write(tmp_path / "LoRA-12346", {"notes.txt": "mine"})
    assert toy.main("LoRA", "12345", "--seeds", 2, "--model", foreign / "model", "--data", foreign / "cola", "--overwrite",
                    "--out", tmp_path, "--no-plots") == 2
    assert "LoRA-12346: holds files that no run of this project wrote (notes.txt)" in capsys.readouterr().err
    assert set(toy.tree(tmp_path)) == {"LoRA-12346/notes.txt"}


def test_a_diagnosis_refuses_a_strange_folder(foreign, capsys, tmp_path):
    made_run(tmp_path / "run")
    assert toy.main("diagnose", tmp_path / "run", "--out", foreign / "model") == 2
    assert "holds files that no diagnose command of this project wrote" in capsys.readouterr().err
