"""The fast path against the reference: the same logits and gradients, for every fused architecture and precision."""
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, FAMILIES, randomize_B, toy_batch, toy_net
from torch import nn

import speed
import train_utils
from data_utils import Batch
from fast.classifier import FastClassifier
from fast.frozen_linear import FastLoRALinear
from fast.installation import install
from fast.recurrent import FastDistilRNN
from model import DistilRNN, LoRALinear, LoRAOptions, RNNConfig, TextClassifier, inject_lora, lora_layers
from options.schema import TrainOptions

ROOT = Path(__file__).parents[2]


def adapted_reference(architecture: str, **options) -> TextClassifier:
    """A toy classifier with a LoRA adapter, as the reference computes it."""
    net = toy_net(architecture)
    torch.manual_seed(0)
    inject_lora(net, LoRAOptions(**{"rank": 4, "alpha": 6.0, **options}))
    randomize_B(net)
    return TextClassifier(net).eval()


def logits_and_gradients(classifier: TextClassifier) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of the adapters' dropout
    logits = classifier(*toy_batch((5, 9, 1, 12, 9)))
    F.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1])).backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}}


def largest_difference(found: dict, expected: dict) -> float:
    """The largest difference of a tensor, as a share of that tensor's largest value."""
    assert found.keys() == expected.keys() and len(found) > 2
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


# Every option with the first architectures; the others differ from them in what stands in the block alone.
OPTIONS = [{}, {"targets": ("q", "v")}, {"layers": "1"}, {"rslora": True}]
CASES = [*itertools.product(ARCHITECTURES, OPTIONS), *itertools.product(FAMILIES, OPTIONS[:1]),
         *itertools.product(("deberta-v2", "modernbert"), OPTIONS[1:3])]


@pytest.mark.parametrize("architecture, options", CASES, ids=str)
def test_float32_is_the_reference_up_to_rounding(architecture, options):
    reference, fast = adapted_reference(architecture, **options), adapted_reference(architecture, **options)
    install(fast)
    assert type(fast) is FastClassifier and fast.has_fused_blocks
    assert list(fast.state_dict()) == list(reference.state_dict())
    assert largest_difference(logits_and_gradients(fast), logits_and_gradients(reference)) < 1e-5


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *FAMILIES])
def test_bf16_is_the_reference_up_to_the_rounding_of_activations(architecture):
    """The reference rounds frozen weights, the fast path the inputs of their matmuls too: about as much again."""
    exact, rounded, fast = (adapted_reference(architecture) for _ in range(3))
    install(fast)
    speed.set_precision(fast.net.base_model, "bf16")
    speed.choose("reference")
    speed.set_precision(rounded.net.base_model, "bf16")
    expected = logits_and_gradients(rounded)
    change = largest_difference(expected, logits_and_gradients(exact))
    assert 1e-4 < change < 0.2
    assert largest_difference(logits_and_gradients(fast), expected) < 3 * change


class DoubledUpdate(LoRALinear):
    """A variant of LoRA: a subclass with a `forward` and nothing else."""

    def forward(self, x):
        return self.base(x) + 2 * self.scaling * F.linear(F.linear(x, self.lora_A), self.block_B())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_variant_keeps_its_own_forward(architecture):
    plain = logits_and_gradients(adapted_reference(architecture))["logits"]
    found = []
    for fast in (False, True):
        classifier = adapted_reference(architecture)
        for layer in lora_layers(classifier.net).values():
            layer.__class__ = DoubledUpdate
        if fast:
            install(classifier)
        found.append(logits_and_gradients(classifier))
    assert largest_difference(found[1], found[0]) < 1e-5
    assert float((found[0]["logits"] - plain).abs().max()) > 1e-3


def test_dropout_of_an_adapter_zeroes_inputs_of_A_alone():
    """In training W reads every input; over many samples the mean is the layer without dropout."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 6), rank=2, alpha=4.0, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    fast = FastLoRALinear(layer.base, rank=2, alpha=4.0, dropout=0.5)
    fast.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8)
    exact = layer.eval()(x)
    for one in (layer, fast):
        found = one.train()(x.expand(20_000, -1))
        assert found.std(0).min() > 0.05
        torch.testing.assert_close(found.mean(0, keepdim=True), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("cell", ["lstm", "gru", "mingru"])
@pytest.mark.parametrize("directions, layers", [(1, 1), (2, 1), (2, 2)])
def test_a_student_is_the_reference_up_to_rounding(cell, directions, layers):
    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        student = DistilRNN(RNNConfig(vocab_size=101, cell=cell, directions=directions, rnn_layers=layers)).eval()
        if fast:
            install(student)
        assert type(student) is (FastDistilRNN if fast else DistilRNN)
        found.append(logits_and_gradients(student))
    assert largest_difference(found[1], found[0]) < 1e-5


def test_a_second_call_changes_nothing_and_the_reference_nothing_at_all():
    classifier = adapted_reference("gpt2")
    classes = [type(module) for module in classifier.modules()]
    speed.choose("reference")
    assert "reference" in speed.install(classifier) and [type(m) for m in classifier.modules()] == classes
    assert speed.in_use() == {"matmul": "torch", "kernels": "reference"}
    speed.choose()
    assert speed.install(classifier) == install(classifier) and "\n" not in install(classifier)
    assert [type(m) for m in classifier.modules()] != classes


def test_the_model_can_be_imported_without_the_fast_path():
    code = "import sys, model; sys.exit(any(name.partition('.')[0] == 'fast' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("method, dtype", [("full", torch.bfloat16), ("lora", torch.float32)])
@pytest.mark.parametrize("fast", [True, False])
def test_a_backbone_that_trains_computes_in_bf16_by_autocast_alone(method, dtype, fast):
    """With --precision bf16 a trained backbone keeps float32 weights; a frozen one has its precision in its layers."""
    net = toy_net("gpt2")
    torch.manual_seed(0)
    classifier = TextClassifier(net).configure(method, LoRAOptions(rank=2))
    if fast:
        install(classifier)
    found = []
    net.score.register_forward_hook(lambda module, args, output: found.append(output.dtype) if module.training else None)
    ids, mask = toy_batch()
    batches = [Batch(ids, mask, torch.tensor([0, 1, 1, 0]), torch.arange(4), int(mask.sum()))]
    options = TrainOptions(seed=1, epochs=1, precision="bf16")
    train_utils.fit(classifier, train_utils.Data(batches, {"in_domain": batches}), train_utils.label_loss(), options)
    assert found == [dtype]
