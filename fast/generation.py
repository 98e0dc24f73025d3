"""Samples texts from a causal language model, many in one batch, with cached keys and values.

    for tokens in sample_together(lm, [[bos]] * 1000, Sampling(seed=1), max_new_tokens=40, end={eos}): ...     # of each text

A finished text leaves the batch, and the next one takes its slot. The random numbers are those of `sampling.py`: a text
depends on no other one, and texts sampled in several calls (`first_row`) are those of one call. The other texts of a batch
change a text's logits by rounding at most.

Decoders with fused blocks (blocks.py) go through them: each step computes one new token of each text, and the logits of
that token alone. The tokens of new prompts but the last are computed together, shared prefixes once.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fast import onepass
from fast.attention import SHORT, Heads, Rotate, unique_tokens
from fast.blocks import is_fused
from fast.choice import by_onepass
from fast.classifier import backbone_states
from sampling import Sampling, uniforms

# Tokens of a block of the vocabulary: PyTorch's argmax and cumsum over all of it take several times as long as by blocks.
BLOCK = 256
# Tokens of prompts computed together, pads included: a bound on memory.
PREFILL_TOKENS = 4096
# Settings of a generation_config.json that are arguments of `sample_together` or change no text.
PLAIN = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache",
         "do_sample", "temperature", "top_k", "top_p", "output_attentions", "output_hidden_states"}


class FastSampling(Sampling):
    """`Sampling` by blocks of the vocabulary, without sorting all of it."""

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Chooses a token for each row; see `Sampling.choose`. The logits may be written over."""
        # The likeliest token of the block with the highest maximum.
        if self.greedy:
            block = _of_blocks(logits, torch.amax).argmax(-1, keepdim=True)
            tokens, part = _of_block(logits, block)
            return tokens.gather(1, part.argmax(-1, keepdim=True))[:, 0]
        logits, tokens = logits.div_(self.temperature), None
        if 0 < self.top_k < logits.shape[1]:
            logits, tokens = logits.topk(self.top_k)  # sorted
        p = logits.softmax(-1)
        # Nuclei of the whole vocabulary differ in size: each text is computed by itself. After top_k all rows are short.
        if self.top_p < 1 and tokens is None:
            return torch.stack([self._from_nucleus(*row) for row in zip(p, uniform, strict=True)])
        chosen = self._by_inverse(p, uniform)
        return chosen if tokens is None else tokens.gather(1, chosen[:, None])[:, 0]

    def _from_nucleus(self, p: Tensor, uniform: Tensor) -> Tensor:
        """Chooses by top_p from probabilities (V,) without sorting them all.

        Those below (1 - top_p) / V hold less than 1 - top_p together: none of them is in the nucleus.
        """
        tokens = (p >= (1 - self.top_p) / len(p)).nonzero()[:, 0]
        some, order = p[tokens].sort(descending=True)
        return tokens[order[self._by_inverse(some[None], uniform[None])[0]]]

    def _by_inverse(self, p: Tensor, uniform: Tensor) -> Tensor:
        """Inverts the cumulative distribution of each row of p (n, V), sorted if top_p cuts it: returns indices (n,)."""
        uniform = uniform[:, None].to(p.dtype)
        if self.top_p < 1:
            sums = p.cumsum(-1)
            kept = ((sums - p) < self.top_p).sum(-1, keepdim=True).clamp(min=1)
            total = sums.gather(1, kept - 1)
            return _invert(p, uniform * total, total)[0][:, 0]
        # First the block where the cumulative sum passes the number, then the token within the block.
        sums = _of_blocks(p, torch.sum)
        block, rest = _invert(sums, uniform * sums.sum(-1, keepdim=True))
        tokens, part = _of_block(p, block)
        # Tokens of the block before a shorter last one get no probability.
        return tokens.gather(1, _invert(part * (tokens >= block * BLOCK), rest)[0])[:, 0]


