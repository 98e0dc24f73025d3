"""The names of the stages' checkpoints, and a checkpoint that student and baseline share."""
from __future__ import annotations

from pathlib import Path

from record.files import write_file
from train_utils import Checkpointing


def checkpoint_of(folder: Path, phase: str, stage: str, resume: bool = True) -> Checkpointing:
    """Returns the place of a stage's checkpoint: each student resumes each stage from its own.

    Args:
        phase: the student's name in files, `student` or `scratch`.
        stage: the stage's name.
        resume: whether to go on from the checkpoint, if there is one.
    """
    # The gold stage has the checkpoint name of runs with --plain: it is their only stage.
    return Checkpointing(folder, f"{phase}." if stage == "gold" else f"{phase}.{stage}.", resume)


def take_over(theirs: Checkpointing, own: Checkpointing) -> None:
    """Copies the finished checkpoint of a stage that both share."""
    # A resumed run may have gone on from it already.
    if not own.path.exists():
        write_file(own.path, theirs.path.read_bytes())
