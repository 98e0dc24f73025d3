"""Tables and the plot of several seeds, from studies made up."""
import json

import pytest

from report import figures, seeds
from report.records import read_json


def spread(*values: float) -> dict:
    mean = sum(values) / len(values)
    return {"mean": mean, "values": list(values), "sd": 0.0123 if len(values) > 1 else None,
            "interval": [mean - 0.05, mean + 0.05] if len(values) > 1 else None}


def study(folder, *values: float):
    scores = {split: {"accuracy": spread(*values), "mcc": spread(*(v - 0.7 for v in values))}
              for split in ("in_domain", "out_of_domain", "all")}
    names = [str(12345 + i) for i in range(len(values))]
    content = {"mode": "seeds", "of": "distil", "sr": "12345", "model": "gpt2", "task": "cola", "seeds": names,
               "teachers": ["runs/LoRA-12345"], "selection": {"split": "in_domain", "splits": list(scores)},
               "majority_accuracy": {split: 0.69 for split in scores},
               "entries": [{"entry": "teacher", "seeds": names, "best": scores},
                           {"entry": "student", "seeds": names, "best": scores, "last": scores}],
               "differences": [{"entry": "student", "minus": "scratch", "seeds": names, "best": scores}],
               "runs": [{"seed": name, "folder": f"runs/distil-{name}", "status": "finished"} for name in names]}
    (folder / "seeds.json").write_text(json.dumps(content))
    return read_json(folder / "seeds.json")


def test_a_table_has_mean_deviation_and_interval_of_each_split_best_and_last(tmp_path):
    text = seeds.seeds_text(study(tmp_path, 0.75, 0.77)).splitlines()
    student = next(line for line in text if line.startswith("student with KD "))
    assert student.split()[3:] == ["2", "best", "in-domain", "76.0", "\u00b1", "1.2", "[71.0,", "81.0]", "0.060", "\u00b1",
                                   "0.012", "[0.010,", "0.110]"]
    difference = next(line for line in text if line.startswith("student minus baseline"))
    assert "+76.0" in difference and "[+0.010, +0.110]" in difference
    assert sum("last" in line for line in text) == 2 and not any(" all " in line for line in text[:8])
    assert any("one teacher, runs/LoRA-12345: the intervals are of the students' seeds alone" in line for line in text)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    text = seeds.seeds_text(study(tmp_path, 0.75))
    assert "One seed (12345): no standard deviation and no interval" in text and "\u00b1" not in text and "[" not in text


def test_a_table_for_latex_has_minus_signs(tmp_path):
    text = seeds.intervals_latex(study(tmp_path, 0.55, 0.57))
    assert "{[}$-$0.190, $-$0.090{]}" in text and "in-domain" in text and text.count(r"\\") == 1 + 2 + 4 + 2


def test_the_plot_shows_every_seed_and_the_interval(tmp_path):
    figure = figures.seeds_figure(study(tmp_path, 0.75, 0.77))
    assert [axes.get_title() for axes in figure.axes] == ["in-domain", "out-of-domain"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "teacher, best epoch", "student with KD, best epoch", "student with KD, last epoch"]
    assert axes.get_lines()[0].get_xdata().tolist() == pytest.approx([0.05, 0.07])
    assert "Matthews" in axes.get_xlabel()
    for path in figures.plot_study(tmp_path / "seeds.json", tmp_path / "plots"):
        assert path.name.startswith("distil-12345_seeds.") and path.stat().st_size > 5000
