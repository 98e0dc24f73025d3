"""report_utils: runs made up here, written as the contract has them, then drawn, tabled, built and zipped."""

import json
import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

import report_utils
from report_utils import ReportError

REPORT = Path(report_utils.__file__).parent / "report"
SR = "12345"
COLA = ("in_domain", "out_of_domain", "all")
HASH = "0123456789abcdef" * 4


def validation(mcc: float, splits: tuple[str, ...] = COLA) -> dict:
    return {split: {"n": 527, "loss": 0.5 + i / 10, "accuracy": 0.8065 - i / 20, "mcc": mcc - i / 10,
                    "majority_accuracy": 0.6926 - i / 100} for i, split in enumerate(splits)}


def epoch(number: int, splits: tuple[str, ...] = COLA, lift: float = 0.0, **more) -> dict:
    train = {"loss": 0.9 / number, "cross_entropy": 0.6 / number, "accuracy": 0.7 + 0.02 * number, "mcc": 0.1 * number}
    return {"epoch": number, "train": train, "validation": validation(lift + 0.1 * number - 0.01 * number**2, splits),
            "learning_rate": 2e-4 / number, "seconds": 12.5, "tokens": 98765, **more}


def write_run(folder: Path, summary: dict, metrics: list[dict], **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "config.json").write_text(json.dumps({
        "command": f"python run.py {summary['mode']} {SR} --data ../shared/data/cola_v1.1 --rank 8",
        "options": {"rank": 8, "lr": 2e-05, "targets": ["q", "k", "v", "o", "mlp"], "layers": None, "rslora": False},
        "versions": {"python": "3.11.7", "torch": "2.5.1+cpu"}, "git_commit": None,
        "data_files": {"../shared/data/cola_v1.1/in_domain_train.tsv": HASH}, **config}))
    return folder


TRAIN = {"epochs": 4, "steps": 1072, "seconds": 1234.5678, "tokens": 345678, "tokens_per_second": 280.04,
         "padding_percent": 1.257, "peak_memory_bytes": 1234567890}


def lora_run(runs: Path, epochs: int = 4, splits: tuple[str, ...] = COLA, **changes) -> Path:
    summary = {"mode": "LoRA", "sr": SR, "model": "gpt2", "task": "cola", "method": "lora",
               "best_epoch": min(3, epochs),
               "parameters": {"total": 125620992, "trainable": 1181184, "reduction_percent": 99.0597},
               "validation": validation(0.5123, splits), "last_epoch": epochs, "train": TRAIN,
               "last_validation": validation(0.4876, splits),
               "sanity": {"prompt": "The cat", "text": "The cat sat_on 100% of\nthe mat", "equal_to_base": True}}
    return write_run(runs / f"LoRA-{SR}", summary | changes, [epoch(n, splits) for n in range(1, epochs + 1)])


def distil_run(runs: Path, epochs: int = 4) -> Path:
    def student(mcc: float) -> dict:
        return {"parameters": 5000000, "validation": validation(mcc), "best_epoch": 2, "last_epoch": epochs,
                "last_validation": validation(mcc - 0.02), "sentences_per_second": 2100.0}

    summary = {"mode": "distil", "sr": SR, "model": "gpt2", "task": "cola", "train": TRAIN,
               "teacher": {"run": f"runs/LoRA-{SR}", "parameters": 125000000, "validation": validation(0.5123),
                           "sentences_per_second": 70.0},
               "student": student(0.3217), "scratch": student(0.2789),
               "distillation": {"temperature": 4.0, "alpha": 0.9, "loss": 0.4321}}
    metrics = [epoch(n, lift=lift, phase=phase) for phase, lift in (("student", 0.1), ("scratch", 0.0))
               for n in range(1, epochs + 1)]
    return write_run(runs / f"distil-{SR}", summary, metrics, architecture={"cell": "lstm", "hidden_size": 128})


def spread(mean: float, sd: float | None = 0.01) -> dict:
    return {"mean": mean, "sd": sd, "values": [mean - 0.01, mean + 0.01] if sd else [mean]}


def study(runs: Path, mode: str, content: dict) -> Path:
    """A comparison or a sweep."""
    path = runs / f"{mode}-{SR}" / f"{mode}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"mode": mode, "sr": SR, "model": "gpt2", "task": "cola", "options": {},
                                "command": f"python run.py {mode} {SR}"} | content))
    return path


