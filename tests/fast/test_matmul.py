"""matmul: products by each library against float64; linears of a model by `product`; precisions of frozen linears."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, adapted, fast_classifier, toy_batch, toy_net
from torch import nn
from transformers.pytorch_utils import Conv1D

from fast import choice, gemm, matmul, onepass
from fast import frozen_linear as frozen_linear_module
from fast.frozen_linear import frozen_linear
from fast.installation import FAST
from fast.matmul import (
    FastConv1D,
    FastLinear,
    add_update,
    by_onednn,
    joined,
    lay_side_by_side,
    narrow,
    set_precision,
    wide_matmul,
)
from model import LoRALinear, LoRAOptions, TextClassifier, weight_of
from train_utils import trainable


@pytest.fixture(params=choice.MATMULS)
def library(request):
    """Each library in turn, whichever this machine would choose."""
    choose(request.param)
    return request.param


def choose(library: str) -> None:
    if library == "onednn" and not choice.has_onednn():
        pytest.skip("this PyTorch was built without oneDNN")
    if library == "gemm" and not gemm.available():
        pytest.skip("no CPU with AVX-512 and bfloat16, or no C compiler")
    choice.use_matmul(library)


@pytest.fixture
def by_library(monkeypatch):
    """Notes the shapes of the weights that a library other than PyTorch's own choice takes."""
    calls = []

    def noted(takes):
        def asked(x, W):
            if takes(x, W):
                calls.append(tuple(W.shape))
            return takes(x, W)
        return asked

    monkeypatch.setattr(matmul, "by_onednn", noted(matmul.by_onednn))
    monkeypatch.setattr(matmul, "by_gemm", noted(matmul.by_gemm))
    return calls


# ---------------------------------------------------------------- products

LAYOUTS = {"rows": lambda W: W.contiguous(), "transposed": lambda W: W.t().contiguous().t(),
           "gaps": lambda W: torch.cat([W, W], 1)[:, :W.shape[1]]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 7, 5), (3, 64, 1), (150, 96, 33), (0, 8, 8)])
