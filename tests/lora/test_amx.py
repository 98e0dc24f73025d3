"""amx: products and what stands before them against float64; a classifier with tiles against the same without."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import toy
from conftest import ARCHITECTURES, adapted, toy_batch, toy_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import amx
from lora import blocks as fused
from lora.linear import frozen_linear
from lora.matmul import set_precision
from lora.prologue import GELUPrologue, RMSNormPrologue, SwiGLUPrologue
from model import TextClassifier
from record.files import UserError, read_json
from report import figures
from train_utils import trainable

needs_tiles = pytest.mark.skipif(not amx.available(), reason="no CPU with AMX, or no C compiler")
# Of a number 2^-16 is lost, at most: twice in a product, and once more with the product of the low parts.
BOUND = 3.1 * 2.0 ** -16


def operands(M: int, K: int, N: int, transposed: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a (M, K) and b (K, N) in larger matrices, so that rows lie apart and nothing is aligned."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(M, K + 5, generator=g)[:, 2:K + 2]
    if transposed:
        return a, torch.randn(N, K + 2, generator=g)[:, 1:K + 1].t()
    return a, (torch.randn(K, N + 3, generator=g) * 10.0 ** torch.randint(-3, 3, (1, N + 3), generator=g))[:, 3:]


@needs_tiles
@settings(deadline=None, max_examples=80)
@given(M=st.integers(0, 70), widths=st.lists(st.integers(0, 130), min_size=1, max_size=4), seed=st.integers(0, 999),
       bias=st.lists(st.booleans(), min_size=4, max_size=4), depths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
       transposed=st.lists(st.booleans(), min_size=16, max_size=16))
def test_a_product_is_that_of_numbers_with_16_bits(M, widths, seed, bias, depths, transposed):
    terms = []
    for i, K in enumerate(depths):
        pairs = [operands(M, K, N, transposed[4 * i + part], seed + 4 * i + part) for part, N in enumerate(widths)]
        terms.append((pairs[0][0], [b for _, b in pairs]))
    biases, N = [torch.randn(N) if some else None for N, some in zip(widths, bias, strict=False)], sum(widths)
    around = torch.full((M, N + 7), 7.0)
    amx.matmul(terms, biases, around[:, 3:N + 3])
    assert (around[:, :3] == 7).all() and (around[:, N + 3:] == 7).all()  # writes where it should, and there alone
    offset = torch.cat([torch.zeros(N) if b is None else b for N, b in zip(widths, biases, strict=True)]).double()
    expected = sum(a.double() @ torch.cat(bs, 1).double() for a, bs in terms) + offset
    size = sum(a.double().abs() @ torch.cat(bs, 1).double().abs() for a, bs in terms) + offset.abs()
    assert ((around[:, 3:N + 3] - expected).abs() <= BOUND * size).all()


@needs_tiles
def test_it_is_not_bfloat16_nor_float32():
    """The error is where 16 bits are: below a hundredth of bfloat16's, above float32's."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    expected = a.double() @ b.double()
    ours, fp32, bf16 = ((x.double() - expected).norm() / expected.norm() for x in (
        amx.matmul([(a, [b])]), a @ b, a.bfloat16() @ b.bfloat16()))
    assert 5 * fp32 < ours < bf16 / 100


