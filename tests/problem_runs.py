"""Toy models and toy data of the other problems: a BERT with token types, pairs with scores, texts with several labels."""
import json
import random
from pathlib import Path

import toy

WORDS = toy.WORDS
LABELS = ("animal", "colour", "verb")
OF_LABEL = {"animal": {"cat", "dog", "bird"}, "colour": {"red"}, "verb": {"saw", "fed"}}


def write_bert(folder: Path) -> Path:
    """Writes a BERT of two layers with random weights, two token types and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    BertTokenizer(tokenizer_object=backend).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)).save_pretrained(folder)
    return folder


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 6)))


def write_scores(folder: Path, train: int = 40, dev: int = 20) -> Path:
    """Writes pairs of sentences with scores from 0 to 5: five times the share of the first one's words in the second."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, rows) in enumerate((("train", train), ("dev", dev))):
        draw, lines = random.Random(seed), ["sentence1,sentence2,score"]
        for _ in range(rows):
            one, other = sentence(draw), sentence(draw)
            words = set(one.split())
            lines.append(f"{one},{other},{5 * len(words & set(other.split())) / len(words):.3f}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_label_sets(folder: Path, train: int = 40, dev: int = 20) -> Path:
    """Writes sentences with the labels of their words, lists in JSON Lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, rows) in enumerate((("train", train), ("dev", dev))):
        draw, lines = random.Random(seed), []
        for _ in range(rows):
            text = sentence(draw)
            labels = [label for label in LABELS if OF_LABEL[label] & set(text.split())]
            lines.append(json.dumps({"text": text, "labels": labels}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SCORES = ("--text-column", "sentence1,sentence2", "--label-column", "score")
SETS = ("--label-column", "labels")
