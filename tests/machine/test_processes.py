"""One run in two processes (gloo, on the CPU): the training of one process, one writer, one line at the end."""
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file

from data_utils import collate, split_large
from machine import processes
from record.folder import without_times

DRIVER = Path(__file__).parents[1] / "two_processes.py"


# ---------------------------------------------------------------- a process that is alone

def test_a_process_that_is_alone_answers_at_once(monkeypatch):
    for name in processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    processes.connect()
    assert (processes.rank(), processes.count(), processes.is_main(), processes.launcher()) == (0, 1, True, "python")
    assert processes.all_reduce_max(3, 5) == (3, 5) and processes.broadcast(2) == 2 and processes.shard([1, 2]) == [1, 2]
    assert processes.gather(torch.ones(2)).tolist() == [[1, 1]] and processes.claim_once("a") and processes.claim_once("a")


@pytest.mark.parametrize("local, expected", [
    ("4", "torchrun --nproc-per-node 4"), ("2", "torchrun --nnodes 2 --nproc-per-node 2")])
def test_the_command_to_continue_with_starts_as_many(monkeypatch, local, expected):
    monkeypatch.setattr(processes, "_count", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert processes.launcher() == expected


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_row_of_a_batch_is_one_processs(count):
    rows = [[1] * (1 + row % 5) for row in range(20)]

    def batches():
        return [collate(rows, [0] * 20, group, 0) for group in ([0, 5, 10], [1], list(range(2, 5)), list(range(11, 20)))]

    found = [split_large(batches(), rank, count) for rank in range(count)]
    for i, whole in enumerate(batches()):
        parts = [part for own in found for part in own[i].micro_batches()]
        assert torch.cat([part.rows for part in parts]).tolist() == whole.rows.tolist()
        assert sum(part.tokens for part in parts) == whole.tokens == found[0][i].tokens
        for part in parts:
            assert part.input_ids.shape == part.attention_mask.shape == (len(part.rows), part.attention_mask.sum(1).max())
    assert found[-1][1].micro_batches() != [] and found[0][1].micro_batches() == []  # of one row


# ---------------------------------------------------------------- two processes

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(work):
    """What the runs of two_processes.py left."""
    environment = {key: value for key, value in os.environ.items() if key not in processes.LAUNCHED}
    done = subprocess.run(warm.of_file(DRIVER, work), capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(found, work):
    """The toy training in one process, and in each of two."""
    assert found["fit-one"]["statuses"] == [0] and found["fit-two"]["statuses"] == [0, 0], found
    results = [json.loads((work / f"{name}.json").read_text()) for name in ("fit-one-0", "fit-two-0", "fit-two-1")]
    assert results[0]["says"] and results[1]["says"] + results[2]["says"] == 1  # of two processes one, whichever
    return results


@pytest.mark.slow
def test_two_processes_have_the_gradients_and_weights_of_one(trained):
    one, *two = trained
    assert len(one["gradients"]) == 12
    for process in two:
        assert process["gradients"] == two[0]["gradients"] and process["weights"] == two[0]["weights"]
        for expected, gradients in zip(one["gradients"], process["gradients"], strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(torch.tensor(gradients[name]), torch.tensor(value), rtol=0, atol=1e-5)
        for name, value in one["weights"].items():
            torch.testing.assert_close(torch.tensor(process["weights"][name]), torch.tensor(value), rtol=0, atol=1e-4)
    assert max(torch.tensor(value).abs().max() for value in one["gradients"][0].values()) > 1e-2


@pytest.mark.slow
def test_each_sentence_is_computed_once_an_epoch_and_every_process_knows_the_result(trained):
    one, *two = trained
    assert sorted(two[0]["rows"] + two[1]["rows"]) == sorted([*range(21)] * 2)
    assert two[0]["rows"] and two[1]["rows"]
    for line, *others in zip(*(process["history"] for process in trained), strict=True):
        for other in others:
            assert other["tokens"] == line["tokens"] and other["confusion"] == line["confusion"]
            assert other["train"] == pytest.approx(line["train"], abs=1e-5)
            assert other["validation"]["all"] == pytest.approx(line["validation"]["all"], abs=1e-5)
    assert without_times(two[0]["history"]) == without_times(two[1]["history"])


@pytest.mark.slow
def test_dropout_is_drawn_by_each_for_itself(trained):
    one, *two = trained
    assert one["draw"] == two[0]["draw"] != two[1]["draw"]
    assert two[1]["draw"] == torch.rand(3, generator=torch.Generator().manual_seed(7 + 100_000)).tolist()


@pytest.mark.slow
def test_a_run_of_two_processes_trains_the_adapter_of_one(work, found):
    assert found["one"]["statuses"] == [0] and found["two"]["statuses"] == [0, 0] and found["two"]["said"] == []
    one, two = (load_file(work / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)
    summaries = [json.loads((work / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["validation"]["all"] == pytest.approx(summaries[1]["validation"]["all"], abs=1e-4)
    for key in ("tokens", "steps", "padding_percent"):
        assert summaries[0]["train"][key] == summaries[1]["train"][key]
    config = json.loads((work / "two" / "config.json").read_text())
    assert config["processes"] == 2 and config["command"].startswith("torchrun --nproc-per-node 2 run.py ")


@pytest.mark.slow
def test_the_first_process_alone_writes_and_prints(work, found):
    first, second = found["two"]["stdout"]
    assert "best epoch" in first and second == ""
    one, two = (sorted(path.name for path in (work / name).iterdir()) for name in ("one", "two"))
    assert one == two
    assert len(list((work / "two" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, says", [
    ("bad", "--rank 4000: expected 1 to 32"), ("two", "holds a finished run"), ("sweep", "sweep is for one process")])
def test_bad_input_is_told_once(found, name, says):
    ended = found[name].get("again", found[name])
    assert 2 in ended["statuses"] and 0 not in ended["statuses"]
    assert len(ended["said"]) == 1 and says in ended["said"][0]


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_ends_both_with_one_line(found):
    assert found["stopped"]["statuses"] == [143, 143]
    (line,) = found["stopped"]["said"]
    assert line.startswith("run.py: stopped; continue with: torchrun --nproc-per-node 2 run.py ")
    assert line.endswith(" --resume")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_line(found):
    assert found["killed"]["statuses"] == [1, -9]
    (line,) = found["killed"]["said"]
    assert line.startswith("run.py: another of the 2 processes has ended; continue with: torchrun --nproc-per-node 2 ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_a_resumed_run_ends_in_the_bytes_of_one_that_was_not_interrupted(work, found, name):
    """With dropout: each process goes on with its own random numbers."""
    assert found["whole"]["statuses"] == found[name]["resumed"]["statuses"] == [0, 0], found[name]
    whole, resumed = (work / one for one in ("whole", name))
    assert (whole / "adapter_model.safetensors").read_bytes() == (resumed / "adapter_model.safetensors").read_bytes()
    lines = [[without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
             for folder in (whole, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 6


@pytest.mark.slow
def test_distillation_in_two_processes_is_that_of_one(work, found):
    assert found["distil-1"]["statuses"] == [0] and found["distil-2"]["statuses"] == [0, 0], found["distil-2"]
    for name in ("student", "scratch"):
        one, two = (load_file(work / f"distil-{count}" / f"{name}.safetensors") for count in (1, 2))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)