@needs_tiles
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_outcome_depends_on_no_other_row(transposed, threads):
    """Not on how many there are either: 3,000 rows of 2,048 are packed in several parts, one is not."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = operands(3000, 2048, 64, transposed, 0)
        bias = torch.randn(64)
        whole = amx.matmul([(a, [b])], [bias])
        for rows in ([0], [2999], [5, 17, 1600], list(range(100, 141))):
            assert torch.equal(amx.matmul([(a[rows], [b])], [bias]), whole[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("terms", [[(2, 3, [(4, 5)])], [(2, 3, [(3, 5)]), (2, 4, [(4, 6)])],
                                   [(2, 3, [(3, 5)]), (1, 4, [(4, 5)])], [(2, 3, [(3, 2), (3, 3)]), (2, 4, [(4, 5)])],
                                   [(2, 3, [(3, 2), (3, 3)]), (2, 4, [(4, 3), (4, 2)])], [(2, 0, [(0, 5)])]])
def test_shapes_that_do_not_fit_are_refused(terms):
    with pytest.raises(ValueError, match=r"do not give \(2, 5\)"):
        amx.matmul([(torch.zeros(M, K), [torch.zeros(shape) for shape in shapes]) for M, K, shapes in terms])


@needs_tiles
def test_the_number_of_threads_changes_nothing(monkeypatch):
    a, b = operands(37, 700, 200, False, 0)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(amx.matmul([(a, [b])]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_tiles
def test_what_is_not_finite_stays_so():
    a, b = torch.ones(3, 32), torch.ones(32, 32)
    a[1, 5] = float("nan")
    b[7, 9] = float("inf")
    out = amx.matmul([(a, [b])])
    assert out[1].isnan().all() and not out[:, 9].isfinite().any()
    assert (out[[0, 2]][:, [n for n in range(32) if n != 9]] == 32).all()
    assert amx.gelu(torch.tensor([[float("nan"), 1.0]])).isnan().tolist() == [[True, False]]


@needs_tiles
@pytest.mark.parametrize("bits", [0x7fc00000, 0x7fffffff, 0xffffffff, 0x7fff8000, 0x7f800001])
def test_no_nan_becomes_a_number(bits):
    nan = torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(torch.float32)
    for place in range(2):
        pair = [torch.ones(3, 32), torch.ones(32, 32)]
        pair[place][1, 5] = nan
        out = amx.matmul([(pair[0], [pair[1]])])
        assert out[:, 5].isnan().all() if place else out[1].isnan().all()


def gelu(x):
    return F.gelu(x, approximate="tanh")


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


WEIGHT = torch.linspace(-2, 2, 50)


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], WEIGHT.to(x.dtype), 1e-5)


@needs_tiles
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("function, ours, ours_backward", [
    (gelu, amx.gelu, amx.gelu_backward), (swiglu, amx.swiglu, amx.swiglu_backward),
    (rms_norm, lambda x: amx.rms_norm(x, WEIGHT, 1e-5), lambda x, grad: amx.rms_norm_backward(x, WEIGHT, 1e-5, grad))])
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


def chains_of(parents: list[int], starts_at: list[int]) -> amx.Chains:
    """Of the rows `starts_at`, where row i comes after row parents[i] (itself: at the beginning)."""
    chains = []
    for row in starts_at:
        chain = [row]
        while parents[chain[0]] != chain[0]:
            chain.insert(0, parents[chain[0]])
        chains.append(chain)
    start = [sum(map(len, chains[:i])) for i in range(len(chains))]
    return amx.Chains(*map(torch.tensor, ([row for chain in chains for row in chain], start, [len(c) for c in chains])))


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


@needs_tiles
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
    y, lse = amx.attend(*inputs, chains, size, 0.3, table)
    torch.testing.assert_close(y.double(), expected.detach(), atol=1e-5, rtol=0)
    out = ([torch.empty(len(tokens), widths[0]), *torch.empty(rows, 2 * widths[1]).split(widths[1:], 1)] if apart else
           torch.empty(rows, sum(widths)).split(widths, 1))
    amx.attend_backward(*inputs, chains, size, 0.3, table, y, lse, grad, out)
    for ours, x in zip(out, wide, strict=True):
        torch.testing.assert_close(ours.double(), x.grad, atol=2e-5 * max(1.0, float(x.grad.abs().max())), rtol=0)


@needs_tiles
def test_attention_does_not_depend_on_the_number_of_threads(monkeypatch):
    torch.manual_seed(0)
    chains, angle = chains_of([max(0, i - 1) for i in range(30)], list(range(30))), torch.randn(30, 16).repeat(1, 2)
    qkv, grad, found = torch.randn(30, 10 * 32), torch.randn(30, 6 * 32), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        q, k, v = qkv.clone().split([6 * 32, 2 * 32, 2 * 32], 1)
        y, lse = amx.attend(q, k, v, chains, 32, 0.3, (angle.cos(), angle.sin()))
        d = torch.empty_like(qkv)
        amx.attend_backward(q, k, v, chains, 32, 0.3, (angle.cos(), angle.sin()), y, lse, grad,
                            d.split([6 * 32, 2 * 32, 2 * 32], 1))
        found.append((y, d))
    for y, d in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(d, found[0][1])


@needs_tiles
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_long_sentences_go_to_pytorch_and_agree(architecture, monkeypatch):
    found = []
    for short in (0, 64):
        monkeypatch.setattr(fused, "SHORT", short)
        classifier = adapted(architecture)
        set_precision(classifier.net.base_model, "bf16x3")
        with torch.no_grad():
            found.append(classifier(*toy_batch()))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def in_float64(terms, biases=(None,)):
    """matmul's contract, for machines without tiles."""
    parts = [sum(a.double() @ bs[i].double() for a, bs in terms) + (0 if bias is None else bias.double())
             for i, bias in enumerate(biases)]
    return torch.cat(parts, 1).float()


@pytest.fixture(params=["tiles", "float64"])
def matmul(request, monkeypatch):
    if request.param == "tiles":
        if not amx.available():
            pytest.skip("no CPU with AMX, or no C compiler")
        return
    monkeypatch.setattr(amx, "matmul", in_float64)
    monkeypatch.setattr(amx, "load", lambda: None)
    monkeypatch.setattr(fused, "SHORT", 0)
    for plain in (RMSNormPrologue, GELUPrologue, SwiGLUPrologue):
        monkeypatch.setattr(plain, "__call__", lambda self, x, tiles=False, call=plain.__call__: call(self, x))
        monkeypatch.setattr(plain, "backward", lambda self, x, g, tiles=False, call=plain.backward: call(self, x, g))


