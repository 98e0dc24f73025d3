"""A fine-tuned classifier as ONNX: onnxruntime's logits against the library's own model in PyTorch."""
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import ARCHITECTURES, adapted, one_line, write_tokenizer

from data_utils import Split, encode
from machine.errors import UserError
from model import lora_layers
from record.calibration import Calibration
from serving import export, export_teacher
from serving.texts import Reading

pytestmark = pytest.mark.slow

# Each export takes seconds: every test below asks as much of one as it can.
SENTENCES = ["The cat sat on the mat.", "A dog", "cat", "The dog ran to the mat on the cat.", "Café, naïve: 東京 🐈"]
CLASSES = ("no", "yes")
ROWS = Split(SENTENCES, [0, 1, 1, 1, 0])
# One block: torch.export goes through the blocks one by one, and all of them are alike.
BLOCKS = {"gpt2": "n_layer", "distilbert": "n_layers"}


def one_block(architecture: str, **options):
    return adapted(architecture, sizes={BLOCKS.get(architecture, "num_hidden_layers"): 1}, **options)


def takes_any_batch_and_length(model) -> bool:
    axes = [[axis.dim_param for axis in one.type.tensor_type.shape.dim] for one in model.graph.input]
    return axes == [["batch", "length"]] * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def all_tokens(monkeypatch):
    monkeypatch.setattr("conftest.VOCAB", 280)


def alone(made, ids: list[list[int]]) -> np.ndarray:
    """The logits of each sentence by itself, the adapter not merged."""
    with torch.inference_mode():
        return torch.cat([made(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in ids]).numpy()


# DistilBERT is exported below.
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"distilbert"}))
def test_onnxruntime_gives_the_unmerged_classifiers_logits_for_any_batch_and_length(tmp_path, tokenizer, architecture):
    made, said = one_block(architecture), []
    generator = torch.Generator().manual_seed(0)
    # Lengths of one and of the whole context, and batches of one row: none of them is the traced one.
    rows = [torch.randint(1, 99, (length,), generator=generator).tolist() for length in (1, 32, 7, 2, 19)]
    expected = [alone(made, rows), alone(made, encode(tokenizer, SENTENCES, 32))]
    assert np.ptp(expected[0]) > 0.01
    export_teacher.write_classifier(made, tokenizer, Reading(CLASSES, 32), ROWS, tmp_path / "out", say=said.append)
    path = tmp_path / "out" / "classifier.onnx"
    assert {file.name for file in path.parent.iterdir()} == {path.name, "tokenizer.json", "labels.json", "example.py"}
    model = onnx.load(path)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", export_teacher.OPSET)]
    assert takes_any_batch_and_length(model)
    # The exporter's notes name the files of this machine.
    assert b".py" not in path.read_bytes()
    session = export.session(path, threads=1)
    for ids, wanted in ((rows, expected[0]), (encode(tokenizer, SENTENCES, 32), expected[1])):
        for size in (1, 5):
            assert np.abs(export.onnx_logits(session, ids, size) - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    assert len(said) == 1 and "equal PyTorch's on 5 sentences" in said[0]


def test_int8_in_two_files_and_a_calibration_are_told_and_the_example_answers_with_both(tmp_path, tokenizer, monkeypatch):
    # As if a file could hold a thousand bytes alone: the weights stand in one next to it.
    monkeypatch.setattr(export, "LARGEST", 1000)
    made, said = one_block("distilbert", targets=("q", "v")), []
    logits = alone(made, encode(tokenizer, SENTENCES, 32))
    # A threshold that turns the verdict of one sentence.
    scaled = torch.tensor(logits / 2.5).softmax(-1)[:, 1]
    threshold = float(scaled.sort().values[-2:].mean())
    reading = Reading(CLASSES, 32, calibration=Calibration(2.5, 1, threshold))
    export_teacher.write_classifier(made, tokenizer, reading, ROWS, tmp_path / "out", int8=True, say=said.append)
    path = tmp_path / "out" / "classifier.onnx"
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.data", "tokenizer.json",
                                                             "labels.json", "int8.json", "example.py"}
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    # A block has six linear layers, the head one that is no last layer; embeddings are stored in 8 bits.
    assert takes_any_batch_and_length(model) and kinds.count("MatMulInteger") == 6 + 1 and "DequantizeLinear" in kinds
    found = export.onnx_logits(export.session(path, threads=1), encode(tokenizer, SENTENCES, 32))
    assert 0 < np.abs(found - logits / 2.5).max() < 0.1 * np.abs(logits).max()
    cost = json.loads((path.parent / "int8.json").read_text())
    assert cost["int8"]["accuracy"] == (found.argmax(-1) == ROWS.labels).mean()
    assert cost["float32"]["accuracy"] == (logits.argmax(-1) == ROWS.labels).mean()
    assert cost["same_verdicts"] == (found.argmax(-1) == logits.argmax(-1)).sum()
    assert cost["megabytes"] == sum(part.stat().st_size for part in path.parent.glob("*.onnx*")) / 1e6
    assert cost["megabytes"] < cost["float32_megabytes"] and "int8: " in said[1]
    done = subprocess.run([sys.executable, path.parent / "example.py", *SENTENCES], capture_output=True, text=True)
    chances = torch.tensor(found).softmax(-1)
    labels = [int(row[1] >= threshold) for row in chances]
    assert set(labels) == {0, 1} and labels != found.argmax(-1).tolist()
    assert done.stdout.splitlines() == [f"{CLASSES[label]}\t{row[label]:.4f}\t{text}" for label, row, text in zip(
        labels, chances.tolist(), SENTENCES, strict=True)], done.stderr


def test_a_wrong_graph_and_a_classifier_that_cannot_be_written_leave_nothing(tmp_path, tokenizer, monkeypatch):
    def refused(made) -> str:
        with pytest.raises(UserError) as error:
            export_teacher.write_classifier(made, tokenizer, Reading(CLASSES, 32), ROWS, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return one_line(error)
    made = adapted("bert")
    made.by_length = True
    assert "a bert classifier reads the pads of a batch too" in refused(made)
    made = adapted("gpt2")
    with torch.no_grad():
        next(iter(lora_layers(made.net).values())).lora_B[0, 0] = torch.nan
    assert "not finite; nothing was merged" in refused(made)
    with monkeypatch.context() as patch:
        def fail(*_, **__):
            raise torch.onnx.OnnxExporterError("a step\nwithout a graph")
        patch.setattr(torch.onnx, "export", fail)
        assert "torch.export does not read it (a step without a graph)" in refused(adapted("llama"))
    # A graph that counts the tokens.
    monkeypatch.setattr(export_teacher, "write_graph", lambda _, path: path.write_bytes(onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> counts (int64[batch, length] input_ids, int64[batch, length] '
        "attention_mask) => (float[batch, two] logits) { real = Cast<to = 1>(attention_mask)  "
        "axis = Constant<value = int64[1] {1}>()  count = ReduceSum(real, axis)  "
        "logits = Concat<axis = 1>(count, count) }").SerializeToString()))
    assert "onnxruntime's logits differ from PyTorch's" in refused(adapted("mpnet"))
