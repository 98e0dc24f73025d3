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
    assert toy.lora(work, tmp_path / "run", "--method", method, "--plots", tmp_path / "plots") == 0
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
