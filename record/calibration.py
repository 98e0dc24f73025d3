"""A run's calibration.json: the temperature of its logits, and for two classes the threshold of the positive one.

    calibration_of(Path("runs/LoRA-12345"), True).temperature

`run.py calibrate` writes it; predict, serve, export and merge read it with --calibrated.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from machine.errors import UserError
from record.files import read_json, read_sums, sha256, write_json, write_sums
from record.ownership import CALIBRATION


@dataclass(frozen=True)
class Calibration:
    """The rule from logits to a class: softmax(logits / temperature), then the threshold."""

    temperature: float = 1.0
    positive: int = 1  # index of the class that the threshold is about
    threshold: float | None = None  # its least probability; None: the likeliest class is chosen


LIKELIEST = Calibration()  # the rule of a run that is not calibrated: the likeliest class of the logits as they are


def calibration_of(folder: Path, calibrated: bool) -> Calibration:
    """Returns the calibration of a run if `calibrated`, else the rule of a run without one.

    Raises:
        UserError: the run has none, or it is damaged.
    """
    if not calibrated:
        return LIKELIEST
    path = Path(folder) / CALIBRATION
    if not path.exists():
        raise UserError(f"--calibrated: {folder} has no {CALIBRATION}; python run.py calibrate {folder} makes it")
    found = read_json(path)
    temperature, threshold, positive = found.get("temperature"), found.get("threshold"), found.get("positive", 1)
    # NaN fails each comparison.
    whole = (_is_number(temperature) and 0 < temperature < math.inf
             and (threshold is None or _is_number(threshold) and 0 <= threshold <= 1) and positive in (0, 1))
    if not whole:
        raise UserError(f"{path}: damaged; python run.py calibrate {folder} makes it anew")
    return Calibration(float(temperature), positive, threshold)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_calibration(folder: Path, found: dict) -> None:
    """Writes calibration.json into a finished run's folder, and its checksum into SHA256SUMS.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    digests = read_sums(folder)
    # Without the old checksum first: whenever this is interrupted, the checksums describe the folder.
    if digests is not None and CALIBRATION in digests:
        write_sums(folder, {name: digest for name, digest in digests.items() if name != CALIBRATION})
    write_json(folder / CALIBRATION, found)
    if digests is not None:
        write_sums(folder, {**digests, CALIBRATION: sha256(folder / CALIBRATION)})