def entry_row(name: str, trainable: int, accuracy: float, rate: float | None = 4e-4, splits=COLA, sd=0.01, **more) -> dict:
    scores = {split: {"accuracy": spread(accuracy - i / 20, sd), "mcc": spread(accuracy - 0.6, sd)}
              for i, split in enumerate(splits)}
    return {"entry": name, "tried": [{"learning_rate": rate, "mcc": 0.2}], "learning_rate": rate,
            "seeds": ["12345", "12346"],
            "parameters": {"total": 1000000, "trainable": trainable, "trainable_percent": trainable / 10000},
            "best": scores, "last": scores, "best_epoch": spread(2.5), "last_epoch": spread(3), "seconds_per_epoch": 12.345,
            "majority_accuracy": {split: 0.6926 - i / 100 for i, split in enumerate(splits)},
            "peak_memory_bytes": 600 * 2 ** 20, "size_bytes": 4567890} | more


def comparison(runs: Path, splits=COLA, **changes) -> Path:
    rows = [entry_row("none", 0, 0.3, None, splits), entry_row("lora", 123456, 0.8123, splits=splits),
            entry_row("r_2", 1234, 0.55, splits=splits), {"entry": "full", "tried": [{"learning_rate": 1, "mcc": None}],
                                                          "learning_rate": None, "seeds": []}]
    return study(runs, "compare", {"seeds": ["12345", "12346"], "entries": rows, "selection": {
        "split": splits[0], "splits": list(splits)}} | changes)


def search(runs: Path, **changes) -> Path:
    trials = [{"number": i, "state": "complete" if i < 3 else "pruned",
               "params": {"targets": targets, "lr": 0.001 * (i + 1)},
               "score": 0.5 - i / 10 if i < 4 else -0.1, "best_epoch": 2, "same_as": None, "diverged": None,
               "parameters": {"total": 1000000, "trainable": 1000 * (i + 1)},
               "validation": {"in_domain": validation(0.5)["in_domain"]} if i < 3 else None}
              for i, targets in enumerate(["q+v", "all", "q+v", "all", "all"])]
    means = {"targets": [{"value": "q+v", "n": 2, "mean": 0.4, "sd": 0.14},
                         {"value": "all", "n": 1, "mean": 0.4, "sd": None}]}
    return study(runs, "sweep", {"search": {"targets": ["q+v", "all"], "lr": {"low": 0.001, "high": 0.01, "log": True}},
                                 "selection": {"split": "in_domain"}, "trials": trials, "best": 0, "means": means,
                                 "importance": {"targets": 0.25, "lr": 0.75}} | changes)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """A folder with both runs, a comparison, a sweep, their plots and report/results/; not to be changed."""
    root = tmp_path_factory.mktemp("both")
    lora_run(root / "runs"), distil_run(root / "runs"), comparison(root / "runs"), search(root / "runs")
    written = report_utils.write_report_results(SR, root / "runs", root / "plots", root / "report")
    assert sorted(written) == sorted((root / "report" / "results").iterdir())
    return root


def legend(run: Path, quantity: str) -> dict[str, object]:
    """Every labelled line of the figure, by label."""
    figure = report_utils.curves(report_utils.read_metrics(run / "metrics.jsonl"),
                                 report_utils.read_json(run / "summary.json"), quantity)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    return {label: lines[label] for label in shown}


def numbers(results: Path) -> dict[str, str]:
    text = (results / "numbers.tex").read_text()
    return dict(re.findall(r"^\\setresult\{([^}]*)\}\{(.*)\}$", text, flags=re.MULTILINE))


# ---------------------------------------------------------------- curves

def test_plots_are_written_at_200_dpi_and_not_blank(tmp_path):
    written = report_utils.plot_run(lora_run(tmp_path / "runs"), tmp_path / "plots")
    assert {path.name for path in written} == {f"LoRA-{SR}_{q}.{kind}" for q in ("loss", "accuracy", "mcc")
                                               for kind in ("png", "pdf")}
    assert sorted(written) == sorted((tmp_path / "plots").iterdir()), "nothing temporary may stay"
    for path in written:
        if path.suffix == ".png":
            content = path.read_bytes()
            at = content.index(b"pHYs") + 4
            assert struct.unpack(">II", content[at:at + 8]) == (7874, 7874)  # pixels a metre: 200 dpi
            assert imread(path)[..., :3].std() > 0.05
        else:
            assert path.read_bytes().startswith(b"%PDF")


