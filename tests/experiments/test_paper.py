"""The paper's steps: that they are commands which their programs take, and what becomes of them."""
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from paper_steps import states, three_steps

import run
from data import backbones
from experiments import compare, paper, sweep
from experiments.paper import Clock, PaperOptions, make_paper, plan
from experiments.steps import CHOSEN, RUN, Step, steps
from machine import signals
from machine.errors import UserError

DATA = Path("../shared/data")
PLANS = [("quick", None), ("full", DATA), ("full", None)]


@pytest.mark.parametrize("profile, data", PLANS)
def test_every_step_is_a_command_that_its_program_takes(profile, data, monkeypatch):
    parsed = []
    monkeypatch.setattr(run, "_call", lambda args: parsed.append(args))
    declared = steps(profile, "12345", 3, data, Path("out"))
    assert len({step.name for step in declared}) == len(declared) > 7
    for i, step in enumerate(declared):
        program, *words = ["4e-4" if word == CHOSEN else word for word in step.words]
        assert {*step.needs, *step.after} <= {before.name for before in declared[:i]}
        assert step.minutes > 0 and any(step.done.startswith(f"{word.removeprefix('out/')}") for word in words
                                        if word.startswith("out/"))
        # A sweep removes the weights of its lesser trials, so that their checksums no longer hold.
        assert words[0] != "sweep" or not Path(step.name, "trial-00000").match(step.runs or f"{step.name}/*")
        if program == RUN:
            assert toy.main(*words) is None, step
            assert words[0] != "compare" or compare.entries(parsed[-1])
            assert words[0] != "sweep" or sweep.search(parsed[-1])
        else:
            source = (compare.RUN.parent / program).read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("profile, data", PLANS)
def test_lora_and_its_reference_have_the_same_budget(profile, data):
    declared = {step.name: step.words for step in steps(profile, "12345", 3, data, Path("out"))}

    def of(step: str, option: str) -> str:
        return declared[step][declared[step].index(option) + 1]
    for option in ("--model", "--lr-grid", "--seeds", "--epochs"):
        assert of("grid", option) == of("peft", option)
    assert of("lora", "--epochs") == of("grid", "--epochs") and of("lora", "--lr") == CHOSEN


# ---------------------------------------------------------------- what becomes of the steps

@pytest.fixture
def three(tmp_path, monkeypatch):
    return three_steps(tmp_path, monkeypatch)


def test_a_step_that_is_done_is_not_run_again(three):
    options, _, ran = three
    assert "about 1 min" in plan(options)
    assert make_paper(options)[1] == [] and make_paper(options)[1] == []
    assert ran == ["one", "two", "three"] and states(options) == ["done"] * 3
    assert plan(options).count("(done)") == 3


def test_a_step_that_fails_is_named_with_its_log_and_the_others_go_on(three):
    options, fate, ran = three
    fate["two"] = 2
    failures = make_paper(options)[1]
    assert ran == ["one", "two"] and states(options) == ["done", "failed", "failed"]
    assert failures == [f"step two failed: exit status 2: two says so; see {options.out / 'steps' / 'two.log'}",
                        "step three failed: it needs the step two, which is not done"]
    fate.clear()
    assert make_paper(options)[1] == []
    assert ran == ["one", "two", "two", "three"] and states(options) == ["done"] * 3


def test_a_step_that_left_nothing_failed_whatever_its_exit_status(three, monkeypatch):
    options, *_ = three
    monkeypatch.setattr(compare, "run_child", lambda words, log, **_: log.write_text("nothing\n") and 0)
    assert "exit status 0: nothing" in make_paper(options)[1][0]


def test_an_interrupted_step_goes_on_and_its_time_adds_up(three):
    options, fate, ran = three
    fate["two"] = "interrupt"
    with pytest.raises(signals.Interrupted):
        make_paper(options)
    state = options.out / "steps" / "two.json"
    before = json.loads(state.read_text())
    assert before["status"] == "begun" and before["seconds"] >= 0
    state.write_text(json.dumps({**before, "seconds": 1000.0}))
    fate.clear()
    assert make_paper(options)[1] == [] and ran == ["one", "two", "two", "three"]
    assert 1000 < json.loads(state.read_text())["seconds"] < 1100


