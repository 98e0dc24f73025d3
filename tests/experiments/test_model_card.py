"""A LoRA run's folder as others read it: PEFT and transformers without this project, and the Hub's own card classes."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import toy
from huggingface_hub import ModelCard

from data import backbones
from experiments import evaluate, generate, predict, repeat
from record.files import read_json, read_sums
from record.ownership import is_card

ADDED = {"README.md", "tokenizer.json", "tokenizer_config.json"}
SENTENCES = ["the cat saw a dog", "red bird", "an old mat fed the bird", "cat"]
CLASSES = ["fish", "fowl", "neither"]
OUTSIDE = """
import json, os, sys
sentences, cards = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for folder, code in cards.items():
    os.chdir(folder)
    found = {}
    exec(code.replace("'A sentence.'", "*" + repr(sentences)).replace('"A sentence."', "*" + repr(sentences)), found)
    print(json.dumps([found["logits"].tolist(), found["labels"], found["model"].num_labels]))
"""


@torch.inference_mode()
def ours(folder) -> torch.Tensor:
    classifier, tokenizer, _ = evaluate.load_finetuned(folder)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES]
    return torch.cat([classifier(row, torch.ones_like(row)) for row in ids])


@pytest.fixture(scope="module")
def three(work, tmp_path_factory):
    """A run of three classes."""
    folder = tmp_path_factory.mktemp("three")
    texts = [text for text, _ in toy.toy_rows(30, 0)]
    rows = "".join(f"{text},{CLASSES[len(text) % 3]}\n" for text in texts)
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("text,label\n" + rows)
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", folder, "--task", "csv", "--epochs", 2, "--lr",
                    0.01, "--out", folder / "run", "--plots", folder, "--no-plots") == 0
    return folder / "run"


def test_peft_and_transformers_load_the_folder_by_the_cards_own_words(work, three):
    """In a process that cannot import this project, a padded batch of sentences."""
    cards = {str(folder): re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
             for folder in (work / "LoRA", three)}
    assert "from_pretrained(folder).eval()" in cards[str(work / "LoRA")]  # two classes: without further arguments
    done = subprocess.run([sys.executable, "-P", "-c", OUTSIDE, json.dumps(SENTENCES), json.dumps(cards)], cwd=three,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = (["unacceptable", "acceptable"], CLASSES)
    for line, folder, classes in zip(done.stdout.splitlines(), cards, names, strict=True):
        logits, labels, count = json.loads(line)
        expected = ours(folder)
        assert expected.abs().max() > 0.1 and (labels, count) == (classes, len(classes))
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("truncate", ["tail", "head", "middle"])
@pytest.mark.filterwarnings("ignore:.*were truncated")
def test_the_cards_own_words_read_long_texts_as_the_run_did(work, tmp_path, quick, truncate):
    """Texts of more tokens than the model has positions among them."""
    assert toy.lora(work, tmp_path / "run", "--max-length", 7, "--truncate", truncate) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("`truncation=True` cuts the tail" in card) == (truncate == "middle")
    assert "The pad token is `<|endoftext|>`: a text that ends with this mark is read without it." in card
    texts = ["the cat saw a dog and fed an old red bird", "red bird", "cat " * 500]
    code, found = re.search(r"```python\n(.*?)```", card, re.S)[1], {}
    exec(code.replace('"A sentence."', f"*{texts!r}").replace('"."', repr(str(tmp_path / "run"))), found)
    answers = predict.predict_texts(predict.RunPredictor(tmp_path / "run"), texts)
    tokens = [len(found["tokenizer"](text)["input_ids"]) for text in texts]
    assert [count > 7 for count in tokens] == [True, False, True] and tokens[2] > found["model"].config.n_positions
    for row, answer in zip(found["logits"].softmax(-1).tolist(), answers, strict=True):
        assert row == pytest.approx(list(answer["probabilities"].values()), abs=1e-5)


def test_the_config_has_the_class_names_as_transformers_writes_them(three):
    config = read_json(three / "config.json")
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert config["label2id"] == {name: i for i, name in enumerate(CLASSES)}


def test_the_cards_metadata_are_the_summarys_results(work):
    text, summary = (work / "LoRA" / "README.md").read_text(), read_json(work / "LoRA" / "summary.json")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("peft", "text-classification", "LoRA-12345")
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    names = {"accuracy": "accuracy", "matthews_correlation": "mcc", "f1": "macro_f1"}
    assert found == {(split, kind): values[key] for split, values in summary["validation"].items()
                     for kind, key in names.items()}
    for split, values in summary["validation"].items():
        assert f"| {split} | {values['n']} | {values['accuracy']:.4f} | {values['mcc']:.4f} |" in text
    assert f"{summary['parameters']['trainable']:,} of {summary['parameters']['total']:,}" in text
    assert str(work) not in text and not re.search(r"20\d\d-\d\d", text)  # neither paths nor dates


def test_what_was_added_is_checked_repeated_and_overwritten_with_the_rest(work, tmp_path, quick):
    assert set(read_sums(work / "LoRA")) >= ADDED
    assert toy.lora(work, tmp_path / "run") == 0
    for name in ADDED:
        assert (tmp_path / "run" / name).read_bytes() == (work / "LoRA" / name).read_bytes()
    (tmp_path / "run" / "README.md").rename(tmp_path / "card")
    assert toy.main("eval", tmp_path / "run", "--data", work / "cola" / "in_domain_dev.tsv") == 2
    (tmp_path / "card").rename(tmp_path / "run" / "README.md")
    tokenizer = tmp_path / "run" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("cat", "cow"))
    assert list(repeat.differences(work / "LoRA", tmp_path / "run")) == ["tokenizer.json differs"]
    assert toy.lora(work, tmp_path / "run", "--overwrite", "--method", "head") == 0
    assert not ADDED & set(toy.tree(tmp_path / "run"))


def test_a_readme_of_somebodys_own_is_left_alone(work, tmp_path, quick):
    shutil.copytree(work / "LoRA", tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("My notes about lora-distil\n")
    for _ in range(2):
        assert toy.lora(work, tmp_path / "run", "--overwrite") == 0
        assert (tmp_path / "run" / "README.md").read_text() == "My notes about lora-distil\n"
        assert "README.md" not in read_sums(tmp_path / "run")
    assert is_card(work / "LoRA" / "README.md") and not is_card(tmp_path / "run" / "README.md")


def test_an_alias_is_written_as_the_hubs_name_and_read_as_the_alias(work, tmp_path, monkeypatch):
    assert [backbones.public_name(name) for name in ("smollm2", "minilm", "mpnet", "gpt2", str(work / "model"))] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2",
        "sentence-transformers/all-mpnet-base-v2", "gpt2", str(work / "model")]
    shutil.copytree(work / "LoRA", tmp_path / "run")
    for name, change in (("config.json", {"options": {"model": "smollm2"}}), ("adapter_config.json", {
            "base_model_name_or_path": backbones.public_name("smollm2")})):
        (tmp_path / "run" / name).write_text(json.dumps(read_json(tmp_path / "run" / name) | change))
    toy.reseal(tmp_path / "run")
    assert generate.base_model(tmp_path / "run") == "smollm2"
    (tmp_path / "run" / "SHA256SUMS").unlink()
    (tmp_path / "run" / "config.json").unlink()  # no run, but an adapter of somebody else's
    assert generate.base_model(tmp_path / "run") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("changed", ["base_model_name_or_path", "r"])
def test_a_repetition_may_have_its_base_elsewhere_and_nothing_else(work, tmp_path, changed):
    shutil.copytree(work / "LoRA", tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {changed: "elsewhere"}))
    found = list(repeat.differences(work / "LoRA", tmp_path / "run"))
    assert found == ([] if changed == "base_model_name_or_path" else ["adapter_config.json differs"])
