"""Pairs of texts: token ids and token types are the tokenizer's own, and reach the model."""
import problem_runs
import pytest
import torch
from conftest import write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from data.segments import add_token_types, read_pairs, split_pair, token_types
from data_utils import encode
from machine.errors import UserError

WORDS = st.lists(st.sampled_from(problem_runs.WORDS), max_size=12).map(" ".join)
SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    found = AutoTokenizer.from_pretrained(problem_runs.write_bert(tmp_path_factory.mktemp("bert")))
    read_pairs(found)
    return found


@SHARED
@given(first=WORDS, second=WORDS, length=st.integers(6, 30), side=st.sampled_from(["tail", "head"]))
@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_a_pair_is_the_tokenizers_and_the_longer_text_is_cut(tokenizer, first, second, length, side):
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path, truncation_side={"tail": "right", "head": "left"}[side])
    expected = plain([first], [second], truncation="longest_first", max_length=length)
    ids = encode(tokenizer, [f"{first} [SEP] {second}", "cat [SEP] dog"], length, side)
    assert ids[0] == expected["input_ids"][0]
    assert token_types(torch.tensor(ids[:1]), tokenizer.sep_token_id).tolist() == expected["token_type_ids"]


def test_token_types_reach_the_model(tokenizer):
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.2)).eval()
    inputs = tokenizer("the cat", "a red bird", return_tensors="pt")
    assert inputs["token_type_ids"].sum() == 4
    expected, without = net(**inputs).logits, net(input_ids=inputs["input_ids"]).logits
    assert (expected - without).abs().max() > 1e-3
    assert add_token_types(net, tokenizer)
    torch.testing.assert_close(net(input_ids=inputs["input_ids"]).logits, expected)


def test_a_decoder_reads_a_pair_as_one_text_with_its_mark_in_between(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    whole = tokenizer("The cat <|endoftext|> A dog")["input_ids"]
    read_pairs(tokenizer)
    assert encode(tokenizer, ["The cat <|endoftext|> A dog", "The cat\tA dog"], 32) == [whole, whole]


def test_the_middle_of_a_pair_is_not_cut(tokenizer):
    with pytest.raises(UserError, match="--truncate middle: not for pairs"):
        encode(tokenizer, ["the cat saw a dog [SEP] a red bird"], 6, "middle")
    with pytest.raises(UserError, match="--max-length 4: no room for two texts"):
        encode(tokenizer, ["the cat saw a dog [SEP] a red bird"], 4)


def test_a_pair_has_its_separator_or_a_tab():
    assert split_pair("a [SEP] b [SEP] c", " [SEP] ") == ("a", "b [SEP] c")
    assert split_pair("a\tb", " [SEP] ") == ("a", "b") and split_pair("a", " [SEP] ") is None
