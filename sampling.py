"""Samples texts from a causal language model, token by token, with random numbers of their own for each text.

    for tokens in sample_tokens(lm, [[bos]] * 10, Sampling(seed=1), max_new_tokens=40, end={eos}): ...     # of each text

The reference: one text at a time through `transformers.generate`, with its cache of keys and values and every setting of the
model's generation_config.json. `fast/generation.py` samples many texts together and gives the same ones up to rounding.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """The rule that chooses a token, in the order of `transformers`: temperature, then top_k, then top_p."""

    greedy: bool = False  # the likeliest token
    temperature: float = 1.0
    top_k: int = 0  # sample from the k likeliest; 0: all
    top_p: float = 1.0  # sample from the fewest likeliest that hold this probability (Holtzman et al. 2020)
    seed: int = 0  # of all random numbers

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Chooses a token for each text.

        Args:
            logits: (n, V) float32.
            uniform: (n,) random numbers from [0, 1): they decide.

        Returns:
            (n,) token ids.
        """
        if self.greedy:
            return logits.argmax(-1)
        logits = logits / self.temperature
        # Sorted, the k likeliest and the nucleus are the first columns; `tokens` leads back to the ids.
        tokens = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        if self.top_k > 0 or self.top_p < 1:
            logits, tokens = logits.sort(descending=True)
        if self.top_k > 0:
            logits = logits[:, :self.top_k]
        p = logits.softmax(-1)
        # A token stays if the likelier ones together hold less than top_p; the likeliest always stays.
        p = p * (p.cumsum(-1) - p < self.top_p)
        # Inverse of the cumulative distribution. The bound keeps rounding from leading past the last token that stays.
        sums = p.cumsum(-1)
        total = sums[:, -1:]
        at = torch.minimum(uniform[:, None].to(p.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
        return tokens.gather(1, torch.searchsorted(sums, at, right=True))[:, 0]


def uniforms(seed: int, row: int, count: int) -> list[float]:
    """Returns a text's random numbers; the first ones are the same for every count."""
    # A generator for each text: a text does not depend on the number of texts before it.
    return np.random.default_rng([seed, row]).random(count, dtype=np.float32).tolist()


class ChosenToken(LogitsProcessor):
    """Leaves `transformers.generate` one token at each step: the one that `Sampling.choose` chose."""

    def __init__(self, sampling: Sampling, prompt: int, uniform: list[float]):
        self.sampling, self.prompt, self.uniform = sampling, prompt, uniform

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (1, T), (1, V) -> (1, V)
        step = input_ids.shape[1] - self.prompt
        token = self.sampling.choose(scores.float(), torch.tensor([self.uniform[step]], device=scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def sample_tokens(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, *, max_new_tokens: int,
                  end: Collection[int] = (), first_row: int = 0,
                  progress: Callable[[int], None] = lambda tokens: None) -> Iterator[list[int]]:
    """Yields the new tokens of each text in order; the end token, if one was sampled, is the last.

    Args:
        lm: in evaluation mode.
        prompts: token ids of each text, at least one; with the new tokens they must fit the model's context.
        sampling: the rule for a token, and the seed.
        max_new_tokens: of each text.
        end: a text is finished with one of these tokens.
        first_row: number of the first text; a text's random numbers depend on the seed and its number alone.
        progress: called with the number of tokens done: sampled, or saved by an early end.
    """
    config = copy.deepcopy(lm.generation_config)
    # Greedy for the library: `ChosenToken` has chosen already.
    config.do_sample, config.temperature, config.top_k, config.top_p = False, 1.0, 50, 1.0
    config.max_new_tokens, config.use_cache = max_new_tokens, True
    config.eos_token_id, config.pad_token_id = list(end) or None, next(iter(end), 0)
    for row, prompt in enumerate(prompts, first_row):
        ids = torch.tensor([prompt], device=lm.device)
        choose = ChosenToken(sampling, len(prompt), uniforms(sampling.seed, row, max_new_tokens))
        with torch.inference_mode():
            out = lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config,
                              logits_processor=LogitsProcessorList([choose]))
        progress(max_new_tokens)
        yield out[0, len(prompt):].tolist()
