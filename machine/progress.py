"""Progress bars: tqdm's on a terminal, one line at the end in a file; and lines that leave the bars whole.

    with Bar(total=3, unit="batch", desc="epoch 1/3") as bar:
        bar.update()
        write("warning: ...")
"""
from __future__ import annotations

import contextlib
import logging
import math
import sys
import time

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LIBRARIES = ("transformers", "huggingface_hub", "datasets", "torch")  # loggers with handlers of their own


class Bar(tqdm):
    """A progress bar. In a file, where nothing can be drawn over, it is one line at its end.

    The arguments are tqdm's. A bar with `delay` that ends before is not shown at all.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"dynamic_ncols": True, **kwargs})

    @property
    def drawn(self) -> bool:
        """Whether the bar goes to a terminal."""
        return getattr(self.fp, "isatty", lambda: False)()

    def display(self, *args, **kwargs) -> bool | None:
        return super().display(*args, **kwargs) if self.drawn else False

    def clear(self, *args, **kwargs) -> None:
        if self.drawn:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        if self.disable or self.drawn:
            return super().close()
        due, line = time.time() >= self.start_t + self.delay, str(self)
        # tqdm writes nothing at the end of a bar that was never due.
        self.delay = math.inf
        super().close()
        if due:
            with contextlib.suppress(ValueError):  # the file is closed
                self.fp.write(line + "\n")


def write(line: str) -> None:
    """Writes a line to stderr, above the bars that are drawn there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def logs_above_bars() -> contextlib.AbstractContextManager[None]:
    """Sends the libraries' log lines that go to the terminal above the bars meanwhile."""
    def on_terminal(logger: logging.Logger) -> bool:
        return any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)

    # The others write elsewhere, and must not begin to write here.
    return logging_redirect_tqdm([logger for logger in map(logging.getLogger, LIBRARIES) if on_terminal(logger)])
