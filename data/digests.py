"""Computes digests of a base model's configuration and tokenizer.

    python -c "from data import backbones, digests; print(digests.config_digest(backbones.load_config('tiny')))"

The weights alone do not decide a result: other merges make other tokens, another rope_theta other positions.
"""
from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

# Keys that describe the file, the library or the head, and change no result of the backbone.
NO_PART_OF_THE_BASE = {
    "_name_or_path", "architectures", "attn_implementation", "_attn_implementation", "dtype", "id2label", "label2id",
    "num_labels", "problem_type", "quantization_config", "torch_dtype", "transformers_version", "use_cache"}


def config_digest(config) -> str:
    """Returns the SHA-256 of a model's configuration, as far as the backbone's results depend on it."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in NO_PART_OF_THE_BASE}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """Returns the SHA-256 of everything that decides a tokenizer's token ids."""
    digest = hashlib.sha256(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("padding", "truncation"):  # set by the last call
            state.pop(setting, None)
        digest.update(json.dumps(state).encode())
        return digest.hexdigest()
    # Written in Python: the class, its vocabulary files and the added tokens.
    digest.update(f"{type(tokenizer).__name__}{sorted(tokenizer.get_added_vocab().items())}".encode())
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(tokenizer.save_vocabulary(folder)):
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()