def _of_blocks(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduces each block of x (n, V) to one number: (n, blocks); the last block may be shorter."""
    whole = (x.shape[1] - 1) // BLOCK * BLOCK
    return torch.cat([reduce(x[:, :whole].unflatten(1, (-1, BLOCK)), -1), reduce(x[:, whole:], -1, keepdim=True)], 1)


def _of_block(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the indices of a block (n, 1) of each row of x (n, V), and the values there, (n, BLOCK) each.

    A shorter last block is filled up with the end of the block before it.
    """
    first = (block * BLOCK).clamp(max=max(0, x.shape[1] - BLOCK))
    at = first + torch.arange(min(BLOCK, x.shape[1]), device=x.device)
    return at, x.gather(1, at)


def _invert(p: Tensor, at: Tensor, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds where the cumulative sum of each row of p (n, k) passes `at` (n, 1): the indices (n, 1), and how far into them.

    No returned index has a probability of 0.

    Args:
        total: (n, 1) the sum of the probabilities that may be chosen; of all if None.
    """
    sums = p.cumsum(-1)
    total = sums[:, -1:] if total is None else total
    # Below the total, so that rounding never leads past the last one with a probability.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(sums, at, right=True).clamp(max=p.shape[1] - 1)
    return index, (at - sums.gather(1, index) + p.gather(1, index)).clamp(min=0)


@dataclass
class _Row:
    """An unfinished text."""

    number: int
    prompt: Sequence[int]
    uniform: list[float]  # one for each new token
    new: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Returns the newest token: the input of the next step."""
        return self.new[-1] if self.new else self.prompt[-1]

    @property
    def position(self) -> int:
        """Returns the position of `last`."""
        return len(self.prompt) + len(self.new) - 1


class _Cache:
    """Keys and values of the rows of a batch: for each block two tensors (slots, positions, heads * channels)."""

    def __init__(self, lm: PreTrainedModel, slots: int, positions: int):
        config = lm.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.positions = positions
        self.ready = 0  # positions with finite numbers; the others take no memory yet
        # On a CPU activations are float32 even where the weights are bfloat16.
        dtype = torch.float32 if lm.device.type == "cpu" else lm.dtype
        self.blocks = []
        for _ in range(config.num_hidden_layers):
            keys = torch.empty(slots, positions, heads * size, device=lm.device, dtype=dtype)
            self.blocks.append((keys, torch.empty_like(keys)))

    def reach(self, length: int) -> None:
        """Sets positions below `length` to zero if they were never used."""
        # Attention multiplies masked positions by 0, and 0 times uninitialised memory may be NaN.
        if length > self.ready:
            # A few more than needed, so that most steps have nothing to do.
            start, self.ready = self.ready, length + 31
            for block in self.blocks:
                for part in block:
                    part[:, start:self.ready] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a slot's first positions to another slot."""
        for block in self.blocks:
            for part in block:
                part[target, :length] = part[source, :length]


class _Step:
    """One new token of each row; takes the place of `UniqueTokens` in the fused blocks.

    Args:
        cache: the keys and values; slots 0 to n - 1 belong to the rows.
        rows: n rows.
        device: the model's device.
    """

    last = None  # as in UniqueTokens: the output of every row is read

    def __init__(self, cache: _Cache, rows: list[_Row], device: torch.device):
        self.cache, self.slots = cache, torch.arange(len(rows), device=device)
        self.ids = torch.tensor([[row.last] for row in rows], device=device)  # (n, 1)
        positions = [row.position for row in rows]
        self.length = max(positions) + 1
        cache.reach(self.length)
        self.positions = torch.tensor(positions, device=device)[:, None]  # (n, 1)
        # Rows of one length need no mask, and attention without one is faster.
        self.mask = None if min(positions) == max(positions) else (
            torch.arange(self.length, device=device) <= self.positions)[:, None, None]  # (n, 1, 1, length)

    @cached_property
    def chains(self) -> onepass.Chains:
        """Returns where each row's keys and values lie in a block's cache as rows (slots * positions, heads * channels)."""
        chain = self.slots[:, None] * self.cache.positions + torch.arange(self.length)
        return onepass.Chains(chain.flatten(), self.slots * self.length, self.positions[:, 0] + 1)

    def attention(self, heads: Heads, q: Tensor, kv: None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Adds the keys and values in q (n, C + 2 K) to the cache; returns each row's attention to all its own, (n, C)."""
        n, (C, K), size, scale = len(q), heads.widths, heads.size, heads.scale
        if rotary is not None:
            q = Rotate.rotate(q, *rotary, C + K)
        # The new token attends to itself too, so that its key and value come first.
        q, *new = q.split([C, K, K], -1)
        for part, x in zip(self.cache.blocks[heads.layer], new, strict=True):
            part[self.slots, self.positions[:, 0]] = x
        # A window is a mask like that of rows of different lengths.
        mask, narrow = self.mask, heads.window is not None and heads.window < self.length
        if narrow:
            back = self.positions - torch.arange(self.length, device=q.device)
            mask = ((back >= 0) & (back < heads.window))[:, None, None]
        if not narrow and self.length <= SHORT and by_onepass(q):
            keys, values = (part.flatten(0, 1) for part in self.cache.blocks[heads.layer])
            return onepass.attend(q, keys, values, onepass.Form(self.chains, size, scale))[0]
        keys, values = (part[:n, :self.length].unflatten(-1, (-1, size)).transpose(1, 2)
                        for part in self.cache.blocks[heads.layer])
        # Query heads that share a key head are passed as several queries of that head.
        return F.scaled_dot_product_attention(q.reshape(n, heads.counts[1], -1, size), keys, values, mask,
                                              scale=scale).reshape(n, C)


class _Batch:
    """The rows that are sampled together.

    Args:
        lm: a decoder under `fuse`.
        slots: the largest number of rows.
        positions: tokens of the longest row.
    """

    def __init__(self, lm: PreTrainedModel, slots: int, positions: int):
        self.lm, self.cache, self.rows = lm, _Cache(lm, slots, positions), []

    @torch.inference_mode()
    def add(self, rows: list[_Row]) -> None:
        """Gives rows the next slots, and computes keys and values of their prompts but for the last token."""
        # The last token of a prompt is the input of the first step.
        first = len(self.rows)
        self.rows += rows
        long = [slot for slot in range(first, len(self.rows)) if len(self.rows[slot].prompt) > 1]
        while long:
            width = max(len(self.rows[slot].prompt) for slot in long) - 1
            some, long = long[:max(1, PREFILL_TOKENS // width)], long[max(1, PREFILL_TOKENS // width):]
            self.cache.reach(width)
            # Prompts with the same beginning compute it once: see `unique_tokens`.
            prompts = [torch.tensor(self.rows[slot].prompt[:-1]) for slot in some]
            ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (B, T)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True)
            unique = unique_tokens(ids.to(self.lm.device), mask)
            unique.keep = lambda layer, *new, slots=some, unique=unique: self._keep(layer, slots, map(unique.spread, new))
            backbone_states(self.lm.base_model, unique)

    def _keep(self, layer: int, slots: list[int], new: Iterator[Tensor]) -> None:
        """Writes keys and values (B, T, K) of a block from position 0 on."""
        # Those of pads are written over by the tokens to come, and masked until then.
        slots = torch.tensor(slots)
        for part, x in zip(self.cache.blocks[layer], new, strict=True):
            part[slots, :x.shape[1]] = x

    @torch.inference_mode()
    def step(self, sampling: Sampling) -> None:
        """Samples one token of each row."""
        hidden = backbone_states(self.lm.base_model, _Step(self.cache, self.rows, self.lm.device))
        logits = self.lm.get_output_embeddings()(hidden).float()
        uniform = torch.tensor([row.uniform[len(row.new)] for row in self.rows], device=logits.device)
        for row, token in zip(self.rows, sampling.choose(logits, uniform).tolist(), strict=True):
            row.new.append(token)

    @torch.inference_mode()
    def take_out(self, slot: int) -> _Row:
        """Takes a row out; the last row gets its slot, so that the rows stay side by side in the cache."""
        row, last = self.rows[slot], self.rows.pop()
        if row is not last:
            self.rows[slot] = last
            self.cache.move(len(self.rows), slot, last.position)
        return row


def sample_together(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, *, max_new_tokens: int,
                    end: Collection[int] = (), batch_size: int = 64, first_row: int = 0,
                    progress: Callable[[int], None] = lambda tokens: None) -> Iterator[list[int]]:
    """Yields the new tokens of each text in order; see `sampling.sample_tokens`.

    Args:
        lm: a model under `fast.install` for which `takes` is true.
        batch_size: texts sampled together.
    """
    sampling = FastSampling(**asdict(sampling))
    waiting = deque(enumerate(prompts))
    batch = _Batch(lm, min(batch_size, len(prompts)), max(map(len, prompts), default=0) + max_new_tokens)
    finished: dict[int, list[int]] = {}
    following = 0
    while waiting or batch.rows:
        free = batch_size - len(batch.rows)
        # A pass over few prompts reads all weights, as one over many does: wait until a quarter of the slots is free. A
        # prompt of one token needs no such pass.
        if waiting and free and (free >= batch_size // 4 or len(waiting[0][1]) == 1):
            new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            rows = [_Row(number, prompt, uniforms(sampling.seed, first_row + number, max_new_tokens))
                    for number, prompt in new]
            batch.add(rows)
        batch.step(sampling)
        sampled = len(batch.rows)
        # From the last slot down: the row that takes a free slot has been looked at.
        for slot in reversed(range(len(batch.rows))):
            if len(batch.rows[slot].new) == max_new_tokens or batch.rows[slot].last in end:
                row = batch.take_out(slot)
                finished[row.number] = row.new
                # The tokens that an early end saves count as done.
                sampled += max_new_tokens - len(row.new)
        progress(sampled)
        # Texts finish in any order and leave in that of the prompts.
        while following in finished:
            yield finished.pop(following)
            following += 1


def takes(lm: PreTrainedModel) -> bool:
    """Returns whether `sample_together` serves a model: fused blocks, and no setting beyond those of `Sampling`."""
    # Settings such as a repetition penalty are the library's to compute.
    config = lm.generation_config
    other = set() if config is None else {name for name in config.to_diff_dict() if name not in PLAIN and name[0] != "_"}
    # Caps of scores and logits (Gemma 2) are the library's too.
    capped = any(getattr(lm.config, f"{name}_logit_softcapping", None) for name in ("attn", "final"))
    return is_fused(lm.base_model) and not other and not capped
