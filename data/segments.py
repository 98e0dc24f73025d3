"""Pairs of texts: joined by the tokenizer, and told apart in the model by token types where it has them.

    read_pairs(tokenizer)                        # from now on `data_utils.encode` reads "first [SEP] second" as a pair
    add_token_types(classifier.net, tokenizer)   # and BERT learns the text of each token

A pair stands in a split as one text with the tokenizer's separator in it, so that whatever reads texts reads pairs too.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def separator_of(tokenizer) -> str:
    """Returns the text between several text columns: the tokenizer's separator, or else its end-of-text mark."""
    mark = tokenizer.sep_token or tokenizer.eos_token
    return f" {mark} " if mark else " "


def read_pairs(tokenizer) -> None:
    """Marks a tokenizer as one that reads pairs."""
    tokenizer.pair_separator = separator_of(tokenizer)


def read_single_texts(tokenizer) -> None:
    """Takes the mark of `read_pairs` away."""
    tokenizer.pair_separator = None


def reads_pairs(tokenizer) -> bool:
    """Returns whether `read_pairs` was called."""
    return getattr(tokenizer, "pair_separator", None) is not None


def split_pair(text: str, separator: str) -> tuple[str, str] | None:
    """Returns the two texts of a pair, around its first separator or its first tab; None if it has neither."""
    first, found, second = text.partition(separator)
    if not found:
        first, found, second = text.partition("\t")
    return (first, second) if found else None


def joins_pairs(tokenizer) -> bool:
    """Returns whether the tokenizer itself puts a token between two texts; GPT-2's does not."""
    mask = tokenizer("a", "a", return_special_tokens_mask=True)["special_tokens_mask"]
    first = mask.index(0)
    return 1 in mask[first:len(mask) - mask[::-1].index(0)]


def arguments_of(tokenizer, texts: list[str]) -> tuple[list[str], ...]:
    """Returns the arguments of a tokenizer for texts: the texts, or the first and the second ones of pairs.

    A tokenizer that puts no token between two texts (GPT-2's) gets them as one, with its end-of-text mark in between. A text
    without a separator is the first of a pair; the second is empty.
    """
    if not reads_pairs(tokenizer):
        return (texts,)
    separator = tokenizer.pair_separator
    pairs = [split_pair(text, separator) or (text, "") for text in texts]
    if not joins_pairs(tokenizer):
        return ([separator.join(pair) for pair in pairs],)
    return tuple(map(list, zip(*pairs, strict=True)))


def token_types(input_ids: Tensor, separator: int) -> Tensor:
    """Returns 0 for each token up to the first separator, and 1 after it: (B, T) -> (B, T).

    That is BERT's [CLS] first [SEP] second [SEP] (Devlin et al. 2019, figure 2); pads are masked, whatever their type.
    """
    marks = (input_ids == separator).long()
    return (marks.cumsum(1) - marks).clamp(max=1)


def add_token_types(net: nn.Module, tokenizer) -> RemovableHandle | None:
    """Gives the embeddings of a backbone the token types of pairs; None if it has no such types.

    A hook on the embeddings serves every way through the model, and is traced with it. The handle takes it away.
    """
    types = getattr(net.config, "type_vocab_size", 0) or 0
    module = next((module for name, module in net.named_modules() if name.endswith("embeddings")
                   and hasattr(module, "token_type_embeddings")), None)
    # RoBERTa has one type, and its separator comes twice.
    if types < 2 or module is None or "token_type_ids" not in tokenizer.model_input_names:
        return None
    separator = tokenizer.sep_token_id

    def fill(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and len(args) < 2:
            kwargs = {**kwargs, "token_type_ids": token_types(ids, separator)}
        return args, kwargs

    return module.register_forward_pre_hook(fill, with_kwargs=True)
