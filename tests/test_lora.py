"""lora.product and what stands before it, against the modules they stand for (LoRALinear itself: test_model.py)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lora import GELU, ExactGELU, LayerNorm, LoRALinear, RMSNorm, SwiGLU, _Before, product


def norm_of(kind: type) -> nn.Module:
    norm = kind(8).double().requires_grad_(False)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def pairs() -> dict:
    """Ours, and the module or formula it stands for."""
    torch.manual_seed(0)
    layer, rms = norm_of(nn.LayerNorm), norm_of(LlamaRMSNorm)
    exact_rms = lambda x: rms.weight * x * (x.square().mean(-1, keepdim=True) + rms.variance_epsilon).rsqrt()  # noqa: E731
    return {"LayerNorm": (LayerNorm(layer), layer), "RMSNorm": (RMSNorm(rms), exact_rms),
            "GELU": (GELU(), ACT2FN["gelu_new"]), "ExactGELU": (ExactGELU(), F.gelu),
            "SwiGLU": (SwiGLU(), lambda x: F.silu(x[:, :4]) * x[:, 4:])}


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("rows", [1, 5, 70])  # more rows than GELU takes at a time
def test_what_stands_before_is_its_formula_forward_and_backward(name, rows):
    ours, reference = pairs()[name]
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    y = _Before.apply(x, ours)
    torch.testing.assert_close(y, reference(x), atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(y)
    expected, = torch.autograd.grad(reference(x), x, grad)
    again, found = ours.backward(x.detach(), grad)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    assert torch.equal(again, ours(x.detach()))  # computed again: the very same
    assert torch.autograd.gradcheck(lambda x: _Before.apply(x, ours), x) if rows == 5 else True


@pytest.mark.parametrize("name", ["GELU", "RMSNorm"])
def test_values_far_from_zero_stay_finite_and_right(name):
    ours, reference = pairs()[name]
    x = torch.tensor([[-1e4, -60.0, -5.0, -1e-6, 0.0, 5.0, 60.0, 1e4]], dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-7, rtol=1e-10)
    assert ours.backward(x, torch.ones_like(x))[1].isfinite().all()


def test_rms_norm_is_llamas_module_in_float32():
    norm = LlamaRMSNorm(8, eps=1e-5)
    x = torch.randn(5, 8)
    torch.testing.assert_close(RMSNorm(norm)(x), norm(x), atol=1e-6, rtol=1e-6)


def layers(kinds: tuple[str, ...]) -> list[nn.Module]:
    """Linear layers of 8 inputs; `lora` ones are adapted with ranks that differ, `merged` ones are merged."""
    torch.manual_seed(1)
    made = []
    for i, kind in enumerate(kinds):
        layer = (Conv1D(3 + i, 8) if kind == "conv" else nn.Linear(8, 3 + i, bias=kind != "no bias")).double()
        layer.requires_grad_(False)
        if kind in ("lora", "merged", "other scaling"):
            layer = LoRALinear(layer, rank=1 + i, alpha=(3.0 if kind == "other scaling" else 2.0) * (1 + i)).double()
            nn.init.normal_(layer.lora_B)
            if kind == "merged":
                layer.merge()
        made.append(layer)
    return made


GROUPS = [("lora",), ("plain",), ("conv",), ("lora", "lora", "lora"), ("plain", "no bias"), ("lora", "plain", "lora"),
          ("lora", "merged"), ("plain", "lora"), ("lora", "other scaling")]


@pytest.mark.parametrize("kinds", GROUPS, ids="-".join)
@pytest.mark.parametrize("name", [None, *pairs()])
def test_a_product_is_its_layers_one_by_one(kinds, name):
    group, (ours, reference) = layers(kinds), pairs()[name] if name else (None, lambda x: x)
    if name == "SwiGLU":
        group, reference = [nn.Linear(4, 3).double().requires_grad_(False)] if kinds == ("plain",) else None, reference
        if group is None:
            return
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    trained = [p for layer in group for p in layer.parameters() if p.requires_grad and not getattr(layer, "merged", False)]
    expected = torch.cat([F.linear(reference(x), *full(layer)) for layer in group], -1)
    found = product(group, x, ours)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, [x, *trained], grad), torch.autograd.grad(expected, [x, *trained], grad),
                    strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda x, *_: product(group, x, ours), (x, *trained))


def full(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer, the update in the weight."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    if isinstance(layer, LoRALinear) and not layer.merged:
        weight = weight + layer.scaling * layer.block_B() @ layer.lora_A
    return weight, base.bias


@pytest.mark.parametrize("slices", [None, [(0, 4), (8, 12)]])
def test_some_outputs_alone_are_those_of_the_whole(slices):
    layer = LoRALinear(Conv1D(12, 8).double(), rank=2, alpha=4.0, slices=slices).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    whole = product([layer], x)
    for outputs in (slice(0, 4), slice(4, None)):
        part = product([layer], x, outputs=outputs)
        torch.testing.assert_close(part, whole[:, outputs], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(part.square().sum(), [x, layer.lora_A, layer.lora_B]),
                                   torch.autograd.grad(product([layer], x)[:, outputs].square().sum(),
                                                       [x, layer.lora_A, layer.lora_B]), atol=1e-11, rtol=1e-9)


def test_dropout_of_one_layer_leaves_the_sum_of_the_others_as_it_was():
    group = layers(("lora", "lora"))
    group[0].dropout.p = 0.5
    x = torch.randn(50, 8, dtype=torch.float64)
    calm = product(group, x)  # in training mode
    again = product(group, x)
    assert not torch.equal(calm[:, :3], again[:, :3]) and torch.equal(calm[:, 3:], again[:, 3:])
    for layer in group:
        layer.eval()
    assert torch.equal(product(group, x), product(group, x))


def test_the_product_keeps_its_input_and_not_what_stands_before_the_layer():
    kept = []
    layer, = layers(("lora",))
    x = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product([layer], x, GELU())
    assert [t.shape for t in kept if len(t) == 64] == [(64, 8), (64, 1)] and kept[0].data_ptr() == x.data_ptr()


def test_a_weight_that_trains_is_refused():
    with pytest.raises(RuntimeError, match="requires a gradient"):
        product([nn.Linear(8, 3)], torch.randn(2, 8))
