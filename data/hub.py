"""Asks whether the Hugging Face Hub answers at all, and reads its data sets by name."""
from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from data.arrow import AT_A_TIME, Column
from data.tables import Table
from machine.errors import UserError

if TYPE_CHECKING:
    import datasets


@functools.cache
def hub_unreachable() -> bool:
    """Returns whether the Hugging Face Hub gives no answer, so that only its cache can be read.

    Asks once in each process: the library alone would retry each file for half a minute.
    """
    from huggingface_hub import constants, get_session

    try:
        return get_session().head(constants.ENDPOINT, timeout=5).status_code >= 500
    except Exception:  # offline by choice, or whatever its HTTP library raises for refused, unknown or timed out
        return True


def is_dataset_name(data: str | Path) -> bool:
    """Returns whether `--data` may be the name of a data set on the Hub, owner/name: a local path always wins."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(data)) is not None and not Path(data).exists()


@functools.cache
def load_dataset(name: str) -> dict[str, datasets.Dataset]:
    """Returns the splits of a data set on the Hub by their names; from the cache where the Hub cannot be reached.

    Raises:
        UserError: no such data set, or one that can neither be downloaded nor read from the cache.
    """
    import datasets

    datasets.disable_progress_bars()
    # The library raises its errors as well as logging them.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # Without a connection it would retry for minutes.
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or hub_unreachable()
    try:
        # Older versions of the library ran a script that came with the data.
        splits = datasets.load_dataset(name, trust_remote_code=False)
        return {str(split): rows for split, rows in splits.items()}
    except Exception as error:  # its own classes, huggingface_hub's, pyarrow's and those of the HTTP library
        missing = "no such file or folder here, and as a data set of the Hugging Face Hub"
        if datasets.config.HF_HUB_OFFLINE:
            raise UserError(f"--data {name}: {missing} it is not cached, and the Hub cannot be reached") from None
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"--data {name}: {missing} it cannot be loaded ({said})") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def read_dataset(name: str, split: str) -> Table:
    """Returns a split of a data set on the Hub as a table, with the class names of its features."""
    from datasets import ClassLabel

    rows = load_dataset(name)[split]
    # A list of classes has them in its items.
    kinds = {column: getattr(feature, "feature", feature) for column, feature in rows.features.items()}
    columns = {}
    for column in kinds:
        # The library's files are mapped into memory: of a column, some rows at a time are Python objects.
        parts = rows.select_columns([column]).iter(AT_A_TIME)
        columns[column] = Column.of(itertools.chain.from_iterable(part[column] for part in parts))
    return Table(Path(name) / split, columns, {
        column: kind.names for column, kind in kinds.items() if isinstance(kind, ClassLabel)})
