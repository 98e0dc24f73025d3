"""onepass: norms, activations and attention against float64; a classifier with them against the same without."""
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, adapted, toy_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast import attention as fast_attention
from fast import choice, compiled, onepass
from fast.choice import by_onepass
from train_utils import trainable

needs_onepass = pytest.mark.skipif(not onepass.available(), reason="no CPU with AVX-512, or no C compiler")


def gelu(x):
    return F.gelu(x, approximate="tanh")


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


WEIGHT, BIAS = torch.linspace(-2, 2, 50), torch.linspace(1, -1, 50)


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], WEIGHT.to(x.dtype), 1e-5)


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], WEIGHT.to(x.dtype), BIAS.to(x.dtype), 1e-5)


@needs_onepass
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("function, ours, ours_backward", [
    (gelu, onepass.gelu, onepass.gelu_backward), (swiglu, onepass.swiglu, onepass.swiglu_backward),
    (rms_norm, lambda x: onepass.rms_norm(x, WEIGHT, 1e-5),
     lambda x, grad: onepass.rms_norm_backward(x, WEIGHT, 1e-5, grad)),
    (layer_norm, lambda x: onepass.layer_norm(x, WEIGHT, BIAS, 1e-5),
     lambda x, grad: onepass.layer_norm_backward(x, WEIGHT, BIAS, 1e-5, grad))])
def test_what_stands_before_is_its_formula_in_float64(function, ours, ours_backward, scale):
    torch.manual_seed(1)
    x = torch.randn(19, 50) * scale
    wide = x.double().requires_grad_()
    y = function(wide)
    grad = torch.randn(y.shape)
    y.backward(grad.double())
    tolerance = {"atol": 1e-6 * max(1.0, float(y.detach().abs().max())), "rtol": 0}
    torch.testing.assert_close(ours(x).double(), y.detach(), **tolerance)
    again, dx = ours_backward(x, grad)
    assert torch.equal(again, ours(x)) and torch.equal(ours(x.t().contiguous().t()), again)
    assert torch.equal(ours_backward(x.t().contiguous().t(), grad.t().contiguous().t())[1], dx)
    torch.testing.assert_close(dx.double(), wide.grad, atol=3e-6 * max(1.0, float(wide.grad.abs().max())), rtol=0)


def chains_of(parents: list[int], starts_at: list[int]) -> onepass.Chains:
    """Of the rows `starts_at`, where row i comes after row parents[i] (itself: at the beginning)."""
    chains = []
    for row in starts_at:
        chain = [row]
        while parents[chain[0]] != chain[0]:
            chain.insert(0, parents[chain[0]])
        chains.append(chain)
    start = [sum(map(len, chains[:i])) for i in range(len(chains))]
    return onepass.Chains(*map(torch.tensor, ([row for chain in chains for row in chain], start, [len(c) for c in chains])))


