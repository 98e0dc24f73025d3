"""Declares a step of the paper: one command line, and the file that marks it as done."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN, PEFT = "run.py", "benchmarks/peft_reference.py"


@dataclass(frozen=True)
class Step:
    """Holds one command line of the paper."""

    name: str
    minutes: float  # on one core of two at work: the first estimate of the time left
    words: list[str]  # after `python`: the program, then its arguments
    done: str  # file in the paper's folder that marks the step as done
    needs: tuple[str, ...] = ()  # steps without which it cannot begin
    after: tuple[str, ...] = ()  # steps that run first if they are to run too: their caches serve this one
    runs: str = ""  # pattern of its runs' folders, for the checksums; NAME/* if empty
    part_of: str = ""  # study that runs only when --only names it or the step

    @property
    def reported(self) -> bool:
        """Returns whether the report reads the step's runs, in addition to its table."""
        return Path(self.done).name in ("seeds.json", "summary.json")


def to(out: Path, folder: str) -> list[str]:
    """Returns the options of a step that writes into a folder of the paper's."""
    return ["--out", f"{out}/{folder}", "--no-plots"]