def test_a_product_is_that_of_float64(library, layout, rows, inputs, outputs):
    torch.manual_seed(0)
    x, W, bias, add = (torch.randn(*shape) for shape in ((inputs, rows), (outputs, inputs), (outputs,), (rows, outputs)))
    x, W = x.t(), LAYOUTS[layout](W)  # x strided, as a part of a gradient is
    exact = x.double() @ W.double().t()
    for b, a in ((None, None), (bias, None), (None, add), (bias, add)):
        expected = (exact + sum(t.double() for t in (b, a) if t is not None)).float()
        torch.testing.assert_close(wide_matmul(x, W, b, None if a is None else a.clone()), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kernels", choice.KERNELS)
@pytest.mark.parametrize("outputs", [40, 1024])  # rows of 4 KiB go to the other library
def test_narrow_products_of_lora_are_those_of_float64(library, outputs, kernels):
    if kernels == "onepass" and not onepass.available():
        pytest.skip("no CPU with AVX-512, or no C compiler")
    choice.use_kernels(kernels)
    torch.manual_seed(0)
    x, A, b, whole = torch.randn(30, 16), torch.randn(3, 16), torch.randn(3, outputs), torch.randn(30, outputs + 8)
    h, before = narrow(x, A), whole.clone()
    torch.testing.assert_close(h, (x.double() @ A.double().t()).float(), atol=1e-5, rtol=1e-5)
    for out in (whole[:, :outputs].contiguous(), whole[:, 4:-4]):  # a tensor, and a part of one
        expected = out.double() + 2.5 * h.double() @ b.double()
        add_update(out, h, b, 2.5)
        torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(whole[:, :4], before[:, :4]) and torch.equal(whole[:, -4:], before[:, -4:])


def test_weights_with_gaps_and_other_types_never_reach_onednn():
    """Its reference code, which takes what its fast code does not, is a hundred times slower."""
    if not choice.has_onednn():
        pytest.skip("this PyTorch was built without oneDNN")
    choice.use_matmul("onednn")
    x, W = torch.randn(4, 8), torch.randn(6, 8)
    assert by_onednn(x, W) and by_onednn(x, torch.randn(8, 6).t())
    assert not by_onednn(x, torch.randn(6, 16)[:, :8]) and not by_onednn(x, torch.randn(8, 12).t()[:6])
    assert not by_onednn(x.double(), W.double()) and not by_onednn(x[:0], W)
    choice.use_matmul("torch")
    assert not by_onednn(x, W)


def test_some_outputs_of_many_rows_are_a_dense_product(library, by_library):
    """The last block's keys and values of GPT-2's c_attn: a slice whose rows lie apart."""
    layer, x = Conv1D(48, 16).requires_grad_(False), torch.randn(200, 16, requires_grad=True)
    part = frozen_linear([layer], x, outputs=slice(16, None))
    expected = (x.double() @ layer.weight[:, 16:].double() + layer.bias[16:].double()).float()
    torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(part)
    torch.testing.assert_close(torch.autograd.grad((part * weights).sum(), x),
                               torch.autograd.grad((expected * weights).sum(), x), atol=1e-5, rtol=1e-5)
    assert by_library == ([] if library == "torch" else [(32, 16), (16, 32)])


# ---------------------------------------------------------------- a model's linears

@pytest.mark.parametrize("plain", [nn.Linear(8, 12), nn.Linear(8, 12, bias=False), Conv1D(12, 8)], ids=str)
def test_a_fast_linear_is_the_plain_one_with_all_its_gradients(library, plain, by_library):
    fast = copy.deepcopy(plain)
    fast.__class__ = FAST[type(fast)]
    assert isinstance(fast, (FastLinear, FastConv1D)) and list(fast.state_dict()) == list(plain.state_dict())
    found = []
    for layer in (plain, fast):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 8, requires_grad=True)
        y = layer(x)
        found.append((y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert len(by_library) == (0 if library == "torch" else 4)  # asked once more than there are products


def test_autocast_is_left_to_pytorch(library):
    layer = FastLinear(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16


OPTIONS = [{}, {"targets": ("q", "v")}, {"layers": "1-1"}, {"dropout": 0.3}]


def step(classifier: TextClassifier) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a toy batch and the gradients of a step on it."""
    classifier.train()
    torch.manual_seed(4)
    logits = classifier(*toy_batch())
    F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
    return logits.detach(), {name: p.grad for name, p in trainable(classifier).items()}


def assert_like(found, expected, logits: float, gradients: float) -> None:
    """The logits within this share of the largest, all gradients together within this share of their norm."""
    torch.testing.assert_close(found[0], expected[0], atol=logits * float(expected[0].abs().max()), rtol=0)
    assert {grad.dtype for grad in found[1].values()} <= {torch.float32} and found[1].keys() == expected[1].keys()
    if expected[1]:
        difference = [found[1][name] - grad for name, grad in expected[1].items()]
        norms = [torch.nn.utils.get_total_norm(grads) for grads in (difference, list(expected[1].values()))]
        assert norms[0] <= gradients * norms[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("other", [library for library in choice.MATMULS if library != "torch"])
def test_logits_and_gradients_do_not_depend_on_the_library(architecture, options, other, by_library):
    found = []
    for library in ("torch", other):
        choose(library)
        by_library.clear()
        found.append(step(adapted(architecture, **options)))
        assert bool(by_library) == (library == other)
    assert_like(found[1], found[0], 1e-5, 1e-5)


# ---------------------------------------------------------------- precisions

@pytest.mark.parametrize("options", [*OPTIONS, "head", "none"], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_float32_up_to_its_rounding(library, architecture, options):
    found = []
    for precision in ("fp32", "bf16"):
        if isinstance(options, dict):
            classifier = adapted(architecture, **options)
        else:
            classifier = fast_classifier(toy_net(architecture)).configure(options)
        set_precision(classifier.net.base_model, precision)
        linears = [m for m in classifier.net.base_model.modules() if isinstance(m, (FastLinear, FastConv1D))]
        assert {m.weight.dtype for m in linears} == {torch.bfloat16 if precision == "bf16" else torch.float32}
        if options == "none":
            found.append((classifier(*toy_batch()).detach(), {}))
        else:
            found.append(step(classifier))
    assert found[0][0].dtype == found[1][0].dtype == torch.float32 and not torch.equal(found[0][0], found[1][0])
    assert_like(found[1], found[0], 0.05, 0.2)


def test_a_layer_outside_the_known_blocks_takes_bfloat16_weights_too(library):
    layer = LoRALinear(FastLinear(8, 6), 2, 4.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8)
    exact = layer(x)
    set_precision(layer, "bf16")
    assert layer.base.weight.dtype == torch.bfloat16 and layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), exact, atol=0.1, rtol=0.02)


def test_a_float32_head_reads_what_a_bfloat16_backbone_gives(library):
    """On a GPU the whole backbone is bfloat16."""
    head, x = FastLinear(8, 3), torch.randn(4, 8).bfloat16()
    assert torch.equal(head(x), head(x.float())) and head(x).dtype == torch.float32


def test_a_full_run_stays_float32():
    net = toy_net("bert")
    classifier = fast_classifier(net).configure("full", LoRAOptions())
    set_precision(net.base_model, "bf16")
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}


# ---------------------------------------------------------------- layers that read the same input

def groups_of(classifier: TextClassifier) -> list[list[torch.Tensor]]:
    """Weights that are read with the same input."""
    return [[weight_of(getattr(layer, "base", layer)) for layer in map(module.get_submodule, names)]
            for module in classifier.net.base_model.modules() for names in getattr(module, "together", ())]


@pytest.mark.parametrize("options", [one for one in OPTIONS if "dropout" not in one], ids=str)  # else A reads another input
@pytest.mark.parametrize("architecture", ["llama", "bert", "distilbert"])
def test_layers_that_read_the_same_input_are_one_product(architecture, options, library, monkeypatch):
    apart, together, products = adapted(architecture, **options), adapted(architecture, **options), []
    names = {name: value.clone() for name, value in together.state_dict().items()}
    set_precision(together.net.base_model, "fp32")
    assert names.keys() == together.state_dict().keys()
    assert all(value.equal(names[name]) for name, value in together.state_dict().items())
    expected = step(apart)
    plain = frozen_linear_module.wide_matmul
    monkeypatch.setattr(frozen_linear_module, "wide_matmul", lambda x, W, *rest, **more: (
        products.append(tuple(W.shape)) or plain(x, W, *rest, **more)))
    assert_like(step(together), expected, 1e-5, 1e-5)
    groups = groups_of(together)
    assert groups and all(joined(group, [None] * len(group)) is not None for group in groups)
    for group in groups[:-1]:  # of the last block a part of the attention is computed for one token alone
        assert (sum(map(len, group)), group[0].shape[1]) in products


def test_joined_weights_are_those_that_follow_each_other_in_memory():
    layers = [nn.Linear(4, n).requires_grad_(False) for n in (3, 2, 5)]
    weights, nothing = [layer.weight for layer in layers], [None] * 3
    assert joined(weights, nothing) is None
    lay_side_by_side(layers)
    assert torch.equal(joined(weights, nothing), torch.cat(weights))
    assert torch.equal(joined(weights[1:], nothing[1:]), torch.cat(weights[1:]))
    assert joined(weights, [layers[0].bias, None, None]) is None and joined(weights[::2], nothing[::2]) is None
    assert joined(weights[::-1], nothing) is None
    both = joined(weights, nothing)
    layers[1].weight.add_(1)  # as merging an adapter does
    assert torch.equal(both, torch.cat(weights))
    layers[0].weight.data = layers[0].weight.data.clone()
    assert joined(weights, nothing) is None
    trained = [nn.Linear(4, 3), nn.Linear(4, 2)]
    lay_side_by_side(trained)
    assert joined([layer.weight for layer in trained], [None] * 2) is None
