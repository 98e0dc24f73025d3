"""A merged checkpoint against the classifier it came from, read by `transformers` alone."""
import pytest
import torch
from conftest import ARCHITECTURES, adapted, one_line, write_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from machine.errors import UserError
from model import lora_layers
from serving import merge

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
        merge.write_checkpoint(made, tokenizer, classes, SENTENCES, tmp_path / "out", max_length=32, say=lambda _: None)
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
        merge.write_checkpoint(made, tokenizer, ["a", "b"], SENTENCES, tmp_path / "out", max_length=32)
    assert "not finite; nothing was merged" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_answers_otherwise_is_not_left(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)
    monkeypatch.setattr(merge.adapters, "merge_adapter", lambda net: None)
    with pytest.raises(UserError, match="logits differ from the run's"):
        merge.write_checkpoint(adapted("gpt2"), tokenizer, ["a", "b"], SENTENCES, tmp_path / "out", max_length=32)
    assert list(tmp_path.iterdir()) == []


def test_a_pad_token_is_never_the_one_that_ends_each_text(tmp_path, tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    assert merge.for_others(tokenizer, 9, "tail").pad_token == tokenizer.eos_token and tokenizer.pad_token is None
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    closing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="Ġ")
    assert merge.for_others(closing, 9, "tail").pad_token == "Ġ"
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert merge.for_others(bare, 9, "tail").pad_token is None
    with pytest.raises(UserError, match="no pad token"):
        merge.write_checkpoint(adapted("gpt2"), bare, ["a", "b"], SENTENCES, tmp_path / "out", max_length=32)
