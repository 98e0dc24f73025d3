"""The embedded task and its language model: format, no leaks between files, and a cache that is whole or absent."""

import csv
import random
import re

import pytest

from data import tiny

FILES = {"in_domain_train.tsv": 4000, "in_domain_dev.tsv": 500, "out_of_domain_dev.tsv": 500}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Each file's rows: (source, label, mark, sentence), all strings."""
    folder = tmp_path_factory.mktemp("task")
    tiny.write_tiny_task(folder)
    rows = {}
    for name in FILES:
        with open(folder / name, encoding="utf-8", newline="") as file:
            rows[name] = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows


@pytest.fixture(scope="module")
def corpus():
    return tiny.draw_corpus()


def words(sentence):
    return set(re.findall(r"\w+", sentence.lower()))


def open_words(which):
    """Every form of every word of the open classes."""
    forms = set()
    for kind, entries in tiny.lexicon(which).items():
        for entry in (entry.partition(":")[0] for entry in entries):
            if kind in ("m", "f", "n", "thing", "place"):
                singular, _, plural = entry.partition("/")
                forms |= {singular, plural or tiny.add_s(singular)}
            elif kind.startswith("name"):
                forms.add(entry.lower())
            else:
                forms |= {entry} if kind in ("old", "heavy") else set(tiny.inflect(entry))
    return forms


def test_files_have_colas_format_and_the_stated_sizes(task):
    assert {name: len(rows) for name, rows in task.items()} == FILES
    for rows in task.values():
        for source, label, mark, sentence in rows:
            assert source in {**tiny.IN_DOMAIN, **tiny.HELD_OUT}
            assert (label, mark) in {("1", ""), ("0", "*")}
            assert re.fullmatch(r"[A-Z][A-Za-z ]*[.?]", sentence) and "  " not in sentence, sentence
        assert 0.6 <= sum(row[1] == "1" for row in rows) / len(rows) <= 0.7


def test_the_task_is_the_same_bytes_each_time_and_leaves_the_callers_random_state(tmp_path):
    random.seed(1)
    state = random.getstate()
    for name in ("a", "b"):
        tiny.write_tiny_task(tmp_path / "made" / name)
    assert random.getstate() == state
    for name in FILES:
        assert (tmp_path / "made/a" / name).read_bytes() == (tmp_path / "made/b" / name).read_bytes()


def test_no_sentence_occurs_twice_in_the_task_or_in_the_corpus(task, corpus):
    sentences = [row[3] for rows in task.values() for row in rows]
    assert len(corpus) == tiny.N_CORPUS
    assert len({*sentences, *corpus}) == len(sentences) + len(corpus)


def test_every_phenomenon_has_both_labels_and_lengths_do_not_tell_them_apart(task):
    for name, sources in (("in_domain_train.tsv", tiny.IN_DOMAIN), ("in_domain_dev.tsv", tiny.IN_DOMAIN)):
        assert {(row[0], row[1]) for row in task[name]} == {(source, label) for source in sources for label in "01"}
    assert {row[0] for row in task["out_of_domain_dev.tsv"]} == {*tiny.IN_DOMAIN, *tiny.HELD_OUT}
    lengths = {label: [len(row[3].split()) for row in task["in_domain_train.tsv"] if row[1] == label] for label in "01"}
    good, bad = (sum(lengths[label]) / len(lengths[label]) for label in "10")
    assert abs(good - bad) < 0.5


def test_held_out_words_are_in_the_corpus_and_out_of_domain_only(task, corpus):
    held_out = open_words("held-out") - open_words("train")
    assert len(held_out) > 100
    in_domain = words(" ".join(row[3] for name in ("in_domain_train.tsv", "in_domain_dev.tsv") for row in task[name]))
    assert not held_out & in_domain
    assert len(held_out & words(" ".join(row[3] for row in task["out_of_domain_dev.tsv"]))) > 60
    assert len(held_out & words(" ".join(corpus))) > 0.9 * len(held_out)
    sources = {row[0] for name in ("in_domain_train.tsv", "in_domain_dev.tsv") for row in task[name]}
    assert not sources & set(tiny.HELD_OUT)


@pytest.mark.parametrize("phenomenon", [*tiny.IN_DOMAIN, *tiny.HELD_OUT])
def test_a_violation_is_never_an_acceptable_sentence(phenomenon, corpus):
    rng, entries = random.Random(5), tiny.lexicon("all")
    pairs = [tiny.pair(phenomenon, rng, entries) for _ in range(300)]
    acceptable = {*corpus, *(good for good, _ in pairs)}
    assert all(good != bad for good, bad in pairs)
    assert not acceptable & {bad for _, bad in pairs}


@pytest.mark.parametrize(("entry", "forms"), [
    ("arrive", "arrive arrives arrived arrived arriving"),
    ("deny", "deny denies denied denied denying"),
    ("smash", "smash smashes smashed smashed smashing"),
    ("destroy", "destroy destroys destroyed destroyed destroying"),
    ("show/showed/shown", "show shows showed shown showing"),
    ("die/died/died/dying", "die dies died died dying"),
])
def test_inflection(entry, forms):
    assert list(tiny.inflect(entry)) == forms.split()


def test_finish_writes_an_before_a_vowel_only():
    assert tiny.finish("a uncle thanked a artist and a nurse.") == "An uncle thanked an artist and a nurse."


def test_single_words_do_not_give_the_label_away(task):
    """A naive Bayes classifier over single words, written out, stays near chance in MCC."""
    from collections import Counter
    from math import log, sqrt

    counts, labels = {"0": Counter(), "1": Counter()}, Counter()
    for _, label, _, sentence in task["in_domain_train.tsv"]:
        labels[label] += 1
        counts[label].update(words(sentence))
    table = Counter()
    for _, label, _, sentence in task["in_domain_dev.tsv"]:
        score = {
            guess: log(labels[guess]) + sum(log((counts[guess][w] + 1) / (labels[guess] + 2)) for w in words(sentence))
            for guess in "01"
        }
        table[label, max(score, key=score.get)] += 1
    tp, tn, fp, fn = (table[key] for key in (("1", "1"), ("0", "0"), ("0", "1"), ("1", "0")))
    assert (tp * tn - fp * fn) / sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) < 0.4


@pytest.fixture
def quick(monkeypatch):
    """A model that takes a second."""
    for name, value in {"STEPS": 3, "TOKENS_PER_STEP": 64, "LAYERS": 1, "CHANNELS": 16, "HEADS": 2}.items():
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(tiny, "N_CORPUS", 300)


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
