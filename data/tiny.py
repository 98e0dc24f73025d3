"""Trains the tiny GPT-2 on the built-in grammar at its first use, and caches it in the user's cache folder.

    python -c "from data import tiny; print(tiny.tiny_model_folder())"
"""
from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from data import grammar
from data.cache import cache_folder, made_once
from machine import hardware
from machine.progress import Bar

VOCABULARY = 1536  # byte-level BPE tokens: enough for every word to be one, which lets a small model learn agreement
POSITIONS, LAYERS, CHANNELS, HEADS = 128, 6, 128, 4
STEPS, TOKENS_PER_STEP, LEARNING_RATE = 800, 1024, 3e-3
WORD = re.compile(r"[^\W\d_]+")


def train_tokenizer(corpus: list[str]):
    """Trains a tokenizer of GPT-2's kind: byte-level BPE, <|endoftext|> as first and last token, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, model_max_length=POSITIONS
    )


def unknown_words(tokenizer, text: str) -> list[str]:
    """Returns the words of a text that the built-in model never saw, once each: its tokenizer has no token for them.

    Args:
        tokenizer: the built-in model's, with a token for each word of its corpus.
    """
    (known, inner, tokens), words = _vocabulary(tokenizer), WORD.findall(text)
    # Nearly every text of the grammar ends here.
    if known.issuperset(words):
        return []
    return [word for word in dict.fromkeys(words)
            if word not in inner and word.lower() not in inner and word.capitalize() not in tokens]


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Returns words that are known as they stand, the words of tokens within a sentence, and all tokens.

    Kept, because a tokenizer makes its vocabulary anew at each call.
    """
    tokens = frozenset(tokenizer.get_vocab())
    # A token within a sentence begins with the tokenizer's mark for a space; the first one begins with a capital.
    inner = frozenset(token[1:] for token in tokens if token.startswith("Ġ"))
    return inner.union(token for token in tokens if token == token.capitalize()), inner, tokens


def equal_length_batches(sequences: list[list[int]], rng: random.Random) -> Iterator[list[list[int]]]:
    """Yields batches of about TOKENS_PER_STEP tokens without end; a batch holds sentences of one length and no pads."""
    by_length: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    while True:
        batches = []
        for length, group in by_length.items():
            rng.shuffle(group)
            size = TOKENS_PER_STEP // length
            batches += [group[start:start + size] for start in range(0, len(group), size)]
        rng.shuffle(batches)
        yield from batches


def train_model(folder: Path) -> None:
    """Trains the tokenizer and the GPT-2 on the corpus, and saves both in `folder`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    corpus = grammar.draw_corpus()
    tokenizer = train_tokenizer(corpus)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=CHANNELS, n_layer=LAYERS, n_head=HEADS,
        bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new, fused
    )
    hardware.keep_freed_memory()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the caller's GPU as well.
        torch.default_generator.manual_seed(grammar.SEED)
        model = GPT2LMHeadModel(config)
    # The loss that the library takes by default, with a note on stderr.
    model.loss_type = "ForCausalLM"
    # Half of the sentences start with <|endoftext|>, as text generated from nothing does; half at position 0 without
    # it, as a prompt or a sentence to classify does.
    rng = random.Random(grammar.SEED)
    texts = [sentence + tokenizer.eos_token for sentence in corpus]
    sequences = [[end] * (rng.random() < 0.5) + ids for ids in tokenizer(texts)["input_ids"]]
    batches = equal_length_batches(sequences, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1, cycle_momentum=False
    )
    with Bar(range(STEPS), desc="tiny GPT-2, first use", unit="step") as progress:
        for step in progress:
            input_ids = torch.tensor(next(batches))  # (B, T)
            loss = model(input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.2f}")
    # The name of the activation in GPT-2's own configuration; the function is the same.
    model.config.activation_function = "gelu_new"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe() -> str:
    """Returns a key of everything that decides the weights: grammar, sizes, seed, and versions of the libraries.

    A sample of the corpus, in which every phenomenon and word class occurs, stands for the grammar.
    """
    sizes = (VOCABULARY, POSITIONS, LAYERS, CHANNELS, HEADS, STEPS, TOKENS_PER_STEP, LEARNING_RATE, grammar.N_CORPUS)
    versions = [version(name) for name in ("torch", "transformers", "tokenizers")]
    rows = grammar.draw([*grammar.IN_DOMAIN, *grammar.HELD_OUT], "all", 1000, 1.0, random.Random(grammar.SEED), set())
    return hashlib.sha256(repr((sizes, versions, grammar.SEED, rows)).encode()).hexdigest()[:12]


def tiny_model_folder(cache: Path | None = None) -> Path:
    """Returns the folder of the tiny GPT-2 and its tokenizer, trained on first use (a minute or so).

    The folder is `lora-distil/tiny-<recipe>` below `cache`. It appears whole or not at all, and two
    processes that need it at once train it once. The caller's random state is untouched.

    Args:
        cache: the user's cache folder; by default `$XDG_CACHE_HOME`, or else `~/.cache`.

    Raises:
        OSError: the cache folder cannot be written.
    """
    return made_once(cache_folder(cache) / f"tiny-{recipe()}", _train_by_two_threads)


def _train_by_two_threads(folder: Path) -> None:
    """Calls `train_model` with two threads, whatever the machine has: the number of threads decides the bytes.

    More would wait for each other. On one core two take turns, because waiting threads sleep (machine/threads.py).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_model(folder)
    finally:
        torch.set_num_threads(threads)