def attention(q, k, v, chains, size, scale, angle):
    """Attention by its formula, with rotary embedding as complex numbers: (N, heads * size)."""
    def turned(x, rows):
        if angle is None:
            return x
        a, b = x.unflatten(-1, (-1, 2, size // 2)).unbind(-2)
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[rows].unsqueeze(1)
        return torch.stack([z.real, z.imag], -2).flatten(1)
    start, length = chains.start.tolist(), chains.length.tolist()
    chain = [chains.chain[s:s + n].tolist() for s, n in zip(start, length, strict=True)]
    q, k = turned(q, [rows[-1] for rows in chain]), turned(k, slice(None))
    q, k, v = (x.unflatten(-1, (-1, size)) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    out = []
    for i, rows in enumerate(chain):
        keys, values = (x[rows].repeat_interleave(shared, 1) for x in (k, v))  # (length, heads, size)
        weights = (scale * torch.einsum("hd,jhd->hj", q[i], keys)).softmax(-1)
        out.append(torch.einsum("hj,jhd->hd", weights, values).flatten())
    return torch.stack(out)


@needs_onepass
@settings(deadline=None, max_examples=60)
@given(data=st.data(), heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]), size=st.sampled_from([2, 8, 22, 32, 64, 70]),
       rotary=st.booleans(), apart=st.booleans(), seed=st.integers(0, 999))
def test_attention_is_its_formula_in_float64(data, heads, size, rotary, apart, seed):
    rows = data.draw(st.integers(1, 40))
    parents = [data.draw(st.integers(max(0, row - 3), row)) for row in range(rows)]
    tokens = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=9)) if apart else list(range(rows))
    chains = chains_of(parents, tokens)
    g = torch.Generator().manual_seed(seed)
    widths = [n * size for n in (heads[0], heads[1], heads[1])]
    angle = torch.randn(rows, size // 2, generator=g) if rotary else None
    table = None if angle is None else (angle.cos().repeat(1, 2), angle.sin().repeat(1, 2))
    if apart:  # queries for themselves, keys beside values
        inputs = [torch.randn(len(tokens), widths[0], generator=g), *torch.randn(rows, 2 * widths[1], generator=g).split(
            widths[1:], 1)]
    else:
        inputs = list(torch.randn(rows, sum(widths), generator=g).split(widths, 1))
    wide = [x.double().requires_grad_() for x in inputs]
    expected = attention(*wide, chains, size, 0.3, None if angle is None else angle.double())
    grad = torch.randn(expected.shape, generator=g)
    expected.backward(grad.double())
    y, lse = onepass.attend(*inputs, onepass.Form(chains, size, 0.3, table))
    torch.testing.assert_close(y.double(), expected.detach(), atol=1e-5, rtol=0)
    out = ([torch.empty(len(tokens), widths[0]), *torch.empty(rows, 2 * widths[1]).split(widths[1:], 1)] if apart else
           torch.empty(rows, sum(widths)).split(widths, 1))
    onepass.attend_backward(inputs, onepass.Form(chains, size, 0.3, table), y, lse, grad, out)
    for ours, x in zip(out, wide, strict=True):
        torch.testing.assert_close(ours.double(), x.grad, atol=2e-5 * max(1.0, float(x.grad.abs().max())), rtol=0)


@needs_onepass
def test_attention_does_not_depend_on_the_number_of_threads(monkeypatch):
    torch.manual_seed(0)
    chains, angle = chains_of([max(0, i - 1) for i in range(30)], list(range(30))), torch.randn(30, 16).repeat(1, 2)
    qkv, grad, found = torch.randn(30, 10 * 32), torch.randn(30, 6 * 32), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        q, k, v = qkv.clone().split([6 * 32, 2 * 32, 2 * 32], 1)
        form = onepass.Form(chains, 32, 0.3, (angle.cos(), angle.sin()))
        y, lse = onepass.attend(q, k, v, form)
        d = torch.empty_like(qkv)
        onepass.attend_backward((q, k, v), form, y, lse, grad,
                            d.split([6 * 32, 2 * 32, 2 * 32], 1))
        found.append((y, d))
    for y, d in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(d, found[0][1])


@needs_onepass
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_long_sentences_go_to_pytorch_and_agree(architecture, monkeypatch):
    found = []
    for short in (0, 64):
        monkeypatch.setattr(fast_attention, "SHORT", short)
        classifier = adapted(architecture)
        with torch.no_grad():
            found.append(classifier(*toy_batch()))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@needs_onepass
def test_what_is_no_number_stays_so():
    assert onepass.gelu(torch.tensor([[float("nan"), 1.0]])).isnan().tolist() == [[True, False]]


@needs_onepass
@settings(deadline=None, max_examples=80)
@given(rows=st.integers(0, 40), n=st.integers(1, 100), rank=st.integers(1, 20), apart=st.integers(0, 3),
       transposed=st.booleans(), seed=st.integers(0, 999))
def test_matmuls_with_a_narrow_matrix_are_those_of_float64(rows, n, rank, apart, transposed, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n + apart, generator=g)[:, apart:]
    h, y = torch.randn(rows, rank, generator=g), torch.randn(rows, n, generator=g)
    A = torch.randn(n, rank, generator=g).t() if transposed else torch.randn(rank, n, generator=g)
    around = torch.full((rows + 2, n + 2 * apart), 7.0)
    inside = around[1:-1, apart:apart + n]
    inside.copy_(y)
    found = {"narrow": (onepass.narrow(x, A), x.double() @ A.double().t()),
             "outer": (onepass.outer(h, x), h.double().t() @ x.double()),
             "update": (onepass.update(inside, h, A), y.double() + h.double() @ A.double())}
    for name, (ours, expected) in found.items():
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=1e-5, msg=name)
    assert found["update"][0] is inside
    inside.fill_(7)
    assert (around == 7).all()  # in place, and nowhere else


@needs_onepass
def test_a_row_of_a_narrow_product_depends_on_no_other_row_and_on_no_number_of_threads(monkeypatch):
    torch.manual_seed(0)
    x, A, h, y = torch.randn(50, 70), torch.randn(9, 70), torch.randn(50, 9), torch.randn(50, 70)
    whole = onepass.narrow(x, A), onepass.update(y.clone(), h, A), onepass.outer(h, x)
    for some in ([0], [49], [3, 17, 20, 41], list(range(1, 30))):
        assert torch.equal(onepass.narrow(x[some], A), whole[0][some])
        assert torch.equal(onepass.update(y[some], h[some], A), whole[1][some])
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for ours, expected in zip((onepass.narrow(x, A), onepass.update(y.clone(), h, A), onepass.outer(h, x)), whole,
                                  strict=True):
            assert torch.equal(ours, expected)


@needs_onepass
@pytest.mark.parametrize("options", [{}, {"targets": ("q", "v")}, {"layers": "1-1"}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_pytorchs(architecture, options, monkeypatch):
    found, calls = [], []
    for name, function in {name: getattr(onepass, name) for name in onepass.ARGUMENTS}.items():
        monkeypatch.setattr(onepass, name, lambda *args, function=function: calls.append(1) or function(*args))
    for kernels in choice.KERNELS:
        choice.use_kernels(kernels)
        calls.clear()
        classifier = adapted(architecture, **options).train()
        torch.manual_seed(4)
        logits = classifier(*toy_batch())
        F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        found.append((logits.detach(), {name: p.grad for name, p in trainable(classifier).items()}))
        assert bool(calls) == (kernels == "onepass" and (architecture in ("gpt2", "llama") or "dropout" not in options))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, atol=1e-5 * max(1, float(grad.abs().max())), rtol=0, msg=name)


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16),
                                   torch.zeros(2, device="meta")])
def test_other_tensors_are_pytorchs(wrong, monkeypatch):
    monkeypatch.setattr(onepass, "available", lambda: True)
    assert by_onepass(torch.zeros(2)) and not by_onepass(torch.zeros(2), wrong)


def test_where_they_cannot_be_had_pytorch_computes_and_says_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "flags_of_cpu", lambda: {"avx2"})
    monkeypatch.setattr(onepass, "load", onepass.load.__wrapped__)
    assert not onepass.available() and not by_onepass(torch.zeros(2)) and choice.kernels() == "torch"
    with pytest.warns(UserWarning, match="cannot be had here"):
        choice.use_kernels("onepass")
    assert choice.kernels() == "torch"
    choice.use_kernels("no such kernels")  # nothing usable was recorded: by rule, without a warning
    assert choice.kernels() == "torch"
