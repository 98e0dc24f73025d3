"""A dozen architectures through run.py, one for each way of being different: an outcome for the table of each."""
import json
from types import SimpleNamespace

import pytest
from transformers import BertForMaskedLM

from benchmarks import architectures
from benchmarks.architectures import TRIALS, attempt, config_of, write_checkpoint, write_cola, write_tokenizer

pytestmark = [pytest.mark.slow] + [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning:transformers", "UserWarning:peft", "peft.utils.warning.PeftWarning", "UserWarning:model")]
NOT_CACHED = "works, not cached: "


def outcome(architecture: str, trials: tuple[str, ...], work) -> list[str]:
    write_cola(work / "cola")
    write_checkpoint(architecture, work / "base")
    return [attempt(TRIALS[name], work) for name in trials]


@pytest.mark.parametrize("architecture, trial, expected", [
    ("deberta", "--layers 1", "works"),  # blocks return tuples
    ("t5", "--layers 1", NOT_CACHED + "what follows them depends on more than their hidden states"),  # position bias
    ("eurobert", "--method head", "works"),  # the mean of all tokens is read
    ("bart", "--method full", "works"),  # tied weights; an encoder and a decoder
    ("xlnet", "--method head", NOT_CACHED + "sentences of each length are computed on their own"),  # the last column is read
    ("ctrl", "LoRA", "works"),  # no pad token, a head under another name
    ("gemma3", "--layers 1", "works"),  # text beside images
    ("deepseek_v3", "LoRA", "works"),  # blocks of two kinds
    ("albert", "--layers 1", "--layers 1: expected block numbers 0 to 0, such as 0-0"),  # one block, many times
    ("squeezebert", "LoRA", "--method lora: the blocks of a squeezebert model have no linear layer that can be adapted; "
                            "expected --method head, full or none"),
    ("perceiver", "--method head", "--model NAME: the head of a perceiver classifier is a part of its backbone; expected "
                                   "one apart from it, which alone is trained and saved"),
    ("reformer", "LoRA", "--model NAME: a reformer classifier draws random numbers in evaluation too; the same sentence "
                         "would have other logits each time")])
def test_an_architecture_works_or_is_refused_in_one_line(tmp_path, architecture, trial, expected):
    assert outcome(architecture, (trial,), tmp_path) == [expected]


@pytest.mark.parametrize("architecture", ["mt5", "modernvbert"])  # a weight asked for its type; two modules called head
def test_adapters_are_exchanged_with_peft(tmp_path, architecture):
    assert outcome(architecture, ("LoRA", "adapter to PEFT", "adapter from PEFT"), tmp_path) == ["works"] * 3


def test_a_pooler_that_the_checkpoint_lacks_is_trained_saved_and_exchanged(tmp_path):
    """BERT as people publish it: a masked language model."""
    write_cola(tmp_path / "cola")
    BertForMaskedLM(config_of("bert")).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    for name in ("LoRA", "--layers 1", "--method head", "adapter to PEFT", "adapter from PEFT"):
        assert attempt(TRIALS[name], tmp_path) == "works", name


def test_what_is_no_refusal_is_a_failure(tmp_path, monkeypatch):
    """A traceback, and figures of `eval` that are not the summary's."""
    write_cola(tmp_path / "cola")
    write_checkpoint("gpt2", tmp_path / "base")
    assert attempt(lambda work: 1 / 0, tmp_path).startswith("FAILED: ")
    with monkeypatch.context() as patch:
        patch.setattr(architectures.toy, "main", lambda *arguments: {}[1])
        assert attempt(TRIALS["LoRA"], tmp_path).startswith("FAILED: ")
    wrong = SimpleNamespace(loads=lambda text: json.loads(text) | ({} if '"sr"' in text else {"loss": 9.0}))
    monkeypatch.setattr(architectures, "json", wrong)
    assert attempt(TRIALS["LoRA"], tmp_path).startswith("FAILED: eval gives loss 9.0")
