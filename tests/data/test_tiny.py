"""The tiny GPT-2: loads in `transformers`, the same bytes each time, and a cache that is whole or absent."""

import importlib.util
import re
from pathlib import Path

import pytest

from data import grammar, tiny


@pytest.fixture
def quick(monkeypatch):
    """A model that takes a second."""
    for name, value in {"STEPS": 3, "TOKENS_PER_STEP": 64, "LAYERS": 1, "CHANNELS": 16, "HEADS": 2}.items():
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(grammar, "N_CORPUS", 300)


def test_the_model_loads_in_transformers_and_is_reused(quick, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    folder = tiny.tiny_model_folder(tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert folder.parent == tmp_path / "lora-distil" and re.fullmatch(r"tiny-[0-9a-f]{12}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>" and tokenizer.pad_token is None
    assert model.config.model_type == "gpt2" and model.config.activation_function == "gelu_new"
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.vocab_size == len(tokenizer)
    text = "Which naïve boy – 7 of them – smiled?\n"  # byte-level: nothing is unknown
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    with torch.no_grad():
        assert model(**tokenizer("The boy smiled.", return_tensors="pt")).logits.isfinite().all()

    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tiny.tiny_model_folder(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_the_model_is_the_same_bytes_each_time_and_in_the_users_cache(quick, tmp_path, monkeypatch):
    import torch

    files = {}
    for seed, name in enumerate(("a", "b")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        torch.manual_seed(seed)
        folder = tiny.tiny_model_folder()
        assert folder.is_relative_to(tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files["a"] == files["b"]


def test_an_interrupted_training_leaves_no_folder_and_the_next_call_succeeds(quick, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)  # after the model's own files are written
        tiny.tiny_model_folder(tmp_path)
    assert not [path for path in (tmp_path / "lora-distil").iterdir() if path.is_dir()]

    # A killed process cleans nothing up: its half-written folder must not be taken for a whole one, nor stay.
    folder = tiny.tiny_model_folder(tmp_path)
    folder.rename(folder.with_suffix(".partial"))
    (folder.with_suffix(".partial") / "config.json").unlink()
    assert (tiny.tiny_model_folder(tmp_path) / "config.json").exists()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_two_callers_at_once_train_it_once(quick, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    trainings, train = [], tiny.train_model
    monkeypatch.setattr(tiny, "train_model", lambda folder: (trainings.append(folder), train(folder)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(tiny.tiny_model_folder, [tmp_path] * 2)
    assert first == second and len(trainings) == 1 and (first / "model.safetensors").exists()


def test_importing_tiny_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, data.tiny; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny.Path(tiny.__file__).parents[1])


def test_the_key_follows_what_decides_the_weights_and_nothing_else(monkeypatch, tmp_path):
    key = tiny.recipe()
    assert tiny.recipe() == key
    (tmp_path / "moved.py").write_text("# moved, with another comment\n" + Path(tiny.__file__).read_text())
    spec = importlib.util.spec_from_file_location("moved", tmp_path / "moved.py")
    moved = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(moved)
    assert moved.recipe() == key  # a moved or commented file does not train everybody's model anew
    for module, name, value in ((tiny, "STEPS", 7), (tiny, "CHANNELS", 64), (grammar, "SEED", 1), (grammar, "N_CORPUS", 9),
                                (tiny, "version", lambda name: "0.0.1"),
                                (grammar, "LEXICON", grammar.LEXICON | {"place": "garden kitchen station barn"})):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert tiny.recipe() != key, name


def test_words_outside_the_corpus_are_unknown_and_all_of_its_own_are_known(quick):
    corpus = grammar.draw_corpus()
    tokenizer = tiny.train_tokenizer(corpus)
    assert [text for text in corpus if tiny.unknown_words(tokenizer, text)] == []
    # Case, digits and signs say nothing about a word.
    assert tiny.unknown_words(tokenizer, corpus[0].lower()) == []
    assert tiny.unknown_words(tokenizer, f"The cat, {corpus[0]} 7 the Cat naïve!") == ["cat", "Cat", "naïve"]