OPTIONS = [{}, {"targets": ("q", "v")}, {"layers": "1-1"}, {"dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_without_tiles(architecture, options, matmul, monkeypatch):
    found, calls = [], []
    counted = amx.matmul
    monkeypatch.setattr(amx, "matmul", lambda *args: calls.append(args) or counted(*args))
    for precision in ("fp32", "bf16x3"):
        classifier = adapted(architecture, **options)
        set_precision(classifier.net.base_model, precision)
        classifier.train()  # with dropout, where there is any
        torch.manual_seed(4)
        logits = classifier(*toy_batch())
        F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
        found.append((logits.detach(), {name: p.grad for name, p in trainable(classifier).items()}))
        assert bool(calls) == (precision == "bf16x3")
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=0)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, atol=1e-4 * max(1, float(grad.abs().max())), rtol=0, msg=name)


@needs_tiles
def test_a_run_ends_in_the_same_bytes_twice_and_is_scored_alike_where_there_are_no_tiles(tmp_path, monkeypatch, capsys):
    toy.write_model(tmp_path / "model")
    toy.write_cola(tmp_path / "cola")
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    for name in ("one", "two"):
        assert toy.main("LoRA", "12345", "--model", tmp_path / "model", "--data", tmp_path / "cola", "--epochs", 2, "--lr",
                        0.01, "--batch-size", 8, "--dropout", 0.2, "--precision", "bf16x3", "--out", tmp_path / name,
                        "--plots", tmp_path) == 0
    found = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert found[0] == found[1]
    summary, dev = read_json(tmp_path / "one" / "summary.json"), tmp_path / "cola" / "in_domain_dev.tsv"
    counted, calls = amx.matmul, []
    monkeypatch.setattr(amx, "matmul", lambda *args: calls.append(args) or counted(*args))
    scores = []
    for tiles in (True, False):
        monkeypatch.setattr(amx, "available", lambda tiles=tiles: tiles)
        calls.clear()
        capsys.readouterr()
        assert toy.main("eval", tmp_path / "one", "--data", dev, "--json") == 0
        scores.append(json.loads(capsys.readouterr().out))
        assert bool(calls) == tiles
    assert scores[0].items() >= summary["validation"]["in_domain"].items()
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], abs=1e-4) and scores[1]["loss"] != scores[0]["loss"]


def test_float64_is_computed_as_ever(monkeypatch):
    monkeypatch.setattr(amx, "matmul", None)
    layer = nn.Linear(32, 32).double().requires_grad_(False)
    layer.tiles = True
    x = torch.randn(2, 32).double()
    assert torch.equal(frozen_linear([layer], x), layer(x))


def test_a_full_run_has_no_frozen_product(monkeypatch):
    monkeypatch.setattr(amx, "load", None)
    classifier = TextClassifier(toy_net("gpt2")).configure("full")
    set_precision(classifier.net.base_model, "bf16x3")
    assert not any(getattr(module, "tiles", False) for module in classifier.modules())


# ---------------------------------------------------------------- where it cannot be had

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(amx, "load", amx.load.__wrapped__)
    monkeypatch.setattr(amx, "flags_of_cpu", lambda: amx.NEEDED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_cpu_without_tiles_is_named(fresh, monkeypatch):
    monkeypatch.setattr(amx, "flags_of_cpu", lambda: {"avx512f", "avx512bw", "avx512vl", "sse"})
    with pytest.raises(UserError, match="this CPU has no amx_bf16, amx_tile; use fp32"):
        amx.load()
    assert not (fresh / "cache").exists() and not amx.available()


def test_no_compiler_is_named(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(amx.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C compiler"):
        amx.load()


@pytest.mark.parametrize("compiler, message", [("false", "false does not compile amx.c: no message"),
                                               ("/nowhere/cc", "No such file or directory: '/nowhere/cc'")])
def test_a_compiler_that_fails_is_named_and_nothing_stays(fresh, monkeypatch, compiler, message):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(UserError, match=message):
        amx.load()
    assert not list((fresh / "cache" / "lora-distil").iterdir())


@needs_tiles
def test_compiles_once(fresh):
    amx.load()
    library, = (fresh / "cache" / "lora-distil").iterdir()
    changed = library.stat().st_mtime_ns
    amx.load()
    assert library.stat().st_mtime_ns == changed


def test_a_library_that_cannot_be_loaded_is_named(fresh, monkeypatch):
    compiler = fresh / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(UserError, match=r"bf16x3: .*amx-\w+\.so"):
        amx.load()


def test_the_command_says_it_in_one_line(tmp_path):
    """Before anything is written; here by a compiler that is none, on CPUs that have tiles, else for want of these."""
    toy.write_model(tmp_path / "model")
    toy.write_cola(tmp_path / "cola")
    result = subprocess.run(
        [sys.executable, "run.py", "LoRA", "12345", "--model", tmp_path / "model", "--data", tmp_path / "cola", "--out",
         tmp_path / "run", "--precision", "bf16x3"],
        capture_output=True, text=True, cwd=amx.SOURCE.parents[1],
        env={**os.environ, "CC": "/nowhere/cc", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.splitlines()[-1].startswith("run.py: --precision bf16x3: ") and "Traceback" not in result.stderr

