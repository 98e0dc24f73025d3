"""Asks whether the Hugging Face Hub answers at all."""
from __future__ import annotations

import functools


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
