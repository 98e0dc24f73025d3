"""A fine-tuned classifier as an ONNX file, its adapter merged: no PyTorch, no transformers, no code of this project.

    python run.py export runs/LoRA-12345 --out classifier --int8

PyTorch's own exporter (torch.export, not TorchScript) writes the graph of the library's blocks and of the pooling here.
"""
from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import data_utils
from data.segments import add_token_types, reads_pairs
from data_utils import Split
from machine.errors import UserError
from model import TextClassifier
from serving import export, merge
from serving.packages import require
from serving.texts import Reading

OPSET = 18
TOLERANCE = 1e-4  # of float32 logits, as that of a merged checkpoint: merged weights are rounded to float32


class OnnxClassifier(nn.Module):
    """A classifier as torch.export reads it: the reference's own steps, without the shortcut for a batch without pads."""

    def __init__(self, classifier: TextClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, labels)
        if self.classifier.decoder:
            return self.classifier.head_logits(self.classifier.pool(input_ids, attention_mask))
        return self.classifier.net(input_ids=input_ids, attention_mask=attention_mask).logits


def write_classifier(classifier: TextClassifier, tokenizer, reading: Reading, rows: Split, out: Path, *,
                     exact: bool = True, int8: bool = False, say: Callable[[str], None] = print) -> None:
    """Writes classifier.onnx, tokenizer.json, labels.json and example.py into a new folder, checked or not at all.

    Args:
        classifier: on the CPU, in evaluation mode, without a feature head. It is changed: the adapter is merged, and the
            logits are divided by the temperature.
        reading, rows, out, int8: see `export.write_folder`.
        exact: whether the classifier computes in float32.

    Raises:
        UserError: a package is missing, the folder is not new, the adapter is not finite, the logits depend on the pads of
            a batch, torch.export does not read the model, or the file does not give the run's logits.
    """
    if classifier.by_length:
        raise UserError(f"a {classifier.net.config.model_type} classifier reads the pads of a batch too, which an ONNX file "
                        "cannot leave out; nothing was written")
    merge.scale_logits(merge.logits_layer(classifier), reading.calibration.temperature)
    ids = data_utils.encode(tokenizer, rows.sentences, reading.max_length, reading.truncate)
    expected = export.by_batches(partial(torch_logits, classifier), ids)
    merged = merged_classifier(classifier)
    # The new model has no hook yet: its token types are a part of the graph.
    if reads_pairs(tokenizer):
        add_token_types(merged.net, tokenizer)
    # A run in bfloat16 tells less about the graph than its weights in float32 do, which in turn must be near the run.
    if not exact:
        in_run, expected = expected, export.by_batches(partial(torch_logits, merged), ids)
        difference = export.largest_difference(expected, in_run)
        if not difference <= merge.TOLERANCE[False]:
            raise UserError(f"{out}: the merged classifier's logits differ from the run's by {difference:.1e}; expected at "
                            f"most {merge.TOLERANCE[False]:.0e}; nothing was written")
    network = export.Network("classifier", partial(write_graph, merged), write_int8, lambda _: expected, TOLERANCE)
    export.write_folder(network, tokenizer, reading, rows, out, int8=int8, say=say)


def merged_classifier(classifier: TextClassifier) -> TextClassifier:
    """Returns the classifier in float32 with its adapter merged, in the library's own blocks. Changes the classifier.

    Raises:
        UserError: the adapter or the head holds values that are not finite.
    """
    state = merge.plain_state(classifier)
    # A new model: the blocks of the loaded one may be fused, which torch.export does not read.
    net = AutoModelForSequenceClassification.from_config(classifier.net.config, dtype=torch.float32)
    net.load_state_dict(state, assign=True)
    return TextClassifier(net.requires_grad_(False)).eval()


@torch.inference_mode()
def torch_logits(classifier: TextClassifier, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Computes logits (B, labels) of a batch by PyTorch."""
    return classifier(torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])).numpy()


# ---------------------------------------------------------------- the graph

def write_graph(classifier: TextClassifier, path: Path) -> None:
    """Writes the ONNX file of a merged classifier: any batch, any length.

    Raises:
        UserError: torch.export does not read the model.
    """
    require("onnxscript")
    # Several rows and several tokens: of dimensions of one, torch.export would make constants.
    inputs = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]])
    names = ("input_ids", "attention_mask")
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                OnnxClassifier(classifier), inputs, dynamo=True, opset_version=OPSET, verbose=False, input_names=names,
                output_names=["logits"], dynamic_shapes={name: {0: "batch", 1: "length"} for name in names})
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:160]
            raise UserError(f"a {classifier.net.config.model_type} classifier cannot be written as ONNX: torch.export does "
                            f"not read it ({reason}); nothing was written") from None
    # The exporter notes the lines of code that made each node, with paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.ir_version = export.IR_VERSION
    program.save(path, external_data=sum(value.nbytes for value in classifier.state_dict().values()) > export.LARGEST)
    require("onnx").checker.check_model(path, full_check=True)


@contextmanager
def _quiet():
    """Silences the notes of PyTorch's exporter: on packages that are missing, and on names of dimensions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_int8(source: Path, path: Path) -> None:
    """Writes a classifier's file with 8-bit weights: embeddings and linear layers; the last layer stays float32."""
    graph = require("onnx").load(source, load_external_data=False).graph
    last = [node.name for node in graph.node if "logits" in node.output]
    # onnxruntime makes a MatMul and an Add of a Gemm first.
    export.quantize(source, path, ["Gather", "MatMul"], [*last, *(f"{name}_MatMul" for name in last)], per_channel=True)
