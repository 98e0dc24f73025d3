"""amx: products against float64; a classifier with tiles against the same without.

On a CPU without tiles tiles.h stands in for them, so that all of amx.c but the instructions themselves is tested there too.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toy
from conftest import ARCHITECTURES, adapted, fast_classifier, toy_batch, toy_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fast import amx, compiled, gemm
from fast.frozen_linear import frozen_linear
from fast.matmul import set_precision
from machine.errors import UserError
from record.files import read_json
from report import figures
from train_utils import trainable

needs_tiles = pytest.mark.usefixtures("tiles")
# Of a number 2^-16 is lost, at most: twice in a product, and once more with the product of the low parts.
BOUND = 3.1 * 2.0 ** -16


@pytest.fixture(scope="module")
def tiles():
    """The CPU's, or those of tiles.h."""
    if amx.available():
        yield
        return
    if not gemm.available():
        pytest.skip("no CPU with AMX, or with AVX-512 and bfloat16, or no C compiler")
    flags, compiler = compiled.flags_of_cpu(), os.environ.get("CC", "cc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "flags_of_cpu", lambda: flags | amx.FEATURES.keys())
        patch.setenv("CC", f"{compiler} -mavx512bf16 -include {Path(__file__).with_name('tiles.h')}")
        amx.load.cache_clear()
        yield
    amx.load.cache_clear()


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


@needs_tiles
@pytest.mark.parametrize("bits", [0x7fc00000, 0x7fffffff, 0xffffffff, 0x7fff8000, 0x7f800001])
def test_no_nan_becomes_a_number(bits):
    nan = torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(torch.float32)
    for place in range(2):
        pair = [torch.ones(3, 32), torch.ones(32, 32)]
        pair[place][1, 5] = nan
        out = amx.matmul([(pair[0], [pair[1]])])
        assert out[:, 5].isnan().all() if place else out[1].isnan().all()


def in_float64(terms, biases=(None,)):
    """matmul's contract, for machines without tiles."""
    parts = [sum(a.double() @ bs[i].double() for a, bs in terms) + (0 if bias is None else bias.double())
             for i, bias in enumerate(biases)]
    return torch.cat(parts, 1).float()


@pytest.fixture(params=["tiles", "float64"])
def matmul(request, monkeypatch):
    if request.param == "tiles":
        request.getfixturevalue("tiles")
        return
    monkeypatch.setattr(amx, "matmul", in_float64)
    monkeypatch.setattr(amx, "load", lambda: None)


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
    classifier = fast_classifier(toy_net("gpt2")).configure("full")
    set_precision(classifier.net.base_model, "bf16x3")
    assert not any(getattr(module, "tiles", False) for module in classifier.modules())


# ---------------------------------------------------------------- where it cannot be had

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(amx, "load", amx.load.__wrapped__)
    monkeypatch.setattr(compiled, "flags_of_cpu", lambda: set(amx.FEATURES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_cpu_without_tiles_is_named(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "flags_of_cpu", lambda: {"avx512f", "avx512bw", "avx512vl", "sse"})
    with pytest.raises(UserError, match="this CPU has no amx_bf16, amx_tile; use fp32"):
        amx.load()
    assert not (fresh / "cache").exists() and not amx.available()


def test_no_compiler_is_named(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
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
    with pytest.raises(UserError, match=r"bf16x3: .*amx-\w+-\w+\.so"):
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

