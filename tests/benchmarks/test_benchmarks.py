"""The pure helpers of benchmarks/common.py: figures, pairing, samples, tables. Nothing is timed."""
import pytest
import torch

from benchmarks import gpu
from benchmarks.common import (
    Report,
    alternate,
    figure,
    padding_percent,
    paired_ratios,
    spread_sample,
    summary,
    table,
    thinned,
)
from benchmarks.features_reference import reference
from data_utils import Split, Task


def test_summary_is_median_and_spread():
    assert summary([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0}
    assert summary([2.0, 4.0])["median"] == 3.0


def test_ratios_are_paired_round_by_round():
    """A machine twice as slow in the second round changes no ratio."""
    assert paired_ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    with pytest.raises(ValueError):
        paired_ratios([1.0], [1.0, 2.0])


def test_sides_alternate_and_odd_rounds_go_backwards(capsys):
    calls = []
    sides = {name: lambda number, name=name: calls.append((name, number)) or float(number) for name in "ab"}
    assert alternate(sides, 3) == {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert capsys.readouterr().out == ""  # stdout is for the result


def test_a_table_aligns_its_columns():
    assert table(["side", "tokens/s"], [["ours", "480"], ["the other", "9"]]) == (
        "side       tokens/s\n"
        "---------  --------\n"
        "ours            480\n"
        "the other         9")
    assert [figure(value) for value in (12345.6, 100.4, 3.14159, 0.01234)] == ["12,346", "100", "3.14", "0.0123"]


def test_a_sample_takes_one_of_each_range():
    for seed in range(20):
        sample = spread_sample(5, 52, seed)
        assert len(sample) == 5 and all(i * 52 / 5 - 1 < number < (i + 1) * 52 / 5 for i, number in enumerate(sample))
    assert spread_sample(5, 52, 1) == spread_sample(5, 52, 1) != spread_sample(5, 52, 2)
    assert spread_sample(9, 4, 0) == [0, 1, 2, 3]


def test_a_thinned_split_is_spread_over_the_file():
    split = Split([f"s{i}" for i in range(10)], [i % 2 for i in range(10)], ["x"] * 10)
    assert thinned(split, 3).sentences == ["s0", "s3", "s6", "s9"]
    assert thinned(split, 99) == split


def test_padding_depends_on_the_order():
    lengths = [1, 9, 1, 9]
    assert padding_percent(lengths, [0, 2, 1, 3], 2) == 0
    assert padding_percent(lengths, [0, 1, 2, 3], 2) == pytest.approx(100 * 16 / 36)
    assert padding_percent([2, 4, 5], [0, 1, 2], 2) == pytest.approx(100 * 2 / 13)


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_sides_that_differ_are_not_timed(difference):
    with pytest.raises(SystemExit, match="loss: the sides differ"):
        Report().check("loss", difference, 1e-4)


def test_bits_are_compared_as_bits():
    report, a = Report(), torch.ones(3)
    report.check_bits("logits", a, a.clone())
    for one, other in ((a, a + torch.tensor([0, 0, 2e-7])), (a, a * float("nan")), (0 * a, 0 * a)):
        with pytest.raises(SystemExit):  # zeros prove nothing
            report.check_bits("logits", one, other)
    assert report.checks == [{"what": "logits", "difference": 0.0, "tolerance": 0.0}]


def test_a_target_is_met_by_its_median():
    report = Report()
    report.target("speed", [1.0, 3.0, 9.0], 3.0)
    report.target("speed", [1.0, 2.9, 9.0], 3.0)
    report.target("memory", [0.8], 0.8, at_most=True)
    report.target("memory", [0.9], 0.8, at_most=True)
    assert [(target["target"], target["met"]) for target in report.targets] == [
        (">= 3", True), (">= 3", False), ("<= 0.8", True), ("<= 0.8", False)]
    assert "NOT met" in report.text() and "2.9" in report.text()


def test_the_reference_of_features_alone_reads_what_a_run_reads():
    """Separable by one number; a missing value is no mistake."""
    values = [float(i) for i in range(-20, 20)]
    rows = Split(["text"] * 40, [int(x > 0) for x in values], [], [[x, 0.0] for x in values])
    rows.features[3][1] = float("nan")
    result = reference(Task("csv", rows, {"dev": rows.take(range(10, 30))}, {}))
    assert result["dev"]["n"] == 20 and result["dev"]["accuracy"] >= 0.95 and result["dev"]["majority_accuracy"] == 0.55


def test_without_a_gpu_its_benchmarks_say_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("gpu.py: there is no GPU here ") and errors.count("\n") == 1


def test_each_program_of_a_gpu_is_there_and_has_a_result_of_its_own():
    files = {gpu.result_file(program, "NVIDIA H100 80GB HBM3").name for program in gpu.PROGRAMS}
    assert files == {f"{name}_nvidia-h100-80gb-hbm3.json" for name in (
        "gpu_checks", "train_throughput", "frozen_reuse", "inference")}
    assert all((gpu.ROOT / "benchmarks" / program.split()[0]).exists() for program in gpu.PROGRAMS)


def test_logits_are_compared_relative_to_the_largest():
    assert gpu.largest_difference([torch.tensor([[9.0, 10.0]])], [torch.tensor([[9.5, 10.0]])]) == pytest.approx(0.05)
    assert gpu.largest_difference([torch.tensor([[0.1, 0.2]])], [torch.tensor([[0.1, 0.3]])]) == pytest.approx(0.1)
