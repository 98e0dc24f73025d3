"""A distillation in stages of texts that are longer than the model's positions: cut, said, and no crash."""
import warnings

import pytest
import torch
import toy
from conftest import gpt2_lm
from transformers import AutoTokenizer

from data.backbones import max_length_of
from distillation import writer
from distillation.cache import Cache
from distillation.labels import Labeller
from distillation.writer import Writer, border_token
from machine.errors import UserError
from model import load_classifier
from options.schema import DistilOptions
from record.files import read_json

SMALL = ("--embedding-size", 6, "--hidden-size", 5, "--epochs", 1, "--batch-size", 8, "--augment", 12, "--pretrain", 1,
         "--transfer", 1, "--match-size", 4, "--stage-tokens", 64, "--no-plots")


def write_long(folder, times: int):
    """Writes a CoLA folder whose sentences are repeated: the model has 64 positions."""
    toy.write_cola(folder)
    for file in toy.COLA_FILES:
        rows = [line.split("\t") for line in (folder / file).read_text().splitlines()]
        (folder / file).write_text("".join("\t".join([*row[:3], " ".join([row[3]] * times)]) + "\n" for row in rows))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A base, long texts, and a teacher that was trained on them."""
    folder = tmp_path_factory.mktemp("long")
    toy.write_model(folder / "model")
    write_long(folder / "cola", 30)
    assert toy.main("LoRA", "12345", "--model", folder / "model", "--data", folder / "cola", "--epochs", 1, "--batch-size",
                    8, "--out", folder / "LoRA", "--no-plots") == 0
    return folder


@pytest.mark.parametrize("more", [(), ("--max-length", 500), ("--match", "none")], ids=str)
def test_a_distillation_in_stages_reads_no_more_than_the_positions(long, tmp_path, more):
    (tmp_path / "plain.txt").write_text("\n".join(" ".join([one] * 25) for one, _ in toy.toy_rows(20, 9)))
    assert toy.main("distil", "12345", "--teacher", long / "LoRA", "--text", tmp_path / "plain.txt", *SMALL, *more,
                    "--out", tmp_path / "run") == 0
    assert set(read_json(tmp_path / "run" / "summary.json")) >= {"student", "scratch"}


def test_components_are_those_of_cut_sentences(long, tmp_path):
    classifier, _ = load_classifier(str(long / "model"), 2)
    tokenizer = AutoTokenizer.from_pretrained(long / "model")
    labeller = Labeller(Cache(tmp_path, lambda: None), classifier.eval(), "key", tokenizer,
                        [" ".join(["the cat saw a dog"] * 100)] * 4 + ["a red bird fed the cat"] * 4,
                        DistilOptions(tmp_path, match_size=4))
    with warnings.catch_warnings(record=True):
        pca, scale = labeller.components()
    assert torch.isfinite(pca.std).all() and torch.isfinite(scale).all()


def test_a_writer_of_long_sentences_stays_within_the_positions(tmp_path, monkeypatch):
    lm, asked = gpt2_lm(), []
    monkeypatch.setattr(Writer, "language_model", lambda self: lm)

    def sampled(lm, tokenizer, count: int, most: int, *_) -> list[str]:
        asked.append(most)
        return ["a b"] * count
    monkeypatch.setattr(writer, "sample_sentences", sampled)
    long = Writer(Cache(tmp_path / "a", lambda: None), "x", None, ["word " * 50], 8)
    short = Writer(Cache(tmp_path / "b", lambda: None), "x", None, ["word " * 3], 8)
    for one in (long, short):
        one.cache.folder.mkdir()
        assert next(one.written(1)) == "a b"
    assert max(asked) == max_length_of(lm) - 1 and min(asked) == 9


def test_a_tokenizer_without_an_end_token_is_one_line():
    class Endless:
        eos_token_id = bos_token_id = None

        def get_vocab(self):
            return {"a": 0}
    with pytest.raises(UserError, match="--augment: the teacher's tokenizer has no end token.*; expected --augment 0"):
        border_token(Endless())
