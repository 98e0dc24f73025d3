"""Evaluating a saved run repeats its summary; a base that has changed is refused."""
import json
import shutil

import pytest
import toy
from safetensors.torch import load_file

import data_utils
from record.files import read_json


@pytest.mark.parametrize("split", ["in_domain", "out_of_domain"])
def test_eval_of_a_lora_run_repeats_its_summary(work, capsys, split):
    assert toy.main("eval", work / "LoRA", "--data", work / "cola" / f"{split}_dev.tsv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    summary = read_json(work / "LoRA" / "summary.json")
    assert result.pop("by_class") == summary["by_class"][split]
    assert result.pop("data") == str(work / "cola" / f"{split}_dev.tsv")
    train, dev = ({sentence.casefold() for sentence in data_utils.read_cola_tsv(work / "cola" / f"{name}.tsv").sentences}
                  for name in ("in_domain_train", f"{split}_dev"))
    assert result.pop("trained_on") == len(train & dev)  # no sentence of the toy's stands twice in a file
    assert set(result) == toy.SCORES
    assert result == summary["validation"][split]


@pytest.mark.parametrize("method, files", [
    ("full", {"trained.safetensors", "metrics.jsonl"}), ("head", {"trained.safetensors", "metrics.jsonl"}),
    ("none", {"trained.safetensors"})])
def test_every_method_leaves_a_run_that_eval_scores_alike(work, tmp_path, capsys, method, files):
    assert toy.lora(work, tmp_path / "run", "--method", method) == 0
    assert set(toy.tree(tmp_path / "run")) >= files | {"config.json", "summary.json"}
    summary = read_json(tmp_path / "run" / "summary.json")
    kept = load_file(tmp_path / "run" / "trained.safetensors")
    total, head = summary["parameters"]["total"], 2 * 32
    assert summary["parameters"]["trainable"] == {"full": total, "head": head, "none": 0}[method]
    assert sum(value.numel() for value in kept.values()) == (total if method == "full" else head)
    capsys.readouterr()
    assert toy.main("eval", tmp_path / "run", "--data", work / "cola" / "in_domain_dev.tsv", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("by_class") == summary["by_class"]["in_domain"]
    assert result.pop("data") and result.pop("trained_on") < 12
    assert result == summary["validation"]["in_domain"]


def test_eval_writes_each_prediction_beside_its_sentence(work, tmp_path, capsys):
    data = work / "cola" / "in_domain_dev.tsv"
    assert toy.main("eval", work / "LoRA", "--data", data, "--json", "--predictions", tmp_path / "out.tsv") == 0
    result = json.loads(capsys.readouterr().out)
    header, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert header == ["sentence", "label", "prediction", "probability"]
    split = data_utils.read_cola_tsv(data)
    assert [(row[0], int(row[1])) for row in rows] == list(zip(split.sentences, split.labels, strict=True))
    assert sum(row[1] == row[2] for row in rows) / len(rows) == result["accuracy"]
    assert all(0.5 <= float(row[3]) <= 1 for row in rows)


@pytest.mark.parametrize("command", ["eval", "gen"])
@pytest.mark.parametrize("change, said", [(toy.other_weights, "with other weights than"),
                                          (toy.other_config, "with another configuration than"),
                                          (toy.other_tokenizer, "with another tokenizer than")])
def test_a_base_that_changed_since_the_run_is_refused(work, tmp_path, capsys, command, change, said):
    """The same name and shapes, another base: the adapter would answer with noise."""
    shutil.copytree(work / "LoRA", tmp_path / "LoRA")
    shutil.copytree(work / "model", tmp_path / "model")
    change(tmp_path / "model")
    for name in ("config.json", "adapter_config.json"):
        path = tmp_path / "LoRA" / name
        path.write_text(path.read_text().replace(str(work / "model"), str(tmp_path / "model")))
    toy.reseal(tmp_path / "LoRA")
    arguments = {"eval": ("eval", tmp_path / "LoRA", "--data", work / "cola" / "in_domain_dev.tsv"),
                 "gen": ("gen", "12345", "--adapter", tmp_path / "LoRA", "--max-new-tokens", 2)}[command]
    assert toy.main(*arguments) == 2
    assert f"adapter for another base: it was made for {tmp_path / 'model'}, {said}" in capsys.readouterr().err


def test_a_run_on_one_encoding_is_scored_and_asked_in_another(work, tmp_path, capsys):
    """A run on cp1252 with semicolons reads UTF-8 with commas if told so, and its own form if not."""
    rows = [(f"{text} caf\u00e9", label) for text, label in toy.toy_rows(48, 5)]
    forms = {"cp1252": ";", "utf-8": ","}
    for encoding, delimiter in forms.items():
        lines = [delimiter.join(("text", "label")), *(f"{text}{delimiter}{label}" for text, label in rows)]
        (tmp_path / f"{encoding}.csv").write_bytes("\n".join([*lines, ""]).encode(encoding))
    assert toy.main("LoRA", "12345", "--model", work / "model", "--task", "csv", "--data", tmp_path / "cp1252.csv",
                    "--encoding", "cp1252", "--delimiter", ";", "--eval-split", 0.25, "--epochs", 1, "--no-plots",
                    "--out", tmp_path / "run") == 0
    found, answers = [], []
    for encoding, delimiter in forms.items():
        file = tmp_path / f"new-{encoding}.csv"
        file.write_bytes((tmp_path / f"{encoding}.csv").read_bytes() + b"More%s1\n" % delimiter.encode())
        more = () if encoding == "cp1252" else ("--encoding", encoding, "--delimiter", delimiter)
        capsys.readouterr()
        assert toy.main("eval", tmp_path / "run", "--data", file, "--json", *more) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert toy.main("predict", tmp_path / "run", "--file", file, "--json", *more) == 0
        answers.append(capsys.readouterr().out)
        del found[-1]["data"]
    assert found[0] == found[1] and found[0]["n"] == 49
    assert answers[0] == answers[1] and "caf\u00e9" in answers[0] and "error" not in answers[0]
    # Without the flags, the other form is refused.
    assert toy.main("eval", tmp_path / "run", "--data", tmp_path / "new-utf-8.csv", "--json") == 2


@pytest.mark.parametrize("words, said", [(("--encoding", "cp1252"), "--encoding cp1252: not without --data"),
                                         (("--delimiter", ";", "--data", "dev"), "--delimiter ;: not for CoLA's files")])
def test_a_delimiter_or_encoding_that_nothing_reads_is_refused(work, capsys, words, said):
    dev = str(work / "cola" / "in_domain_dev.tsv")
    assert toy.main("eval", work / "LoRA", *(dev if word == "dev" else word for word in words)) == 2
    assert said in capsys.readouterr().err
