"""A student as ONNX: onnxruntime's logits against PyTorch's, and the example in an environment that has nothing else."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
import torch
from conftest import one_line, write_tokenizer

from data_utils import Split, encode
from layers import RNNConfig
from machine.errors import UserError
from model import DistilRNN
from serving import export, export_student
from serving.texts import Reading

SENTENCES = ["The cat sat on the mat.", "A dog", "cat", "The dog ran to the mat on the cat.", "Café, naïve: 東京 🐈"]


def student(**changes) -> DistilRNN:
    torch.manual_seed(0)
    made = DistilRNN(RNNConfig(**{"vocab_size": 280, "embedding_size": 7, "hidden_size": 5, "num_labels": 3, **changes}))
    with torch.no_grad():
        for p in made.parameters():  # so large that each gate matters
            p.normal_(std=0.7)
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(made: DistilRNN, tokenizer, out: Path, said: list | None = None, **more) -> Path:
    reading = Reading(("no", "yes", "maybe"), more.pop("max_length", 32), more.pop("truncate", "tail"))
    export_student.write_student(made, tokenizer, reading, Split(SENTENCES, [0, 1, 2, 1, 0]), out,
                         say=(said if said is not None else []).append, **more)
    return out


@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_graph_computes_the_students_logits_of_padded_batches_and_of_single_sentences(tmp_path, directions, cell, layers,
                                                                                          pooling):
    made = student(cell=cell, rnn_layers=layers, pooling=pooling, directions=directions)
    (tmp_path / "m.onnx").write_bytes(export_student.onnx_model(made).SerializeToString())
    session = export.session(tmp_path / "m.onnx", threads=1)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    for lengths in ((5, 9, 1, 12), (4, 4), (1,)):  # any batch, any length
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(0, 280, mask.shape)
        with torch.inference_mode():
            expected = made(ids, mask).numpy()
        logits = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        assert np.abs(expected).max() > 0.1 and np.abs(logits - expected).max() < 1e-5
        alone = np.concatenate([session.run(None, {"input_ids": row[None, :n].numpy(),
                                                   "attention_mask": np.ones((1, n), dtype=np.int64)})[0]
                                for row, n in zip(ids, lengths, strict=True)])
        assert np.abs(logits - alone).max() < 1e-5


@pytest.mark.parametrize("more", [
    {"vocabulary": 40}, {"vocabulary": 40, "rare_tokens": "pieces"}, {"frozen_embeddings": True},
    {"vocabulary": 40, "rare_tokens": "pieces", "frozen_embeddings": True, "cell": "gru"},
    *({"cell": "mingru", "rnn_layers": 2, "directions": directions, "pooling": "attention"} for directions in (1, 2))])
def test_the_graph_of_another_student_computes_its_logits(tmp_path, more):
    made = student(**more)
    if made.embedding.rows is not None:
        made.embedding.rows.copy_(torch.randint(0, 40, made.embedding.rows.shape))
    mask = (torch.arange(12) < torch.tensor([5, 9, 1, 12])[:, None]).long()
    ids = torch.randint(0, 280, mask.shape)
    with torch.inference_mode():
        expected = made(ids, mask).numpy()
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    model = export_student.onnx_model(made)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert np.abs(export.session(tmp_path / "m.onnx", threads=1).run(None, inputs)[0] - expected).max() < 1e-5
    # In 8 bits the same graph, up to rounding: the map of the rows stays as it is.
    export_student.write_int8(tmp_path / "m.onnx", tmp_path / "int8.onnx")
    rounded = export.session(tmp_path / "int8.onnx", threads=1).run(None, inputs)[0]
    assert 0 < np.abs(rounded - expected).max() < 0.2 * np.abs(expected).max()


def test_the_folder_holds_all_that_is_needed_and_appears_whole(tmp_path, tokenizer):
    said = []
    out = write(student(), tokenizer, tmp_path / "deep" / "out", said)
    assert {path.name for path in out.iterdir()} == {"student.onnx", "tokenizer.json", "labels.json", "example.py"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "labels.json").read_text()) == ["no", "yes", "maybe"]
    assert "equal PyTorch's on 5 sentences" in said[0]
    with pytest.raises(UserError) as error:
        write(student(), tokenizer, out)
    assert "exists already; expected a new or an empty folder" in one_line(error)
    (tmp_path / "empty").mkdir()
    assert write(student(), tokenizer, tmp_path / "empty").joinpath("student.onnx").exists()


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_file_that_answers_otherwise_is_not_left(tmp_path, tokenizer, monkeypatch, what):
    if what == "weights":
        whole = export_student.onnx_model
        monkeypatch.setattr(export_student, "onnx_model", lambda made: whole(student(hidden_size=6)))
    else:
        monkeypatch.setattr(export, "portable_tokenizer", lambda *args, whole=export.portable_tokenizer: whole(
            args[0], 3, args[2]))
    with pytest.raises(UserError) as error:
        write(student(), tokenizer, tmp_path / "out")
    assert ("logits differ from PyTorch's" if what == "weights" else "makes other tokens of") in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("truncate", ["tail", "head", "middle"])
@pytest.mark.parametrize("special", [False, True])
def test_the_example_cuts_long_texts_as_the_run_did(tmp_path, tokenizer, truncate, special):
    from transformers import PreTrainedTokenizerFast

    if special:  # a token of the tokenizer's own at either end, which stays
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.post_processor = tokenizers.processors.TemplateProcessing("T $A D", special_tokens=[("T", 1), ("D", 2)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=tokenizer.pad_token)
    made, texts = student(), [*SENTENCES, "The cat sat on the mat. " * 9 + "No dog ran."]
    with pytest.warns(UserWarning, match="truncated"):
        out = write(made, tokenizer, tmp_path / "out", max_length=7, truncate=truncate)
        ids = encode(tokenizer, texts, 7, truncate)
    assert sorted(map(len, ids))[-2:] == [7, 7] and (not special or all(row[0] == 1 and row[-1] == 2 for row in ids))
    written = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode_batch(texts)
    assert truncate == "middle" or [row.ids[:len(e)] for row, e in zip(written, ids, strict=True)] == ids
    done = subprocess.run([sys.executable, out / "example.py", *texts], capture_output=True, text=True)
    with torch.inference_mode():
        chances = torch.cat([made(torch.tensor([row]), torch.ones(1, len(row))) for row in ids]).softmax(-1).max(-1)
    assert done.stdout.splitlines() == [f"{['no', 'yes', 'maybe'][label]}\t{chance:.4f}\t{text}" for text, label, chance in
                                        zip(texts, chances.indices, chances.values, strict=True)], done.stderr


def test_int8_weights_are_a_quarter_of_the_size_and_cost_what_is_said(tmp_path, tokenizer):
    made, said = student(vocab_size=5000, embedding_size=32, hidden_size=24), []
    float32 = write(made, tokenizer, tmp_path / "float32") / "student.onnx"
    int8 = write(made, tokenizer, tmp_path / "int8", said, int8=True) / "student.onnx"
    assert int8.stat().st_size < 0.3 * float32.stat().st_size
    graph = onnx.load(int8).graph
    assert {"DynamicQuantizeLSTM", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    assert max(weight.data_type == onnx.TensorProto.FLOAT and np.prod(weight.dims) for weight in graph.initializer) < 400
    ids = encode(tokenizer, SENTENCES, 32)
    logits = [export.onnx_logits(export.session(path, threads=1), ids) for path in (float32, int8)]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.1 * np.abs(logits[0]).max()
    right = [float((values.argmax(-1) == [0, 1, 2, 1, 0]).mean()) for values in logits]
    assert f"accuracy {right[0]:.4f} -> {right[1]:.4f}" in said[1] and "MCC" in said[1] and "verdicts" in said[1]
    cost = json.loads((tmp_path / "int8" / "int8.json").read_text())
    assert [cost[name]["accuracy"] for name in ("float32", "int8")] == right and cost["sentences"] == 5
    assert [cost["float32_megabytes"], cost["megabytes"]] == [path.stat().st_size / 1e6 for path in (float32, int8)]


ALONE = """
import importlib.util, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
assert not any(importlib.util.find_spec(name) for name in ("torch", "transformers", "onnx", "serving", "model"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_refuses_a_text_without_a_word(tmp_path, tokenizer):
    from tokenizers import Tokenizer, normalizers

    out = write(student(), tokenizer, tmp_path / "out")

    def refused(*sentences: str) -> str:
        done = subprocess.run([sys.executable, out / "example.py", *sentences], capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == "" and "nan" not in done.stderr
        return done.stderr
    for sentences, named in (([""], "''"), (["A dog", ""], "''"), ([" \t "], r"' \t '"), (["", "A dog"], "''")):
        assert refused(*sentences) == f"example.py: {named}: expected a sentence, found no word in it\n"
    # A tokenizer that drops characters makes no token of other texts either.
    portable = Tokenizer.from_file(str(out / "tokenizer.json"))
    portable.normalizer = normalizers.Replace("x", "")
    portable.save(str(out / "tokenizer.json"))
    assert refused("A dog", "xx") == "example.py: 'xx': expected a sentence, found no word in it\n"


def test_the_example_needs_onnxruntime_tokenizers_and_numpy_alone(tmp_path, tokenizer):
    made = student()
    out, links = write(made, tokenizer, tmp_path / "out"), tmp_path / "links"
    links.mkdir()
    for name in ("onnxruntime", "tokenizers", "numpy"):
        package = Path(importlib.util.find_spec(name).origin).parent
        for path in (package, package.with_name(f"{name}.libs")):
            if path.exists():
                (links / path.name).symlink_to(path)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", ALONE, links, out / "example.py", *SENTENCES], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        chances = torch.cat([made(torch.tensor([ids]), torch.ones(1, len(ids))) for ids in encode(
            tokenizer, SENTENCES, 32)]).softmax(-1).max(-1)
    assert done.stdout.splitlines() == [
        f"{['no', 'yes', 'maybe'][label]}\t{chance:.4f}\t{sentence}"
        for label, chance, sentence in zip(chances.indices.tolist(), chances.values.tolist(), SENTENCES, strict=True)]
    assert len([line for line in (out / "example.py").read_text().splitlines() if line.strip()]) <= 26
