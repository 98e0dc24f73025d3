"""A merged checkpoint against the classifier it came from, read by `transformers` alone."""
import json
import re
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, adapted, one_line, write_tokenizer
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

import data_utils
from machine.errors import UserError
from model import lora_layers
from serving import merge
from serving.texts import Reading

READING = Reading(("a", "b"), 32)
SENTENCES = ["The cat sat on the mat.", "A dog", "cat", "The dog ran to the mat on the cat."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_gives_the_same_logits_in_padded_batches(tmp_path, tokenizer, architecture, monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)
    classes, made = ["good", "bad"], adapted(architecture)
    with torch.inference_mode():
        expected = torch.cat([made(torch.tensor([tokenizer(text)["input_ids"]]), torch.ones(
            1, len(tokenizer(text)["input_ids"]), dtype=torch.long)) for text in SENTENCES])
        merge.write_checkpoint(made, tokenizer, Reading(tuple(classes), 32), SENTENCES, tmp_path / "out", say=lambda _: None)
        read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        batch = AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES, padding=True, return_tensors="pt")
        logits = read(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not batch["attention_mask"].all() and expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.id2label, config.label2id) == ({0: "good", 1: "bad"}, {"good": 0, "bad": 1})
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    found = pipeline("text-classification", str(tmp_path / "out"), device="cpu")(SENTENCES, batch_size=4)
    for row, answer in zip(expected.softmax(-1), found, strict=True):
        assert answer["label"] == classes[int(row.argmax())] and answer["score"] == pytest.approx(float(row.max()), abs=1e-5)


@pytest.mark.parametrize("where", ["adapter", "head"])
def test_what_is_not_finite_refuses_and_leaves_nothing(tmp_path, tokenizer, monkeypatch, where):
    monkeypatch.setattr("conftest.VOCAB", 280)
    made = adapted("gpt2")
    with torch.no_grad():
        weight = next(iter(lora_layers(made.net).values())).lora_B if where == "adapter" else made.net.score.weight
        weight[0, 0] = torch.nan
    with pytest.raises(UserError) as error:
        merge.write_checkpoint(made, tokenizer, READING, SENTENCES, tmp_path / "out")
    assert "not finite; nothing was merged" in one_line(error)
    assert list(tmp_path.iterdir()) == []


LONG = "The cat ran to the mat and the dog sat on the cat, and then the dog ran."


def merged(tokenizer, out, truncate: str, sentences=SENTENCES, max_length: int = 8) -> tuple[list[str], torch.Tensor]:
    """What merging said, and the run's own logits of LONG."""
    said, made = [], adapted("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = data_utils.encode(tokenizer, [LONG], max_length, truncate)
        with torch.inference_mode():
            expected = made(torch.tensor(ids), torch.ones(1, len(ids[0]), dtype=torch.long)).softmax(-1)[0]
        merge.write_checkpoint(made, tokenizer, Reading(("a", "b"), max_length, truncate), sentences, out, say=said.append)
    return said, expected


@pytest.mark.parametrize("truncate", ["tail", "head"])
def test_the_pipeline_cuts_a_long_text_as_the_run_did(tmp_path, tokenizer, monkeypatch, truncate):
    monkeypatch.setattr("conftest.VOCAB", 280)
    said, expected = merged(tokenizer, tmp_path / "out", truncate)
    assert len(tokenizer(LONG)["input_ids"]) > 8 and len(said) == 2 and "equal the run's" in said[0]
    classify = pipeline("text-classification", str(tmp_path / "out"), device="cpu", top_k=None)
    answers = classify([LONG, "A dog"], batch_size=2, truncation=True)
    assert {one["label"]: one["score"] for one in answers[0]} == pytest.approx(
        dict(zip("ab", expected.tolist(), strict=True)), abs=1e-5)


def test_a_middle_that_no_tokenizer_cuts_is_said_with_the_way_to_cut_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)
    said, expected = merged(tokenizer, tmp_path / "out", "middle", [*SENTENCES, LONG])
    long = sum(len(tokenizer(text)["input_ids"]) > 8 for text in (*SENTENCES, LONG))
    cut = [line for line in said if "the run cut the middle, the checkpoint's tokenizer cuts the tail" in line]
    assert len(cut) == 1 and cut[0].endswith(f"{long} of 5 sentences are so long") and 1 <= long < 5
    front, back = map(int, re.search(r"ids\[:(\d+)\] \+ ids\[-(\d+):\]", said[-1]).groups())
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(LONG)["input_ids"]
    with torch.inference_mode():
        by_hand = read(input_ids=torch.tensor([ids[:front] + ids[-back:]])).logits.softmax(-1)[0]
        by_itself = read(input_ids=torch.tensor([ids[:8]])).logits.softmax(-1)[0]
    torch.testing.assert_close(by_hand, expected, atol=1e-5, rtol=1e-5)
    assert (by_itself - expected).abs().max() > 1e-3


