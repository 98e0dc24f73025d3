"""Converts GGUF files once: the dequantised weights and the tokenizer are cached as a folder of `transformers`.

    python -c "from pathlib import Path; from data import gguf; print(gguf.converted_folder(Path('model.gguf')))"

Dequantising takes seconds at each start. The cached safetensors file is memory-mapped, and holds the same float32 numbers.
"""
from __future__ import annotations

import functools
import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path

from data.cache import cache_folder, made_once


def convert(path: Path, folder: Path) -> None:
    """Writes configuration, float32 weights and tokenizer of a GGUF file into a new folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}
    lm = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors by now; the library would refuse to save them as quantised ones.
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.is_quantized, lm.hf_quantizer = False, None
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@functools.cache
def converted_folder(path: Path, cache: Path | None = None) -> Path | None:
    """Returns the folder of the user's cache that holds a GGUF file's model, converted at its first use.

    The folder is `lora-distil/gguf-<key>`: the key is of the file's bytes and of the libraries' versions.

    Args:
        path: the GGUF file.
        cache: the user's cache folder; by default `$XDG_CACHE_HOME`, or else `~/.cache`.

    Returns:
        The folder. None where the file itself has to be read: the cache cannot be written, which a warning says, or the
        file cannot be converted, so that reading it gives the reason.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = hashlib.sha256(repr((digest, version("transformers"), version("gguf"))).encode()).hexdigest()[:12]
    folder = cache_folder(cache) / f"gguf-{key}"
    try:
        return made_once(folder, functools.partial(convert, path))
    # The library raises almost anything for a file that is no model, OSError without a number too.
    except Exception as error:
        if getattr(error, "errno", None):
            warnings.warn(f"{path.name}: its conversion cannot be kept in {folder.parent}: {error.strerror}; it is "
                          "converted at each start", stacklevel=2)
        return None
