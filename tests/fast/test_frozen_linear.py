"""lora: LoRALinear against its formula; product and what stands before it against the modules they stand for."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import adapted, toy_batch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from fast import frozen_linear as linear_module
from fast.frozen_linear import FastLoRALinear, frozen_linear
from fast.prologue import ApplyPrologue, ExactGELUPrologue, GELUPrologue, LayerNormPrologue, RMSNormPrologue, SwiGLUPrologue
from model import LoRALinear

# ---------------------------------------------------------------- LoRALinear

def linear(kind: str, inputs: int = 8, outputs: int = 12) -> nn.Module:
    torch.manual_seed(3)
    base = Conv1D(outputs, inputs) if kind == "Conv1D" else nn.Linear(inputs, outputs, bias=kind != "no bias")
    if base.bias is not None:
        nn.init.normal_(base.bias)
    return base


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("slices", [None, [(0, 4), (8, 12)], [(4, 8)]])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_linear_is_its_formula_in_float64(kind, slices, rslora):
    base = linear(kind)
    lora = LoRALinear(base, rank=3, alpha=7.0, rslora=rslora, slices=slices)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 8)
    f64 = {name: p.detach().double().numpy() for name, p in lora.named_parameters()}
    W = f64["base.weight"].T if kind == "Conv1D" else f64["base.weight"]
    expected = x.double().numpy() @ W.T + f64.get("base.bias", 0.0)
    plain = expected.copy()
    row = 0
    for i, (start, stop) in enumerate(slices or [(0, 12)]):
        A, B = f64["lora_A"][3 * i:3 * i + 3], f64["lora_B"][row:row + stop - start]
        expected[..., start:stop] += 7.0 / (np.sqrt(3) if rslora else 3) * (x.double().numpy() @ A.T @ B.T)
        row += stop - start
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(lora(x).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("slices", [None, [(0, 4), (8, 12)]])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_formula_left_to_autograd(kind, slices, dropout):
    lora = LoRALinear(linear(kind), rank=3, alpha=7.0, dropout=dropout, slices=slices).double().train()
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 12, dtype=torch.float64)  # a gradient that differs from output to output

    torch.manual_seed(8)
    (lora(x) * weights).sum().backward()
    ours = [p.grad.clone() for p in (x, lora.lora_A, lora.lora_B)]
    for p in (x, lora.lora_A, lora.lora_B):
        p.grad = None
    torch.manual_seed(8)
    update = lora.dropout(x.view(10, 8)).view_as(x) @ lora.lora_A.t() @ lora.block_B().t()
    ((lora.base(x) + 7.0 / 3 * update) * weights).sum().backward()
    assert lora.base.weight.grad is None
    for grad, p in zip(ours, (x, lora.lora_A, lora.lora_B), strict=True):
        assert p.grad.abs().min() > 0
        torch.testing.assert_close(grad, p.grad, atol=1e-12, rtol=1e-10)


def test_gradients_hold_for_inputs_that_need_none_and_for_strided_ones():
    lora = LoRALinear(linear("Linear"), rank=3, alpha=7.0).double()
    nn.init.normal_(lora.lora_B)
    x = torch.randn(8, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    lora(x).sum().backward()
    expected = torch.autograd.grad((7.0 / 3 * x @ lora.lora_A.t() @ lora.lora_B.t()).sum(), (lora.lora_A, lora.lora_B))
    assert x.grad is None
    torch.testing.assert_close((lora.lora_A.grad, lora.lora_B.grad), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("rank, alpha", [(1, 16.0), (8, 16.0), (3, 5.0)])
def test_scaling_is_alpha_over_rank_or_over_its_root(rank, alpha):
    assert LoRALinear(linear("Linear"), rank, alpha).scaling == alpha / rank
    assert LoRALinear(linear("Linear"), rank, alpha, rslora=True).scaling == alpha / rank ** 0.5


def test_a_fresh_layer_has_a_random_A_within_the_kaiming_bound_and_a_zero_B():
    lora = LoRALinear(linear("Linear", inputs=16), 8, 16.0)
    assert not lora.lora_B.any()
    assert 0.5 / 16 ** 0.5 < lora.lora_A.abs().max() <= 1 / 16 ** 0.5


def test_outputs_outside_the_slices_are_exactly_the_base_layers():
    base = linear("Conv1D")
    x = torch.randn(5, 8)
    plain = base(x)
    lora = LoRALinear(base, 2, 8.0, slices=[(0, 4), (8, 12)])
    nn.init.normal_(lora.lora_B)
    y = lora(x)
    assert not torch.isclose(y[:, :4], plain[:, :4]).all() and not torch.isclose(y[:, 8:], plain[:, 8:]).all()
    assert torch.equal(y[:, 4:8], plain[:, 4:8])


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    base = linear("Linear")
    lora = LoRALinear(base, 2, 8.0, dropout=0.5)
    x = torch.randn(64, 8)
    assert torch.equal(lora.train()(x), base(x))  # B is zero: whatever was dropped, the frozen part is whole
    nn.init.normal_(lora.lora_B)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_products_with_bfloat16_weights_leave_the_rest_in_float32(kind):
    torch.manual_seed(0)
    exact = FastLoRALinear(linear(kind), rank=2, alpha=4.0)
    nn.init.normal_(exact.lora_B)
    rough = copy.deepcopy(exact)
    rough.base.to(torch.bfloat16)
    x = torch.randn(5, 8)
    outputs, gradients = [], []
    for layer in (exact, rough):
        inputs = x.clone().requires_grad_()
        outputs.append(layer(inputs))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [inputs, layer.lora_A, layer.lora_B]))
    assert all(t.dtype == torch.float32 for t in (outputs[1], *gradients[1]))
    assert not torch.equal(*outputs)  # bfloat16 was at work
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.03, atol=0.03)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=0.05, atol=0.05 * float(one.abs().max()))


def test_bfloat16_activations_meet_float32_weights():
    torch.manual_seed(0)
    base, x = linear("Linear"), torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    lora = FastLoRALinear(base, rank=2, alpha=4)
    nn.init.normal_(lora.lora_B)
    expected, weights = lora(x.detach().float().requires_grad_()), torch.randn(4, base.out_features)
    found = lora(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
    (found * weights.bfloat16()).sum().backward()
    update = base.weight.double() + lora.delta().double()
    torch.testing.assert_close(x.grad.double(), weights.double() @ update, atol=0.1, rtol=0.05)


def test_adapters_stay_float32_on_bfloat16_weights():
    base = linear("Linear").to(torch.bfloat16)
    lora = LoRALinear(base, 2, 8.0)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert lora.lora_A.dtype == lora.lora_B.dtype == torch.float32
    assert lora(x).dtype == torch.bfloat16 and not torch.equal(lora(x), base(x))


# ---------------------------------------------------------------- what stands before

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
    return {"LayerNormPrologue": (LayerNormPrologue(layer), layer), "RMSNormPrologue": (RMSNormPrologue(rms), exact_rms),
            "GELUPrologue": (GELUPrologue(), ACT2FN["gelu_new"]), "ExactGELUPrologue": (ExactGELUPrologue(), F.gelu),
            "SwiGLUPrologue": (SwiGLUPrologue(), lambda x: F.silu(x[:, :4]) * x[:, 4:])}


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("rows", [1, 5, 70])  # more rows than GELUPrologue takes at a time
def test_what_stands_before_is_its_formula_forward_and_backward(name, rows):
    ours, reference = pairs()[name]
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    y = ApplyPrologue.apply(x, ours)
    torch.testing.assert_close(y, reference(x), atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(y)
    expected, = torch.autograd.grad(reference(x), x, grad)
    again, found = ours.backward(x.detach(), grad)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    assert torch.equal(again, ours(x.detach()))  # computed again: the very same
    assert torch.autograd.gradcheck(lambda x: ApplyPrologue.apply(x, ours), x) if rows == 5 else True


@pytest.mark.parametrize("name", ["GELUPrologue", "RMSNormPrologue"])
def test_values_far_from_zero_stay_finite_and_right(name):
    ours, reference = pairs()[name]
    x = torch.tensor([[-1e4, -60.0, -5.0, -1e-6, 0.0, 5.0, 60.0, 1e4]], dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-7, rtol=1e-10)
    assert ours.backward(x, torch.ones_like(x))[1].isfinite().all()


def test_rms_norm_is_llamas_module_in_float32():
    norm = LlamaRMSNorm(8, eps=1e-5)
    x = torch.randn(5, 8)
    torch.testing.assert_close(RMSNormPrologue(norm)(x), norm(x), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- product

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
    if name == "SwiGLUPrologue":
        group, reference = [nn.Linear(4, 3).double().requires_grad_(False)] if kinds == ("plain",) else None, reference
        if group is None:
            return
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    trained = [p for layer in group for p in layer.parameters() if p.requires_grad and not getattr(layer, "merged", False)]
    expected = torch.cat([F.linear(reference(x), *full(layer)) for layer in group], -1)
    found = frozen_linear(group, x, ours)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, [x, *trained], grad), torch.autograd.grad(expected, [x, *trained], grad),
                    strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda x, *_: frozen_linear(group, x, ours), (x, *trained))


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
    whole = frozen_linear([layer], x)
    for outputs in (slice(0, 4), slice(4, None)):
        part = frozen_linear([layer], x, outputs=outputs)
        torch.testing.assert_close(part, whole[:, outputs], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(part.square().sum(), [x, layer.lora_A, layer.lora_B]),
                                   torch.autograd.grad(frozen_linear([layer], x)[:, outputs].square().sum(),
                                                       [x, layer.lora_A, layer.lora_B]), atol=1e-11, rtol=1e-9)


def test_dropout_of_one_layer_leaves_the_sum_of_the_others_as_it_was():
    group = layers(("lora", "lora"))
    group[0].dropout.p = 0.5
    x = torch.randn(50, 8, dtype=torch.float64)
    calm = frozen_linear(group, x)  # in training mode
    again = frozen_linear(group, x)
    assert not torch.equal(calm[:, :3], again[:, :3]) and torch.equal(calm[:, 3:], again[:, 3:])
    for layer in group:
        layer.eval()
    assert torch.equal(frozen_linear(group, x), frozen_linear(group, x))


def test_the_product_keeps_its_input_and_not_what_stands_before_the_layer():
    kept = []
    layer, = layers(("lora",))
    x = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear([layer], x, GELUPrologue())
    assert [t.shape for t in kept if len(t) == 64] == [(64, 8), (64, 1)] and kept[0].data_ptr() == x.data_ptr()


def test_a_weight_that_trains_is_refused():
    with pytest.raises(RuntimeError, match="requires a gradient"):
        frozen_linear([nn.Linear(8, 3)], torch.randn(2, 8))


@pytest.mark.parametrize("options", [{}, {"targets": ("q", "v")}, {"targets": ("k", "mlp")}], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_what_the_kernel_of_tiles_is_given_adds_up_to_the_same(architecture, options, monkeypatch):
    """On any machine: the kernel's place is taken by the sum that it computes."""
    def matmul(terms, biases=(None,)):
        parts = [torch.cat([a @ b for b in bs], 1) for a, bs in terms]
        widths = [b.shape[1] for b in terms[0][1]]
        bias = torch.cat([torch.zeros(n) if b is None else b for n, b in zip(widths, biases, strict=True)])
        return sum(parts) + bias

    found = []
    for tiles in (False, True):
        classifier = adapted(architecture, **options).train()
        with monkeypatch.context() as patch:
            if tiles:
                patch.setattr(linear_module, "by_tiles", lambda *_: True)
                patch.setattr(linear_module.amx, "matmul", matmul)
            logits = classifier(*toy_batch())
            F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        found.append({"logits": logits.detach(), **{n: p.grad for n, p in classifier.named_parameters() if p.requires_grad}})
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=1e-4)