@pytest.mark.parametrize("template", ["$A", "<|endoftext|> $A", "$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"])
@pytest.mark.parametrize("max_length", [5, 8, 9])
def test_the_ends_that_are_kept_are_those_of_the_run(tokenizer, template, max_length):
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|endoftext|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    front, back = merge.kept_ends(made, max_length)
    ids = made(LONG)["input_ids"]
    with pytest.warns(UserWarning, match="middle cut"):
        assert data_utils.encode(made, [LONG], max_length, "middle") == [ids[:front] + ids[-back:]]


def test_the_check_sees_a_tokenizer_that_reads_otherwise(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)
    whole = merge.tokenizer_files

    def without_a_merge(made) -> dict[str, bytes]:
        files = whole(made)
        content = json.loads(files["tokenizer.json"])
        content["model"]["merges"] = content["model"]["merges"][:3]
        return {**files, "tokenizer.json": json.dumps(content).encode()}
    monkeypatch.setattr(merge, "tokenizer_files", without_a_merge)
    with pytest.raises(UserError) as error:
        merge.write_checkpoint(adapted("gpt2"), tokenizer, READING, SENTENCES, tmp_path / "out", say=lambda _: None)
    assert "the written tokenizer makes other tokens of 'The cat sat on the mat.'" in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture, says", [("gpt2", True), ("llama", True), ("bert", False)])
def test_a_text_that_ends_with_the_pad_token_is_said_where_it_matters(tmp_path, tokenizer, architecture, says, monkeypatch):
    """One inside the text is right, as is one at the end for an encoder, which pools at its first token."""
    monkeypatch.setattr("conftest.VOCAB", 280)
    said, made = [], adapted(architecture)
    texts = [*SENTENCES, "A cat<|endoftext|> sat", "<|endoftext|>A cat", "A cat<|endoftext|>"]
    merge.write_checkpoint(made, tokenizer, READING, texts, tmp_path / "out", say=said.append)
    assert f"equal the run's on {6} sentences" in said[0]
    assert any("a text that ends with <|endoftext|>, the pad token" in line and "1 of the 7 sentences" in line
               for line in said) == says
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for text, right in ((texts[-3], True), (texts[-2], True), (texts[-1], not says)):
        ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]])
        with torch.inference_mode():
            theirs, ours = read(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, made(ids, torch.ones_like(ids))
        assert torch.allclose(theirs, ours, atol=1e-5) == right


def test_a_checkpoint_that_answers_otherwise_is_not_left(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)
    monkeypatch.setattr(merge.peft_layout, "merge_adapter", lambda net: None)
    with pytest.raises(UserError, match="logits differ from the run's"):
        merge.write_checkpoint(adapted("gpt2"), tokenizer, READING, SENTENCES, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pad_token_is_never_the_one_that_ends_each_text(tmp_path, tokenizer):
    assert merge.for_others(tokenizer, 9, "tail").pad_token == tokenizer.eos_token and tokenizer.pad_token is None
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    closing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="Ġ")
    assert merge.for_others(closing, 9, "tail").pad_token == "Ġ"
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert merge.for_others(bare, 9, "tail").pad_token is None
    with pytest.raises(UserError, match="no pad token"):
        merge.write_checkpoint(adapted("gpt2"), bare, READING, SENTENCES, tmp_path / "out")