def test_a_damaged_run_is_named(three):
    options, *_ = three
    make_paper(options)
    (options.out / "one" / "run" / "weights").write_text("2")
    assert "one/run/weights: damaged or changed" in make_paper(options)[1][0]


def test_a_step_with_another_command_or_without_its_result_is_run(three, monkeypatch):
    options, _, ran = three
    make_paper(options)
    shutil.rmtree(options.out / "one")
    declared = paper.steps()
    monkeypatch.setattr(paper, "steps", lambda *_: [*declared[:2], Step("three", 1, [RUN, "three", "--x"],
                                                                      "three/result.json", ("two",))])
    make_paper(options)
    assert ran == ["one", "two", "three", "one", "three"]


def test_another_number_of_seeds_is_refused_and_overwrite_begins_anew(three):
    options, _, ran = three
    make_paper(options)
    five = replace(options, seeds=5)
    with pytest.raises(UserError, match="began with another --seeds: 3, now 5"):
        make_paper(five)
    make_paper(replace(five, overwrite=True))
    assert ran == ["one", "two", "three"] * 2


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, but for the paper's own bookkeeping of this start."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()
            and path.name not in ("config.json", "paper.json", ".lock")}


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_overwriting_one_step_leaves_the_others_and_what_else_lies_there(three, name):
    options, _, ran = three
    make_paper(options)
    (options.out / "notes.txt").write_text("mine")
    before, config = contents(options.out), (options.out / "config.json").read_bytes()
    (options.out / name / "left over").write_text("of the step")
    assert make_paper(replace(options, only=(name,), overwrite=True))[1] == [] and ran == ["one", "two", "three", name]
    after = contents(options.out)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert changed <= {f"steps/{name}.json"}  # its seconds
    assert (options.out / "config.json").read_bytes() == config and states(options) == ["done"] * 3


def test_overwriting_one_step_of_another_paper_is_refused(three):
    """The other steps would be of other seeds."""
    options, *_ = three
    make_paper(options)
    before = contents(options.out)
    with pytest.raises(UserError, match="began with another --seeds: 3, now 5"):
        make_paper(replace(options, seeds=5, only=("two",), overwrite=True))
    assert contents(options.out) == before


@pytest.mark.parametrize("more", [{}, {"only": ("two",)}])
def test_no_run_removes_nothing(three, more):
    options, _, ran = three
    make_paper(options)
    before = contents(options.out)
    assert make_paper(replace(options, no_run=True, overwrite=True, **more))[1] == []
    assert contents(options.out) == before and ran == ["one", "two", "three"] and states(options) == ["done"] * 3


@pytest.mark.parametrize("files", [
    {"notes.txt": "mine"}, {"one/thesis.tex": "mine", "steps/one.json": "{}"}, {"config.json": "{}"},
    {"config.json": json.dumps({"options": {"sr": "12345", "model": "tiny"}}), "one/adapter.safetensors": "mine"},
    {"config.json": json.dumps({"model_type": "gpt2"})}, {"config.json/x": "a folder of that name"}])
@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"overwrite": True, "only": ("one",)}, {"no_run": True}])
def test_a_folder_that_no_paper_made_is_refused_and_left_as_it_is(three, files, more):
    options, _, ran = three
    for name, text in files.items():
        (options.out / name).parent.mkdir(parents=True, exist_ok=True)
        (options.out / name).write_text(text)
    before = {path: path.is_file() and path.read_text() for path in options.out.rglob("*")}
    with pytest.raises(UserError, match=f"--out {options.out}: neither empty nor a paper's folder"):
        make_paper(replace(options, **more))
    assert {path: path.is_file() and path.read_text() for path in options.out.rglob("*")} == before and ran == []


def test_an_empty_folder_or_one_with_a_lock_alone_is_taken(three):
    options, *_ = three
    options.out.mkdir()
    (options.out / ".lock").write_text("")
    assert make_paper(options)[1] == []