def test_same_run_gives_the_same_bytes(tmp_path):
    run = lora_run(tmp_path / "runs", epochs=2)
    one, two = (report_utils.plot_run(run, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_curves_show_both_splits_the_best_epoch_and_the_majority_class(tmp_path):
    run = lora_run(tmp_path)
    lines = legend(run, "accuracy")
    assert list(lines["validation, in-domain"].get_ydata()) == pytest.approx([80.65] * 4)
    assert list(lines["validation, out-of-domain"].get_ydata()) == pytest.approx([75.65] * 4)
    assert lines["validation, in-domain"].get_linestyle() != lines["validation, out-of-domain"].get_linestyle()
    assert list(lines["best epoch 3 (80.7 %)"].get_xdata()) == [3]
    majority = lines["majority class, in-domain (69.3 %)"]
    assert majority.get_linestyle() == "--" and set(majority.get_ydata()) == {69.26}
    assert list(legend(run, "mcc")["best epoch 3 (0.210)"].get_ydata()) == pytest.approx([0.21])


def test_axes_and_title_are_named(tmp_path):
    run = lora_run(tmp_path, model="a$b$_c")
    for quantity, unit in (("loss", "nats"), ("accuracy", "%"), ("mcc", "Matthews")):
        axes = report_utils.curves(report_utils.read_metrics(run / "metrics.jsonl"),
                                   report_utils.read_json(run / "summary.json"), quantity).axes[0]
        assert axes.get_xlabel() == "epoch" and unit in axes.get_ylabel()
        assert axes.get_title() == rf"a\$b\$_c, LoRA, on cola (SR {SR})"
        assert all(tick == int(tick) for tick in axes.get_xticks())


def test_single_epoch_and_a_single_split_of_another_name(tmp_path):
    run = lora_run(tmp_path / "runs", epochs=1, splits=("validation",))
    assert len(report_utils.plot_run(run, tmp_path / "plots")) == 6
    lines = legend(run, "mcc")
    assert lines["validation"].get_marker() == "o" and "best epoch 1 (0.090)" in lines
    axes = lines["validation"].axes
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


def test_distillation_draws_both_students_and_the_teacher_in_one_figure(tmp_path):
    run = distil_run(tmp_path)
    lines = legend(run, "mcc")
    for name in ("student, KD", "student, no teacher"):
        for curve in ("train", "validation, in-domain", "validation, out-of-domain"):
            assert f"{name}: {curve}" in lines
    assert list(lines["student, KD: validation, in-domain"].get_ydata()) == pytest.approx([0.19, 0.26, 0.31, 0.34])
    control = lines["student, no teacher: validation, in-domain"].get_ydata()
    assert list(control) == pytest.approx([0.09, 0.16, 0.21, 0.24])
    assert set(lines["teacher, in-domain (0.512)"].get_ydata()) == {0.5123}
    # The loss is the cross-entropy (0.6 / epoch), not the objective (0.9 / epoch), for both.
    loss = legend(run, "loss")
    for name in ("student, KD", "student, no teacher"):
        assert list(loss[f"{name}: train"].get_ydata()) == pytest.approx([0.6, 0.3, 0.2, 0.15])
    assert "no KD term" in loss["student, KD: train"].axes.get_ylabel()


# ---------------------------------------------------------------- LaTeX

def unescaped(latex: str) -> str:
    """What `escape` wrote, read back; fails on any special character that stands bare."""
    back = {value: key for key, value in report_utils.LATEX.items()}
    tokens = "|".join(re.escape(value) for value in sorted(back, key=len, reverse=True))
    text = ""
    while latex:
        match = re.match(tokens, latex)
        broken = re.match(r"([-<>,])\{\}(?=\1)", latex)
        piece = match[0] if match else broken[0] if broken else latex[0]
        assert match or broken or piece not in "\\{}$&#_%~^", f"bare {piece!r} in {latex!r}"
        text += back[piece] if match else piece[0]
        latex = latex[len(piece):]
    return text


@given(st.text(alphabet=st.one_of(st.sampled_from("\\{}$&#_%~^[]*`'\"-<>,a "), st.characters(max_codepoint=0x2fff))))
def test_escape_leaves_no_special_character_bare(text):
    printable = re.sub("[^ -~\u00a1-\u00ff]", lambda match: f"[U+{ord(match[0]):04X}]", re.sub(r"\s", " ", text))
    assert unescaped(report_utils.escape(text)) == printable
    assert "--" not in report_utils.escape(text)


@given(st.text(alphabet="ab_/\\%{ -"))
def test_breakable_loses_nothing(text):
    assert unescaped(report_utils.breakable(text).replace(r"\allowbreak{}", "")) == text


def test_breakable_breaks_paths_and_hashes():
    assert report_utils.breakable("a/b " + "c" * 40) == rf"a/\allowbreak{{}}b {'c' * 32}\allowbreak{{}}{'c' * 8}"


@pytest.mark.parametrize(("key", "value", "text"), [
    ("total", 124439808, "124,439,808"), ("accuracy", 0.80654, "80.65"), ("mcc", -0.0123, "$-$0.012"),
    ("reduction_percent", 99.05178, "99.05"), ("mcc", float("nan"), "n/a"), ("loss", None, "n/a"),
    ("seconds", 12.3456, "12.35"), ("equal_to_base", True, "yes"), ("model", "a_b", r"a\_\allowbreak{}b"),
    ("alpha", 0.9, "0.9")])
def test_numbers_as_the_report_prints_them(key, value, text):
    assert report_utils.shown(key, value) == text


def test_results_hold_the_numbers_of_the_runs(both):
    results = both / "report" / "results"
    found = numbers(results)
    assert found["lora.parameters.total"] == "125,620,992" and found["lora.parameters.trainable"] == "1,181,184"
    assert found["lora.parameters.reduction_percent"] == "99.06" and found["lora.chosen.mcc"] == "0.512"
    assert found["lora.validation.out_of_domain.mcc"] == "0.412" and found["lora.chosen.accuracy"] == "80.65"
    assert found["distil.student.smaller"] == "25" and found["distil.student.faster"] == "30"
    assert found["distil.gain.mcc"] == "0.043" and found["lora.train.seconds"] == "1,235"
    comparison = (results / "distil_results.tex").read_text()
    assert r"majority class & -- & 69.26 & 0 & 68.26 & 0 & 67.26 & 0 \\" in comparison
    assert r"teacher & -- & 80.65 & 0.512 & 75.65 & 0.412 & 70.65 & 0.312 \\" in comparison
    assert r"student, KD & 2 (best) & 80.65 & 0.322 &" in comparison
    assert r"student, no teacher & 4 (last) & 80.65 & 0.259 &" in comparison
    epochs = (results / "lora_epochs.tex").read_text()
    assert r"1 & 2.0e$-$04 & 0.600 & 72.00 & 0.100 & 0.500 & 80.65 & 0.090 &" in epochs
    assert r"2.0e$-$04 & 0.900 & 0.600 &" in (results / "distil_epochs.tex").read_text()
    provenance = (results / "lora_provenance.tex").read_text().replace(r"\allowbreak{}", "")
    assert HASH in provenance and r"cola\_v1.1 -{}-rank 8" in provenance and "torch 2.5.1+cpu" in provenance
    assert r"\texttt{2e-05}" in (results / "lora_options.tex").read_text()
    assert r"student hidden\_" in (results / "distil_options.tex").read_text()
    for name in ("LoRA", "distil"):
        assert (results / f"{name}_mcc.pdf").read_bytes() == (both / "plots" / f"{name}-{SR}_mcc.pdf").read_bytes()


def test_every_number_of_the_report_comes_from_a_run(both):
    text = (REPORT / "main.tex").read_text().partition(r"\begin{document}")[2]
    asked = set(re.findall(r"\\result\{([^}#]*)\}", text))
    assert len(asked) > 30 and asked <= set(numbers(both / "report" / "results"))
    tables = set(re.findall(r"\\(?:resulttable|longresult|fullresult)\{(\w+)\}", text))
    assert tables == {*report_utils.TABLES, *(f"{mode}_results" for mode in report_utils.STUDIES)}


def test_a_missing_run_says_not_run_and_nothing_stale_stays(both, tmp_path):
    shutil.copytree(both / "report", tmp_path / "report")
    shutil.copytree(both / "runs" / f"LoRA-{SR}", tmp_path / "runs" / f"LoRA-{SR}")
    report_utils.write_report_results(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    results = tmp_path / "report" / "results"
    assert "not run" in (results / "distil_results.tex").read_text()
    assert "not run" not in (results / "lora_results.tex").read_text()
    assert not list(results.glob("distil_*.pdf")) and not any(key.startswith("distil") for key in numbers(results))
    assert not [path.name for path in results.iterdir() if path.name.startswith(report_utils.STUDIES)]


# ---------------------------------------------------------------- comparisons and sweeps

def test_a_comparisons_table_holds_its_numbers(both):
    table = (both / "report" / "results" / "compare_results.tex").read_text()
    assert "majority class &  &  &  &  & 69.3 & 0 & 68.3 & 0 &  &  &  \\\\" in table
    assert ("lora & 123,456 & 12.3 & 0.0004 & best (2.5) & 81.2 \u00b1 1.0 & 0.212 \u00b1 0.010 & 76.2 \u00b1 1.0 & "
            "0.212 \u00b1 0.010 & 12.3 & 600 & 4.57 \\\\") in table
    assert "none & 0 & 0 &  & untrained & 30.0 \u00b1 1.0 & $-$0.300 \u00b1 0.010" in table  # a minus, no hyphen
    assert r"r\_2 & 1,234" in table and "full &  &  &  & diverged &" in table
    text = report_utils.compare_text(report_utils.read_json(both / "runs" / f"compare-{SR}" / "compare.json"))
    assert "lora            123,456   12.3  0.0004  best (2.5)  81.2 \u00b1 1.0   0.212 \u00b1 0.010" in text


def test_a_comparison_with_one_seed_or_one_split_says_so(tmp_path):
    rows = [entry_row("lora", 100, 0.8, splits=("validation",), sd=None, seeds=["12345"])]
    path = comparison(tmp_path, ("validation",), entries=rows, seeds=["12345"])
    text = report_utils.compare_text(report_utils.read_json(path))
    assert "One seed (12345)." in text and "\u00b1" not in text.splitlines()[4]
    assert "The validation split chose the epoch by its MCC, and is the one reported" in text


def test_a_rate_at_the_edge_of_the_grid_is_told(tmp_path):
    tried = [{"learning_rate": rate, "mcc": 0.1} for rate in (1e-4, 4e-4, 1e-3)]
    rows = [entry_row("mid", 1, 0.8, tried=tried), entry_row("low", 1, 0.8, tried=tried, learning_rate=1e-4)]
    notes = report_utils.compare_notes(report_utils.read_json(comparison(tmp_path, entries=rows)))
    assert notes[-1] == "Chosen at the edge of the grid: low (0.0001); a wider grid may do better."


def test_a_comparisons_plot_has_points_error_bars_names_and_the_majority_class(both):
    figure = report_utils.compare_figure(report_utils.read_json(both / "runs" / f"compare-{SR}" / "compare.json"))
    axes = figure.axes[0]
    assert axes.get_xscale() == "symlog" and axes.get_xlabel() == "trained parameters"  # for `none` trains nothing
    points = axes.containers[0].lines[0]
    assert list(points.get_xdata()) == [0, 1234, 123456] and list(points.get_ydata()) == pytest.approx([30, 55, 81.23])
    bars = axes.containers[0].lines[2][0].get_segments()
    assert bars[2][:, 1] == pytest.approx([80.23, 82.23])
    assert {text.get_text() for text in axes.texts} == {"none", "r_2", "lora"}
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == pytest.approx([69.26, 68.26])
    assert "gpt2 on cola" in axes.get_title()


def test_a_sweeps_table_has_the_best_trials_first(both):
    table = (both / "report" / "results" / "sweep_results.tex").read_text().splitlines()
    assert table[2] == r"trial & MCC & acc. \% & trained & \% & epoch & targets & lr \\"
    assert table[4:7] == [r"0 & 0.500 & 80.7 & 1,000 & 0.1 & 2 & q+v & 0.001 \\",
                          r"1 & 0.400 & 80.7 & 2,000 & 0.2 & 2 & all & 0.002 \\",
                          r"2 & 0.300 & 80.7 & 3,000 & 0.3 & 2 & q+v & 0.003 \\"]
    notes = " ".join(report_utils.sweep_notes(report_utils.read_json(both / "runs" / f"sweep-{SR}" / "sweep.json")))
    assert "5 trials with one seed (12345): 3 complete, 2 pruned." in notes and "targets 0.25, lr 0.75" in notes


def test_a_sweeps_plot_has_every_trial_its_importances_and_the_means_by_role_set(both):
    figure = report_utils.sweep_figure(report_utils.read_json(both / "runs" / f"sweep-{SR}" / "sweep.json"))
    scatter, importance, means = figure.axes
    drawn = {tuple(point) for collection in scatter.collections for point in collection.get_offsets().tolist()}
    assert drawn == {(1000, 0.5), (2000, 0.4), (3000, 0.3), (4000, 0.2), (5000, -0.1)}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["targets q+v", "targets all"] and "best: trial 0 (0.500)" in names
    assert [bar.get_width() for bar in importance.patches] == [0.25, 0.75]
    assert [label.get_text() for label in means.get_yticklabels()] == ["q+v (n=2)", "all (n=1)"]


def test_a_sweep_without_choices_or_importance_has_one_panel(tmp_path):
    path = search(tmp_path, importance=None, means={})
    assert len(report_utils.sweep_figure(report_utils.read_json(path)).axes) == 1


@pytest.mark.parametrize("mode", report_utils.STUDIES)
def test_a_studys_plot_is_the_same_bytes_again(both, tmp_path, mode):
    path = both / "runs" / f"{mode}-{SR}" / f"{mode}.json"
    one, two = (report_utils.plot_study(path, tmp_path / name) for name in ("one", "two"))
    assert [p.name for p in one] == [f"{mode}-{SR}.png", f"{mode}-{SR}.pdf"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_study_in_which_nothing_succeeded_is_told_in_one_line(tmp_path):
    rows = [{"entry": "lora", "tried": [], "learning_rate": None, "seeds": []}]
    with pytest.raises(ReportError, match="compare.json: every run diverged"):
        report_utils.compare_text(report_utils.read_json(comparison(tmp_path, entries=rows)))
    with pytest.raises(ReportError, match="sweep.json: no trial has a score"):
        report_utils.plot_study(search(tmp_path, trials=[]), tmp_path)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize(("name", "content", "said"), [
    ("summary.json", "{", "not valid JSON"), ("summary.json", "[]", "must be a JSON object"),
    ("summary.json", "{}", "'validation' is missing"), ("summary.json", None, "No such file"),
    ("config.json", "{}", "'options' is missing"), ("config.json", '{"options": 3}', "must be an object, not 3"),
    ("metrics.jsonl", "", "no epoch"), ("metrics.jsonl", "{}", "line 1: 'validation' is missing"),
    ("metrics.jsonl", json.dumps(epoch(1)) + "\n{", "line 2: not valid JSON"),
    ("metrics.jsonl", json.dumps(epoch(1) | {"epoch": "one"}), "'epoch' must be a number, not \"one\""),
    ("metrics.jsonl", json.dumps(epoch(9)), "'best_epoch' is 3"), ("summary.json", b"\xff", "not valid JSON")])
def test_a_malformed_file_is_named_in_one_line_and_nothing_is_written(tmp_path, name, content, said):
    run = lora_run(tmp_path / "runs")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportError) as error:
        report_utils.write_report_results(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    message = str(error.value)
    assert str(run) in message and said in message and "\n" not in message
    assert not (tmp_path / "report").exists()


def test_building_without_a_run_names_the_commands(tmp_path):
    with pytest.raises(ReportError, match=f"python run.py LoRA {SR}.*python run.py distil {SR}"):
        report_utils.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")


def test_building_without_latexmk_names_the_packages(tmp_path, monkeypatch):
    lora_run(tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReportError, match="latexmk texlive-latex-recommended texlive-latex-extra "
                                          "texlive-fonts-recommended lmodern"):
        report_utils.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")


# ---------------------------------------------------------------- the PDF

needs_latex = pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")


@needs_latex
def test_the_report_builds_before_any_run(tmp_path):
    shutil.copy(REPORT / "main.tex", tmp_path)
    done = subprocess.run(["latexmk", "-pdf", "-cd", "-interaction=nonstopmode", "-halt-on-error",
                           tmp_path / "main.tex"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "main.pdf").stat().st_size > 50_000
    assert "undefined" not in (tmp_path / "main.log").read_text(errors="replace")


@needs_latex
def test_the_report_builds_from_runs_with_hostile_strings(tmp_path):
    every = "".join(map(chr, [*range(32, 127), *range(0xa1, 0x100)])) + "\n\u4e2d\U0001f600 -- << ?` [x] \\end{x}"
    lora_run(tmp_path / "runs", model=every[:95], sanity={"prompt": "*", "text": every, "equal_to_base": True})
    distil_run(tmp_path / "runs")
    comparison(tmp_path / "runs", model=every[:95]), search(tmp_path / "runs", task=every[:95])
    report = tmp_path / "a folder" / "report"
    report.mkdir(parents=True)
    shutil.copy(REPORT / "main.tex", report)
    pdf = report_utils.build_report(SR, tmp_path / "runs", tmp_path / "plots", report)
    assert pdf == report / f"Report_{SR}.pdf" and pdf.stat().st_size > 100_000
    assert {path.name for path in report.iterdir()} == {"main.tex", "results", pdf.name}


@needs_latex
def test_a_latex_error_is_told_in_one_line(tmp_path):
    lora_run(tmp_path / "runs", epochs=1, best_epoch=1)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "main.tex").write_text("\\documentclass{article}\\begin{document}\\nosuch\\end{document}")
    with pytest.raises(ReportError, match=r"! Undefined control sequence\.") as error:
        report_utils.build_report(SR, tmp_path / "runs", tmp_path / "plots", tmp_path / "report")
    assert "\n" not in str(error.value) and (tmp_path / "report" / f"Report_{SR}.log").exists()


# ---------------------------------------------------------------- the hand-in

@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with all that is to be handed in, and all that is not."""
    wanted = ["run.py", "model.py", "tests/test_model.py", "benchmarks/speed.py", "requirements.txt", "Makefile",
              "requirements-dev.txt", "README.md", "LICENSE", "pyproject.toml", ".ci/run", "report/main.tex",
              "report/results/LoRA_mcc.pdf", f"plots/LoRA-{SR}_mcc.png", f"plots/distil-{SR}_loss.pdf",
              f"report/Report_{SR}.pdf"]
    unwanted = ["data/cola.tsv", "train.csv", "runs/LoRA-12345/metrics.jsonl", "model.safetensors", ".venv/lib/x.py",
                "__pycache__/run.pyc", ".git/config", ".pytest_cache/x", ".ruff_cache/x", "tests/__pycache__/x.pyc",
                "tests/rows.tsv", "benchmarks/out.jsonl", "plots/LoRA-54321_mcc.png", "report/main.aux",
                "report/Report_54321.pdf", "old.zip"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "report" / "results" / "numbers.tex").write_text(f"\\setresult{{sr}}{{{SR}}}\n")
    (tmp_path / "wanted.list").write_text("\n".join([*wanted, "report/results/numbers.tex"]))
    return tmp_path


def test_submission_holds_code_plots_and_report_and_nothing_else(project):
    path = report_utils.make_submission(SR, "Ada", "Lovelace", project)
    assert path == project / f"Asst2_Ada_Lovelace_{SR}.zip"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None and archive.read(f"{path.stem}/run.py") == b"run.py"
    assert sorted(names) == sorted(f"{path.stem}/{name}" for name in (project / "wanted.list").read_text().split())
    assert not list(project.glob(".*.part"))


def test_submission_is_the_same_bytes_again(project):
    first = report_utils.make_submission(SR, "Ada", "Lovelace", project).read_bytes()
    os.utime(project / "run.py", (1, 1))
    assert report_utils.make_submission(SR, "Ada", "Lovelace", project).read_bytes() == first


@pytest.mark.parametrize(("first", "last"), [("", "L"), ("A", " "), ("../A", "L"), ("A", "b\\c"), ("A\n", "L")])
def test_submission_rejects_names_no_file_can_have(project, first, last):
    with pytest.raises(ReportError, match="name"):
        report_utils.make_submission(SR, first, last, project)
    assert not list(project.glob("Asst2*"))


def test_submission_needs_the_report_of_its_own_run(project):
    (project / "report" / "results" / "numbers.tex").write_text("\\setresult{sr}{54321}\n")
    with pytest.raises(ReportError, match=f"python run.py report {SR}"):
        report_utils.make_submission(SR, "Ada", "Lovelace", project)
    (project / "report" / f"Report_{SR}.pdf").unlink()
    with pytest.raises(ReportError, match=f"not found; first `python run.py report {SR}`"):
        report_utils.make_submission(SR, "Ada", "Lovelace", project)
    with pytest.raises(ReportError, match="five digits"):
        report_utils.make_submission("*", "Ada", "Lovelace", project)
