"""Programs that measure; each is run by hand or by a step of the paper."""
import shlex
import sys
from pathlib import Path


def command() -> str:
    """Returns the command line of the running program as it is typed in the project's folder, wherever that stands."""
    return "python " + shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