@pytest.mark.parametrize("profile, data", PLANS)
def test_each_declared_step_removes_its_own_results_and_no_other_step_s(profile, data, tmp_path):
    """Also of steps that share a folder, as LoRA and the students do, and of runs that are links."""
    def make(step: Step) -> set[Path]:
        made = {tmp_path / step.done, tmp_path / "steps" / f"{step.name}.json", tmp_path / "steps" / f"{step.name}.log"}
        if step.runs:
            made.add(tmp_path / step.runs.replace("*", "12345") / "summary.json")
        if step.name == "grid":
            made.add(tmp_path / "grid" / "lora-12346" / "summary.json")
        for path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.name)
        return made
    options = PaperOptions("12345", profile, 3, data, tmp_path)
    declared = options.steps
    made = {step.name: make(step) for step in declared}
    (tmp_path / "cola" / "LoRA-12346").symlink_to("../grid/lora-12346", target_is_directory=True)
    (tmp_path / "config.json").write_text("{}")
    for step in declared:
        paper.remove_step(step, options)
        assert not any(path.exists() for path in made[step.name]), step.name
        assert all(path.exists() for other in declared if other is not step for path in made[other.name]), step.name
        assert (tmp_path / "config.json").exists()
        if step.name == "lora":
            assert not (tmp_path / "cola" / "LoRA-12346").is_symlink()
            assert (tmp_path / "grid" / "lora-12346" / "summary.json").read_text() == "grid"
        make(step)


def test_only_runs_the_named_steps(three):
    options, _, ran = three
    make_paper(replace(options, only=("two",)))
    assert ran == ["two"] and states(options) == ["not run", "done", "not run"]
    with pytest.raises(UserError, match="--only four: no such step; expected some of one,two,three"):
        plan(replace(options, only=("four",)))


def test_a_study_runs_only_when_it_is_named():
    options = PaperOptions("12345", "full", 3, DATA, Path("out"))
    usual = {step.name for step in options.wanted}
    assert "distil" in usual and not any(name.startswith(("variants", "losses")) for name in usual)
    named = [step.name for step in replace(options, only=("variants", "losses-dkd")).wanted]
    assert named == ["variants", "variants-default", "variants-cola", "variants-default-cola", "class-weights", "losses-dkd"]
    words = [step.words for step in options.steps if step.name in ("variants", "variants-cola")]
    assert len({one[one.index("--lr-grid") + 1] for one in words}) == 1


def test_the_time_left_scales_with_the_steps_that_are_done():
    a, b, c = [Step(name, minutes, [], "") for name, minutes in (("a", 2), ("b", 4), ("c", 10))]
    clock = Clock([a, b, c])
    assert clock.minutes() == pytest.approx(16)
    clock.done(a, 60.0)  # half of what was declared
    assert clock.minutes() == pytest.approx(7)
    clock.done(b, None)  # a failed step changes no estimate
    assert clock.minutes() == pytest.approx(5)


def test_the_time_left_is_shared_among_the_places_but_for_the_longest_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(paper.time, "monotonic", lambda: now)
    a, b, c = [Step(name, minutes, [], "") for name, minutes in (("a", 5), ("b", 6), ("c", 7))]
    clock = Clock([a, b, c], jobs=2)
    assert clock.minutes() == 9
    clock.begin(a)
    now = 240.0
    assert clock.minutes() == 7 and str(clock) == "about 7 min left"  # 1 + 6 + 7 for two, but c alone takes 7


