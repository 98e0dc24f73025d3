"""Follows a run's scalars while it trains: TensorBoard's files, or trackio, MLflow or Weights & Biases by their own APIs.

    with tracker(options, settings) as follow:
        follow.begin(folder)
        follow.log(1, {"train/loss": 0.5})

A tracker is a class with `begin`, `log` and `end`, and an entry in TRACKERS. Servers, projects and keys are those of the
tracker's own environment variables (MLFLOW_TRACKING_URI, WANDB_PROJECT ...).
"""
from __future__ import annotations

import importlib.util
import io
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import processes
from machine.errors import UserError
from options.schema import RunOptions
from record.files import read_json, write_json
from record.ownership import TRACKER, checkpoints

PARAMS = 100  # that MLflow takes in one call
PROJECT = "lora-distil"  # name of the experiment, if the environment names none


class TensorBoard:
    """Appends scalars to a file of events in the run's folder."""

    def __init__(self, *_):
        self.file: Path | None = None

    def begin(self, folder: Path) -> None:
        """Names the file; it is made with the first epoch."""
        self.file = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}.{os.getpid()}"

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Appends an epoch's scalars. TensorBoard's own writer is a thread, which fails unseen on a full disk."""
        # Imported late, because the import would delay the first training step.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        new, records = not self.file.exists(), io.BytesIO()
        events = [Event(file_version="brain.Event:2", wall_time=time.time())] if new else []
        events += [Event(wall_time=time.time(), step=epoch, summary=Summary(
            value=[Summary.Value(tag=tag, simple_value=value)])) for tag, value in values.items()]
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        try:
            self.file.parent.mkdir(exist_ok=True)
            with open(self.file, "ab") as file:
                file.write(records.getvalue())
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written ({error.strerror})") from None

    def end(self, finished: bool) -> None:
        """Does nothing: each epoch is written at once."""


class Remote:
    """Logs scalars to another program, and notes in the run's folder the name by which it continues there.

    A tracker that fails in the middle stops no training: it is told once, and the run's own metrics.jsonl goes on.
    """

    def __init__(self, name: str, api):
        self.name, self.api, self.failed = name, api, False

    def begin(self, folder: Path) -> None:
        """Writes tracker.json."""
        write_json(folder / TRACKER, {"tracker": self.name, "id": self.api.id})

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Logs an epoch's scalars."""
        self._attempt(self.api.log, epoch, values)

    def end(self, finished: bool) -> None:
        """Closes the tracker's run."""
        self._attempt(self.api.end, finished)

    def _attempt(self, call, *arguments) -> None:
        try:
            call(*arguments)
        # Whatever a server, a full disk or a broken line raises.
        except Exception as error:
            if not self.failed:
                warnings.warn(f"--track {self.name}: {_one_line(error)}; the training goes on, and metrics.jsonl has every "
                              "epoch", stacklevel=3)
            self.failed = True


class MLflow:
    """A run of MLflow's tracking client: https://mlflow.org/docs/latest/ml/tracking/"""

    def __init__(self, name: str, settings: dict[str, str], resumed: str | None):
        mlflow = importlib.import_module("mlflow")
        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        if resumed:
            self.id = resumed
            self.client.update_run(resumed, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(title)
        identity = experiment.experiment_id if experiment else self.client.create_experiment(title)
        self.id = self.client.create_run(identity, run_name=name).info.run_id
        params = [mlflow.entities.Param(key, value[:500]) for key, value in settings.items()]
        for start in range(0, len(params), PARAMS):
            self.client.log_batch(self.id, params=params[start:start + PARAMS])

    def log(self, epoch: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self.mlflow.entities.Metric(key, value, now, epoch)
                                        for key, value in values.items()])

    def end(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Trackio:
    """A run of trackio, in its database on this machine: https://huggingface.co/docs/trackio"""

    def __init__(self, name: str, settings: dict[str, str], resumed: str | None):
        # A name of its own, by which trackio finds the run again.
        self.id = resumed or f"{name}-{secrets.token_hex(4)}"
        self.run = importlib.import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=self.id, config=settings,
            resume="must" if resumed else "never", embed=False)

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(values, step=epoch)

    def end(self, finished: bool) -> None:
        self.run.finish()


class WandB:
    """A run of Weights & Biases: https://docs.wandb.ai/ref/python/"""

    def __init__(self, name: str, settings: dict[str, str], resumed: str | None):
        self.id = resumed or secrets.token_hex(4)
        self.run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=settings, id=self.id,
            resume="allow" if resumed else None)
        # Steps may not go back, and the epochs of a distillation's stages begin anew: the epoch is a value.
        self.run.define_metric("*", step_metric="epoch")

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log({**values, "epoch": epoch})

    def end(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "mlflow": MLflow, "wandb": WandB}


def check(name: str) -> None:
    """Checks that the package of a tracker is installed.

    Raises:
        UserError: it is not; says the command that installs it.
    """
    # Not imported: that takes a second, and TensorBoard's part of it may wait for the first epoch.
    spec = importlib.util.find_spec(name)
    # Without a file it is no package, but a folder of that name, such as the one that wandb itself writes.
    if spec is None or spec.origin is None:
        raise UserError(f"--track {name}: the package {name} is not installed; pip install -r requirements-track.txt")


@contextmanager
def tracker(options: RunOptions, settings: dict) -> Iterator[TensorBoard | Remote]:
    """Opens the tracker of a run, and closes it at the end; a resumed run goes on in the tracker's run that it began.

    Args:
        settings: every option, as config.json records them.

    Raises:
        UserError: the tracker cannot be opened.
    """
    # Of several processes, only the first records.
    if options.track == "tensorboard" or not processes.is_main():
        yield TensorBoard()
        return
    check(options.track)
    values = {key: str(value) for key, value in settings.items()}
    try:
        follow = Remote(options.track, TRACKERS[options.track](options.out.name, values, _resumed(options)))
    except Exception as error:
        raise UserError(f"--track {options.track}: {_one_line(error)}") from None
    finished = False
    try:
        yield follow
        finished = True
    finally:
        follow.end(finished)


def _resumed(options: RunOptions) -> str | None:
    """Returns the name of the tracker's run that an unfinished run began; None for a new run or another tracker."""
    path = Path(options.out) / TRACKER
    if not options.resume or options.overwrite or not checkpoints(options.out) or not path.exists():
        return None
    found = read_json(path)
    return found.get("id") if found.get("tracker") == options.track else None


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
