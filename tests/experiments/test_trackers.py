"""--track: MLflow's own client finds the scalars of metrics.jsonl; a resumed run goes on; the weights are the same."""
import json
import sys
import warnings

import mlflow
import pytest
import toy

from machine.errors import UserError
from options.schema import RunOptions, TrainOptions
from training import trackers


@pytest.fixture
def store(tmp_path, monkeypatch):
    """MLflow's client on a store of files, which it wants to be asked for."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return mlflow.MlflowClient()


def runs_of(client) -> list:
    experiment = client.get_experiment_by_name("lora-distil")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def test_mlflow_has_the_scalars_of_an_interrupted_and_resumed_run_and_the_weights_are_those_without_it(
        work, tmp_path, monkeypatch, store):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("machine.signals.received", lambda: calls.append(1) or (15 if len(calls) == 7 else None))
        assert toy.lora(work, tmp_path / "run", "--track", "mlflow") == 143
    (run,) = runs_of(store)
    assert (run.info.run_name, run.info.status) == ("run", "KILLED")
    assert (run.data.params["rank"], run.data.params["dropout"]) == ("8", "0.2")
    assert toy.lora(work, tmp_path / "run", "--track", "mlflow", "--resume") == 0
    (run,) = runs_of(store)
    assert run.info.status == "FINISHED"
    lines = toy.lines_of(tmp_path / "run")
    for name, value in (("train/loss", lambda line: line["train"]["loss"]), ("learning_rate", lambda x: x["learning_rate"]),
                        ("in_domain/mcc", lambda line: line["validation"]["in_domain"]["mcc"])):
        found = {metric.step: metric.value for metric in store.get_metric_history(run.info.run_id, name)}
        assert found == {line["epoch"]: value(line) for line in lines} and len(found) == 3
    after = toy.tree(tmp_path / "run")
    assert json.loads(after["tracker.json"]) == {"tracker": "mlflow", "id": run.info.run_id}
    assert not any(name.startswith("tensorboard") for name in after) and "tracker.json" in after["SHA256SUMS"].decode()
    assert after["adapter_model.safetensors"] == toy.tree(work / "LoRA")["adapter_model.safetensors"]
    # A repetition is no run to be shown.
    assert toy.main("repeat", tmp_path / "run") == 0 and len(runs_of(store)) == 1
    # A new run in the same folder is a new run of MLflow's, and TensorBoard's leaves no name behind.
    assert toy.lora(work, tmp_path / "run", "--track", "mlflow", "--overwrite", "--method", "head") == 0
    assert len(runs_of(store)) == 2
    assert toy.lora(work, tmp_path / "run", "--overwrite", "--method", "head") == 0
    assert not (tmp_path / "run" / "tracker.json").exists() and len(runs_of(store)) == 2


def test_mlflow_has_all_options_however_many_there_are(store):
    settings = {f"option_{number}": str(number) for number in range(2 * trackers.PARAMS + 1)}
    trackers.MLflow("run", settings, None)
    (run,) = runs_of(store)
    assert run.data.params == settings


def test_a_distillation_is_tracked_phase_by_phase(work, tmp_path, store):
    assert toy.main("distil", "12345", "--plain", "--teacher", work / "LoRA", "--out", tmp_path / "run", "--epochs", 1,
                    "--no-plots", "--embedding-size", 8, "--hidden-size", 6, "--batch-size", 8, "--track", "mlflow") == 0
    (run,) = runs_of(store)
    assert set(run.data.metrics) >= {f"{phase}/{name}" for phase in ("student", "scratch")
                                     for name in ("train/loss", "all/mcc")}


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_written(work, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert toy.lora(work, tmp_path / "run", "--track", name) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"run.py: --track {name}: the package {name} is not installed; pip install -r requirements-track.txt"]
    assert not (tmp_path / "run").exists()


def test_a_store_that_cannot_be_opened_is_one_line_and_one_that_breaks_stops_nothing(tmp_path, monkeypatch, store):
    options = RunOptions("LoRA", "12345", "tiny", "tiny", None, tmp_path, TrainOptions(0), track="mlflow")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "none://server")
        with pytest.raises(UserError, match="--track mlflow: [^\n]*$"), trackers.tracker(options, {}):
            pass
    with trackers.tracker(options, {"rank": 8}) as follow, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        follow.begin(tmp_path)
        monkeypatch.setattr(type(follow.api.client), "log_batch", lambda *_, **__: 1 / 0)
        for epoch in (1, 2):
            follow.log(epoch, {"train/loss": 0.5})
    assert [str(one.message) for one in told if "--track" in str(one.message)] == [
        "--track mlflow: division by zero; the training goes on, and metrics.jsonl has every epoch"]
