"""Texts to classes: which texts count as cut."""
import pytest
import torch
from conftest import write_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from machine.errors import UserError
from serving.texts import Reading, classify

LONG = "The cat sat on the mat."


@pytest.fixture(scope="module", params=["bare", "with special tokens"])
def tokenizer(request, tmp_path_factory):
    made = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    if request.param == "bare":
        return made
    backend = type(made.backend_tokenizer).from_str(made.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def answers(tokenizer, *rows) -> list:
    return classify(tokenizer, list(rows), lambda batch, _: torch.zeros(len(batch.rows), 2))


@pytest.mark.parametrize("truncate", ["tail", "head", "middle"])
@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_a_text_says_that_it_was_cut_if_and_only_if_it_was(tokenizer, truncate):
    length = len(tokenizer(LONG)["input_ids"])
    assert length > 5
    for max_length, cut in ((length - 1, True), (length, False), (length + 1, False), (4, True)):
        reading = Reading(("a", "b"), max_length, truncate)
        answer, = answers(tokenizer, (reading, LONG))
        assert answer.get("truncated", False) is cut and ("truncated" in answer) is cut


@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_each_row_says_it_of_itself(tokenizer):
    length = len(tokenizer(LONG)["input_ids"])
    short, exact, wide = (Reading(("a", "b"), size) for size in (length - 1, length, 99))
    found = answers(tokenizer, (wide, LONG), (short, LONG), (short, " "), (exact, LONG), (short, "cat"),
                    (exact, f"{LONG} cat"))
    assert isinstance(found[2], UserError)
    assert ["truncated" in answer for answer in found if isinstance(answer, dict)] == [False, True, False, False, True]
