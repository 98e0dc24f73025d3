"""figures: runs, comparisons and sweeps made up (made_up.py), then drawn."""

import json
import struct
from pathlib import Path

import pytest
import toy
from made_up import SR, comparison, distil_run, entry_row, epoch, lora_run, search, task_runs
from matplotlib.image import imread
from matplotlib.text import Text

from machine.signals import Interrupted
from report import curves, figures
from report.records import ReportError, read_json, read_metrics


def legend(run: Path, quantity: str) -> dict[str, object]:
    """Every labelled line of the figure, by label."""
    figure = figures.curves(read_metrics(run / "metrics.jsonl"), read_json(run / "summary.json"), quantity)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    return {label: lines[label] for label in shown}


# ---------------------------------------------------------------- runs

def test_plots_are_written_at_200_dpi_and_not_blank(tmp_path):
    written = figures.plot_run(lora_run(tmp_path / "runs"), tmp_path / "plots")
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
    one, two = (figures.plot_run(run, tmp_path / name) for name in ("one", "two"))
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
        axes = figures.curves(read_metrics(run / "metrics.jsonl"), read_json(run / "summary.json"), quantity).axes[0]
        assert axes.get_xlabel() == "epoch" and unit in axes.get_ylabel()
        assert axes.get_title() == rf"a\$b\$_c, LoRA, on cola (SR {SR})"
        assert all(tick == int(tick) for tick in axes.get_xticks())


HOSTILE = r"a$x^{\frac$b_c\$"  # mathematics that does not parse


def by_class(name: str, split: str) -> dict:
    per_class = {cls: {"n": 5, "precision": 0.5, "recall": 0.5, "f1": 0.5} for cls in (name, f"{name}$")}
    return {split: {"confusion": [[3, 2], [1, 4]], "per_class": per_class}}


def test_dollar_signs_in_names_are_no_mathematics(tmp_path):
    """Each text of every figure, with hostile names of model, task, splits, classes, entries and options."""
    splits = (HOSTILE, f"{HOSTILE}2")
    run = lora_run(tmp_path, splits=splits, model=HOSTILE, task=HOSTILE, by_class=by_class(HOSTILE, HOSTILE))
    summary, metrics = read_json(run / "summary.json"), read_metrics(run / "metrics.jsonl")
    rows = [entry_row(HOSTILE, 100, 0.8, splits=splits), entry_row(f"{HOSTILE}2", 200, 0.8, splits=splits)]
    chosen = {"split": HOSTILE, "splits": list(splits)}
    study = comparison(tmp_path, splits, entries=rows, selection=chosen, model=HOSTILE)
    means = {"targets": [{"value": HOSTILE, "n": 2, "mean": 0.4, "sd": 0.14}]}
    swept = search(tmp_path, means=means, search={"targets": [HOSTILE]}, selection={"split": HOSTILE}, task=HOSTILE)
    drawn = [figures.curves(metrics, summary, quantity) for quantity in figures.quantities("single-label")]
    drawn += [figures.confusion(summary), figures.compare_figure(read_json(study)), figures.sweep_figure(read_json(swept))]
    for figure in drawn:
        figure.canvas.draw()
        hostile = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert hostile
        for text in hostile:
            assert text._preprocess_math(text.get_text())[1] is False
    confusion = drawn[3].axes[0]
    shown = confusion.get_xticklabels()[0]
    assert shown._preprocess_math(shown.get_text())[0] == HOSTILE


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("\nParseException:\n  at 3"),
                                   MemoryError(), RuntimeError("")])
def test_a_plot_that_fails_is_a_warning_and_no_end(error):
    def fails():
        raise error

    with pytest.warns(UserWarning, match="^no plots: .+; the results are complete$") as caught:
        assert figures.draw_finished(fails) == []
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_run_whose_plots_fail_is_finished_and_resume_draws_them(tmp_path, monkeypatch, capsys):
    toy.write_model(tmp_path / "model"), toy.write_cola(tmp_path / "cola")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "save_figure", full)
        assert toy.lora(tmp_path, tmp_path / "run", "--plots", tmp_path / "plots") == 0
    assert "No space left on device; the results are complete" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").exists() and not list((tmp_path / "plots").iterdir())
    assert toy.lora(tmp_path, tmp_path / "run", "--resume", "--plots", tmp_path / "plots") == 0
    assert len(list((tmp_path / "plots").iterdir())) == 8


def test_a_malformed_file_and_a_signal_are_no_failures_of_a_plot(tmp_path):
    with pytest.raises(ReportError, match=r"summary\.json"):
        figures.draw_finished(lambda: figures.plot_run(tmp_path, tmp_path))

    def interrupted():
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        figures.draw_finished(interrupted)


def test_single_epoch_and_a_single_split_of_another_name(tmp_path):
    run = lora_run(tmp_path / "runs", epochs=1, splits=("validation",))
    assert len(figures.plot_run(run, tmp_path / "plots")) == 6
    lines = legend(run, "mcc")
    assert lines["validation"].get_marker() == "o" and "best epoch 1 (0.090)" in lines
    axes = lines["validation"].axes
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


