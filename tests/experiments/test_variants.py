"""Every variant of LoRA, BitFit and IA3 through run.py: trained, scored, repeated, resumed, merged."""
import json

import pytest
import toy

from record.files import read_json

RUNS = {"dora": ("--variant", "dora"), "pissa": ("--variant", "pissa", "--targets", "q,v"), "vera": ("--variant", "vera"),
        "adalora": ("--variant", "adalora"), "loraplus": ("--variant", "loraplus"), "lora-fa": ("--variant", "lora-fa"),
        "ia3": ("--method", "ia3"), "bitfit": ("--method", "bitfit"),
        "pattern": ("--rank-pattern", "c_attn=2,h.1.mlp.c_fc=3", "--alpha-pattern", "c_proj=4")}


@pytest.mark.parametrize("name", RUNS)
def test_a_variant_trains_resumes_repeats_scores_and_merges(work, tmp_path, capsys, name):
    run = tmp_path / "run"
    words = (*RUNS[name], "--rank", 4, "--epochs", 2, "--limit", 24, "--save-every", "1steps")
    # Interrupted after four steps, and resumed.
    assert toy.lora(work, run, *words) == 0
    summary, capsys_text = read_json(run / "summary.json"), capsys.readouterr().out
    assert summary.get("variant", "lora") == (name if RUNS[name][0] == "--variant" else "lora")
    assert summary["parameters"]["trainable"] > 0 and "train" in summary and capsys_text
    assert toy.main("repeat", run) == 0
    capsys.readouterr()
    dev = work / "cola" / "in_domain_dev.tsv"
    assert toy.main("eval", run, "--data", dev, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    best = summary["validation"]["in_domain"]
    assert scores["n"] == best["n"] and abs(scores["loss"] - best["loss"]) < 1e-5 and scores["mcc"] == best["mcc"]
    assert toy.main("merge", run, "--out", tmp_path / "merged") == 0


@pytest.mark.parametrize("name", ["adalora", "pissa"])
def test_an_interrupted_variant_ends_in_the_same_bytes(work, tmp_path, monkeypatch, name):
    from machine import signals

    words = (*RUNS[name], "--rank", 4, "--epochs", 2, "--save-every", "1steps")
    assert toy.lora(work, tmp_path / "whole", *words) == 0
    steps = iter([None] * 6)
    with monkeypatch.context() as patched:
        patched.setattr(signals, "received", lambda: next(steps, 15))
        assert toy.lora(work, tmp_path / "run", *words) != 0
    assert not (tmp_path / "run" / "summary.json").exists()
    assert toy.lora(work, tmp_path / "run", *words, "--resume") == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize("words, said", [
    (("--variant", "dora", "--method", "head"), "--variant dora: a variant of --method lora; --method head has none"),
    (("--rank-pattern", "c_atn=2"), "--rank-pattern c_atn=2: fits none of the adapted modules"),
    (("--rank-pattern", "c_attn=2.5"), "'c_attn=2.5': expected MODULE=RANK[,...]"),
    (("--alpha-pattern", "(=2"), "pattern '(' of a module's name: no regular expression"),
    (("--rslora", "--variant", "vera"), "--rslora: an old spelling of --variant rslora, not with --variant vera")])
def test_bad_variants_are_one_line_and_nothing_is_written(work, tmp_path, capsys, words, said):
    assert toy.lora(work, tmp_path / "run", *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    return folder