def test_a_folder_without_the_data_sets_is_told(tmp_path):
    (tmp_path / "cola").mkdir()
    with pytest.raises(UserError, match="has no folder rotten_tomatoes, movie_reviews, buzzer, blimp"):
        make_paper(PaperOptions("12345", "full", 3, tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_the_hub_nothing_begins(tmp_path, monkeypatch):
    def gone(name):
        raise UserError(f"--model {name}: not cached")
    monkeypatch.setattr(backbones, "load_config", gone)
    with pytest.raises(UserError, match="--model gpt2: not cached"):
        make_paper(PaperOptions("12345", "full", 3, None, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_runs_of_the_chosen_rate_are_linked(tmp_path):
    grid = tmp_path / "grid"
    (grid / "lora-lr0.0004-12345").mkdir(parents=True)
    (grid / "compare.json").write_text(json.dumps({"entries": [{"learning_rate": 4e-4, "seeds": ["12345"]}]}))
    assert paper.link_runs(PaperOptions("12345", "full", 1, None, tmp_path)) == "0.0004"
    assert (tmp_path / "cola" / "LoRA-12345").resolve() == (grid / "lora-lr0.0004-12345").resolve()


@pytest.mark.parametrize("words, said", [
    (["--only", "nothing"], "--only nothing: no such step"), (["--profile", "ful"], "--profile"),
    (["--seeds", "0"], "--seeds"), (["--profile", "full", "--data-root", "no/such"], "has no folder cola")])
def test_bad_input_is_one_line(words, said, tmp_path, capsys):
    assert toy.main("paper", "12345", "--out", tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- several at a time

@pytest.fixture
def lanes(tmp_path, monkeypatch):
    """Makes a paper of steps, given as name -> (needs, after), whose children do what `act(name, tick)` says."""
    def make(declared, act, jobs=2):
        out = tmp_path / "paper"
        made = [Step(name, 1, [RUN, name], f"{name}/done", needs, after) for name, (needs, after) in declared.items()]
        monkeypatch.setattr(paper, "steps", lambda *_: made)
        monkeypatch.setattr(paper.build, "build_paper", lambda folder, report, author="": report / "main.pdf")
        monkeypatch.setattr(paper.build, "check_latex", lambda: None)
        seen = []

        def child(words, log, threads, tick, **_):
            seen.append(threads)
            log.write_text("said\n")
            act(words[0], tick)
            (out / words[0]).mkdir()
            (out / words[0] / "done").write_text("")
            return 0
        monkeypatch.setattr(compare, "run_child", child)
        return PaperOptions("12345", "quick", 3, None, out, jobs=jobs), seen
    return make


def test_steps_run_at_a_time_each_with_its_part_of_the_threads(lanes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    meeting = threading.Barrier(2)
    options, threads = lanes(dict.fromkeys("abcd", ((), ())), lambda name, tick: meeting.wait(30))
    assert make_paper(options)[1] == [] and states(options) == ["done"] * 4  # alone, one would wait for ever
    assert threads == [3] * 4


@pytest.mark.parametrize("kind, cores, expected", [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", 16, 3), ("cuda", 16, 1)])
def test_as_many_at_a_time_as_cores_but_no_more_than_memory_bears(kind, cores, expected, monkeypatch):
    monkeypatch.setattr(paper, "device", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert paper.jobs_here() == expected


def test_a_step_waits_for_what_it_needs_and_for_what_it_comes_after(lanes):
    events, beside = [], threading.Barrier(2)

    def act(name, tick):
        events.append(f"{name} begins")
        if name in "ad":  # which wait for nothing, and not for each other
            beside.wait(30)
        if name == "a":
            time.sleep(0.3)  # in which a step that should wait would begin
        events.append(f"{name} ends")
    options, _ = lanes({"a": ((), ()), "b": (("a",), ()), "c": ((), ("a",)), "d": ((), ())}, act, jobs=3)
    assert make_paper(options)[1] == []
    assert events.index("d begins") < events.index("a ends") < min(events.index("b begins"), events.index("c begins"))


def test_a_step_that_others_come_after_may_fail_or_be_left_out(lanes):
    def act(name, tick):
        if name == "a":
            raise UserError("no")
    options, _ = lanes({"a": ((), ()), "b": ((), ("a",))}, act)
    assert make_paper(replace(options, only=("b",)))[1] == [] and states(options) == ["not run", "done"]
    assert make_paper(options)[1] == ["step a failed: no"] and states(options) == ["failed", "done"]


def test_an_interruption_stops_every_step_at_work_and_begins_no_other(lanes):
    meeting, asked = threading.Barrier(2), []

    def act(name, tick):
        meeting.wait(30)
        if name == "a":
            raise signals.Interrupted(15)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3000):
                time.sleep(0.01)
                tick()
        asked.append(name)
        raise KeyboardInterrupt
    options, threads = lanes(dict.fromkeys("abc", ((), ())), act)
    with pytest.raises(signals.Interrupted):
        make_paper(options)
    assert asked == ["b"] and len(threads) == 2
    assert [json.loads((options.out / "steps" / f"{name}.json").read_text())["status"] for name in "ab"] == ["begun"] * 2
