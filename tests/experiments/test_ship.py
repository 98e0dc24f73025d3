"""export and merge by the command line: what they write, print and refuse."""
import json
import shutil
import sys

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments import evaluate, ship
from report import figures
from serving import export

SENTENCES = ["the cat saw a dog", "red bird", "an old mat fed the bird", "cat"]


@pytest.fixture(scope="module")
def distilled(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ship") / "distil"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", lambda *_: [])
        assert toy.main("distil", "12345", "--plain", "--teacher", work / "LoRA", "--out", folder, "--plots", work,
                        "--epochs", 3,
                        "--embedding-size", 8, "--hidden-size", 6, "--batch-size", 8, "--lr", 0.02) == 0
    return folder


def in_onnxruntime(folder, sentences: list[str], file: str = "student.onnx") -> torch.Tensor:
    """Logits of a padded batch by the exported files alone."""
    from tokenizers import Tokenizer

    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(sentences)
    inputs = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    return torch.tensor(export.session(folder / file).run(["logits"], inputs)[0])


@pytest.mark.parametrize("options, weights", [((), "student"), (("--int8",), "student"), (("--control",), "scratch")])
def test_export_writes_the_weights_that_are_asked_for_and_says_so(distilled, tmp_path, capsys, options, weights):
    assert toy.main("export", distilled, "--out", tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    student, tokenizer, _ = evaluate.load_student(distilled, weights)
    with torch.inference_mode():
        expected = torch.cat([student(ids, torch.ones_like(ids)) for ids in (
            torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES)])
    within = 0.1 * expected.abs().max() if "--int8" in options else 1e-5
    assert (in_onnxruntime(tmp_path / "out", SENTENCES) - expected).abs().max() < within
    assert "equal PyTorch's on 24 sentences" in printed and f"export: {tmp_path / 'out'}" in printed
    assert ("accuracy" in printed and "MCC" in printed and "24 verdicts" in printed) == ("--int8" in options)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["unacceptable", "acceptable"]


@pytest.mark.slow
def test_export_writes_the_classifier_of_a_lora_run_and_says_so(work, tmp_path, capsys):
    assert toy.main("export", work / "LoRA", "--out", tmp_path / "out", "--int8") == 0
    printed = capsys.readouterr().out
    classifier, tokenizer, _ = evaluate.load_finetuned(work / "LoRA")
    with torch.inference_mode():
        expected = torch.cat([classifier(ids, torch.ones_like(ids)) for ids in (
            torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES)])
    difference = (in_onnxruntime(tmp_path / "out", SENTENCES, "classifier.onnx") - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()
    assert "equal PyTorch's on 24 sentences" in printed and f"export: {tmp_path / 'out'}" in printed
    assert "accuracy" in printed and "MCC" in printed and "24 verdicts" in printed
    assert json.loads((tmp_path / "out" / "int8.json").read_text())["sentences"] == 24
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["unacceptable", "acceptable"]


def test_merge_writes_what_transformers_loads_with_the_same_logits(work, tmp_path, capsys):
    assert toy.main("merge", work / "LoRA", "--out", tmp_path / "out") == 0
    assert "equal the run's on 24 sentences" in capsys.readouterr().out
    classifier, tokenizer, _ = evaluate.load_finetuned(work / "LoRA")
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = torch.cat([classifier(ids, torch.ones_like(ids)) for ids in (
            torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES)])
        read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        logits = read(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert read.config.id2label == {0: "unacceptable", 1: "acceptable"}


@pytest.mark.parametrize("mode", ["export", "merge"])
def test_where_the_data_are_gone_built_in_sentences_stand_in_and_that_is_said(work, distilled, tmp_path, capsys, mode):
    run = work / "LoRA" if mode == "merge" else distilled
    data = work / "cola" / "in_domain_dev.tsv"
    text = data.read_bytes()
    data.unlink()
    try:
        assert toy.main(mode, run, "--out", tmp_path / "out", *(["--int8"] if mode == "export" else [])) == 0
    finally:
        data.write_bytes(text)
    printed = capsys.readouterr().out
    assert "in_domain_dev.tsv: cannot be read" in printed and "built-in task's sentences stand in" in printed
    assert f"on {2 * ship.STAND_INS:,} sentences" in printed
    assert "accuracy" not in printed  # labels that are not the run's prove nothing


def test_what_cannot_be_shipped_is_one_line_and_leaves_nothing(work, distilled, tmp_path, capsys, monkeypatch):
    def refused(*words) -> str:
        before = toy.tree(tmp_path)
        capsys.readouterr()
        assert toy.main(*words) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and toy.tree(tmp_path) == before and sorted(tmp_path.iterdir()) == [tmp_path / "full"]
        return errors[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    assert "is a LoRA run; the baseline is a distillation's" in refused("export", work / "LoRA", "--out", out, "--control")
    assert "a distil run; python run.py LoRA SR makes one" in refused("merge", distilled, "--out", out)
    assert "not a run's folder" in refused("merge", tmp_path / "full", "--out", out)
    for mode, run in (("export", distilled), ("merge", work / "LoRA")):
        assert "full: exists already; expected a new or an empty folder" in refused(mode, run, "--out", tmp_path / "full")
        assert "notes.txt/out: the output folder cannot be made" in refused(
            mode, run, "--out", tmp_path / "full" / "notes.txt" / "out")
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert f"the package {package} is not installed; pip install -r requirements-serve.txt" in refused(
                "export", distilled, "--out", out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "the package onnxscript is not installed; pip install -r requirements-serve.txt" in refused(
            "export", work / "LoRA", "--out", out)


def test_feature_heads_are_refused_and_so_is_what_is_not_finite(work, tmp_path, capsys):
    texts = [text for text, _ in toy.toy_rows(20, 0)]
    (tmp_path / "train.csv").write_text("text,size,label\n" + "".join(
        f"{text},{len(text)},{len(text) % 2}\n" for text in texts))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--data", tmp_path / "train.csv", "--epochs", 1, "--out",
                    tmp_path / "features", "--feature-columns", "size", "--plots", tmp_path, "--no-plots") == 0
    card = (tmp_path / "features" / "README.md").read_text()
    assert "beside a head for the numbers size, which PEFT does not load" in card
    assert toy.main("merge", tmp_path / "features", "--out", tmp_path / "out") == 2
    assert "reads the features size beside the text, for which a plain checkpoint" in capsys.readouterr().err
    assert toy.main("export", tmp_path / "features", "--out", tmp_path / "out") == 2
    assert "reads the features size beside the text, for which an ONNX file" in capsys.readouterr().err
    shutil.copytree(work / "LoRA", tmp_path / "nan")
    path = tmp_path / "nan" / "adapter_model.safetensors"
    state = load_file(path)
    next(value for name, value in state.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    toy.reseal(tmp_path / "nan")
    assert toy.main("merge", tmp_path / "nan", "--out", tmp_path / "out") == 2
    assert "not finite; nothing was merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))