def test_distillation_draws_both_students_and_the_teacher_in_one_figure(tmp_path):
    run = distil_run(tmp_path)
    lines = legend(run, "mcc")
    for name in ("student with KD", "baseline"):
        for curve in ("train", "validation, in-domain", "validation, out-of-domain"):
            assert f"{name}: {curve}" in lines
    assert list(lines["student with KD: validation, in-domain"].get_ydata()) == pytest.approx([0.19, 0.26, 0.31, 0.34])
    baseline = lines["baseline: validation, in-domain"].get_ydata()
    assert list(baseline) == pytest.approx([0.09, 0.16, 0.21, 0.24])
    assert set(lines["teacher, in-domain (0.512)"].get_ydata()) == {0.5123}
    # The loss is the cross-entropy (0.6 / epoch), not the objective (0.9 / epoch), for both.
    loss = legend(run, "loss")
    for name in ("student with KD", "baseline"):
        assert list(loss[f"{name}: train"].get_ydata()) == pytest.approx([0.6, 0.3, 0.2, 0.15])
    assert "no KD term" in loss["student with KD: train"].axes.get_ylabel()


def test_all_stages_stand_on_one_axis_of_steps_with_every_split_of_both_students(tmp_path):
    run = task_runs(tmp_path, "binary")[1]
    figure = figures.curves(read_metrics(run / "metrics.jsonl"), read_json(run / "summary.json"), "mcc")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "optimiser steps" and {text.get_text() for text in axes.texts} == {
        "transfer set", "training set"}
    lines = {line.get_label(): line for line in axes.get_lines()}
    # Two epochs on the transfer set (300 steps) and two on the training set (100 steps).
    for name in ("student with KD", "baseline"):
        for curve in ("train", "validation"):
            assert list(lines[f"{name}: {curve}"].get_xdata()) == [150, 300, 350, 400]
        assert list(lines[f"{name}: best epoch 2 ({0.32 if name != 'baseline' else 0.3:.3f})"].get_xdata()) == [400]
    assert list(lines["baseline: validation"].get_ydata()) == pytest.approx([0.25, 0.3, 0.25, 0.3])


@pytest.mark.parametrize(("kind", "drawn"), [("regression", ["loss", "pearson", "spearman", "mse"]),
                                             ("multi-label", ["loss", "f1_micro", "f1_macro"])])
def test_other_problems_draw_their_own_scores(tmp_path, kind, drawn):
    lora, _ = task_runs(tmp_path / "runs", kind)
    written = figures.plot_run(lora, tmp_path / "plots")
    assert [path.stem for path in written if path.suffix == ".png"] == [f"LoRA-{SR}_{quantity}" for quantity in drawn]
    assert figures.plotted(figures.Run(lora)) == drawn


def test_panels_share_their_axis_and_name_each_line_once(tmp_path):
    run = figures.Run(distil_run(tmp_path))
    figure = curves.panels(run.metrics, run.summary)
    assert [axes.get_ylabel() for axes in figure.axes] == ["cross-entropy (nats)", "accuracy (%)", "MCC"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == len(set(names)) and "student with KD: in-domain" in names and "baseline: best epoch 2" in names
    # Wide as the report's text, and no line of the legend is cut.
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_the_objective_of_pretraining_has_a_figure_of_its_own(tmp_path):
    rows = [epoch(n, ("held_out",), phase="student", stage="pretrain") for n in (1, 2)]
    rows += [epoch(1, phase=phase, stage="gold") for phase in ("student", "scratch")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"stages": [{"stage": "pretrain", "steps": 40}, {"stage": "gold", "steps": 10}]}
    summary = {"mode": "distil", "model": "m", "task": "t", "sr": SR, "student": model, "scratch": model}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    figure = curves.pretraining_figure(read_metrics(tmp_path / "metrics.jsonl"), read_json(tmp_path / "summary.json"))
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert lines == {"student with KD: train": [20, 40], "student with KD: held out": [20, 40]}


# ---------------------------------------------------------------- comparisons and sweeps

def test_a_comparisons_plot_has_points_error_bars_names_and_the_majority_class(tmp_path):
    figure = figures.compare_figure(read_json(comparison(tmp_path)))
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


def test_a_sweeps_plot_has_every_trial_its_importances_and_the_means_by_role_set(tmp_path):
    figure = figures.sweep_figure(read_json(search(tmp_path)))
    scatter, importance, means = figure.axes
    drawn = {tuple(point) for collection in scatter.collections for point in collection.get_offsets().tolist()}
    assert drawn == {(1000, 0.5), (2000, 0.4), (3000, 0.3), (4000, 0.2), (5000, -0.1)}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["targets q+v", "targets all"] and "best: trial 0 (0.500)" in names
    assert [bar.get_width() for bar in importance.patches] == [0.25, 0.75]
    assert [label.get_text() for label in means.get_yticklabels()] == ["q+v (n=2)", "all (n=1)"]


def test_a_sweep_without_choices_or_importance_has_one_panel(tmp_path):
    path = search(tmp_path, importance=None, means={})
    assert len(figures.sweep_figure(read_json(path)).axes) == 1


@pytest.mark.parametrize(("mode", "made"), [("compare", comparison), ("sweep", search)])
def test_a_studys_plot_is_the_same_bytes_again(tmp_path, mode, made):
    path = made(tmp_path / "runs")
    one, two = (figures.plot_study(path, tmp_path / name) for name in ("one", "two"))
    assert [p.name for p in one] == [f"{mode}-{SR}.png", f"{mode}-{SR}.pdf"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_sweep_in_which_nothing_succeeded_is_told_in_one_line(tmp_path):
    with pytest.raises(ReportError, match="sweep.json: no trial has a score"):
        figures.plot_study(search(tmp_path, trials=[]), tmp_path)
