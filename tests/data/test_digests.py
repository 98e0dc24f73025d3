"""What decides a base's results is in its digests, and what does not is not."""

import pytest
import toy
from transformers import AutoTokenizer, BertTokenizerLegacy, LlamaConfig

from data.backbones import load_config, load_tokenizer
from data.digests import config_digest, tokenizer_digest


@pytest.fixture
def model(tmp_path):
    return toy.write_model(tmp_path / "model")


def test_a_config_that_computes_something_else_has_another_digest(model):
    config = load_config(str(model))
    digest = config_digest(config)
    config.num_labels, config.name_or_path, config.use_cache = 5, "elsewhere", False
    assert config_digest(config) == digest
    toy.other_config(model)
    assert config_digest(load_config(str(model))) != digest
    assert config_digest(LlamaConfig(rope_theta=1e4)) != config_digest(LlamaConfig(rope_theta=1e5))


def test_a_tokenizer_of_other_merges_has_another_digest(model):
    tokenizer = load_tokenizer(str(model))
    digest = tokenizer_digest(tokenizer)
    tokenizer.pad_token = None
    tokenizer("the cat sat", truncation=True, max_length=2)  # which sets its backend's truncation
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(AutoTokenizer.from_pretrained(model))
    toy.other_tokenizer(model)
    assert tokenizer_digest(load_tokenizer(str(model))) != digest


def test_a_tokenizer_written_in_python_is_told_by_its_vocabulary(tmp_path):
    digests = set()
    for name, words in (("a", ("the", "cat")), ("b", ("cat", "the")), ("c", ("the", "cat"))):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)))
        tokenizer = BertTokenizerLegacy(path)
        assert not tokenizer.is_fast
        digests.add(tokenizer_digest(tokenizer))
    assert len(digests) == 2
