"""gemm: products with wide weights against float64, in every layout; a row depends on nothing but itself."""
import ctypes
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast import choice, compiled, gemm
from fast.choice import by_gemm
from fast.gemm import Update
from machine.errors import UserError

pytestmark = pytest.mark.skipif(not gemm.available(), reason="no CPU with AVX-512 and bfloat16, or no C compiler")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LAYOUTS = {"rows": lambda W: W, "columns": lambda W: W.t().contiguous().t(), "rows with gaps": lambda W: between(W),
           "columns with gaps": lambda W: between(W.t()).t()}


def between(x):
    """The same matrix, between numbers that nobody may read."""
    wide = x.new_full((len(x), x.shape[1] + 40), torch.nan)
    wide[:, 3:x.shape[1] + 3] = x
    return wide[:, 3:x.shape[1] + 3]


def exact(x, W, bias=None, updates=(), out=None):
    """In float64, of x as it is multiplied: rounded if W is rough."""
    y = x.to(W.dtype).double() @ W.double().t()
    y += sum(t.double() for t in (bias, out) if t is not None)
    for h, b, span, scaling in updates:
        y[:, span] += scaling * h.double() @ b.double()
    return y


def assert_close(found, expected, inputs):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-6 * max(1, inputs) ** 0.5, rtol=2e-6)


@TYPES
@given(rows=st.integers(0, 40), inputs=st.integers(0, 70), outputs=st.integers(0, 70), gap=st.integers(0, 3), data=st.data(),
       layout=st.sampled_from(sorted(LAYOUTS)), biased=st.booleans(), add=st.booleans(), number=st.integers(0, 3))
def test_a_product_is_that_of_float64(dtype, rows, inputs, outputs, layout, biased, add, gap, number, data):
    torch.manual_seed(0)
    x, W = between(torch.randn(rows, inputs)), LAYOUTS[layout](torch.randn(outputs, inputs).to(dtype))
    bias, whole = torch.randn(outputs) if biased else None, torch.randn(rows, outputs + 2 * gap)
    out, before, updates = whole[:, gap:gap + outputs], whole.clone(), []
    for _ in range(number if outputs else 0):
        start = data.draw(st.integers(0, outputs - 1))
        stop, rank = data.draw(st.integers(start + 1, outputs)), data.draw(st.integers(0, 9))
        h, b = between(torch.randn(rows, rank)), torch.randn(rank, stop - start)
        updates.append(Update(h, b, slice(start, stop), 0.7))
    expected = exact(x, W, bias, updates, out if add else None)
    if 1 not in W.stride():
        return  # a matrix of no columns
    assert_close(gemm.matmul(x, W, bias, updates, out, add), expected, inputs)
    out.copy_(before[:, gap:gap + outputs])
    assert torch.equal(whole, before)  # nothing was written beside it


@TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 2500, 40), (385, 1100, 33), (900, 300, 65), (60, 3072, 96)])
def test_products_of_many_blocks_are_those_of_float64(dtype, layout, rows, inputs, outputs):
    torch.manual_seed(1)
    x, out = torch.randn(rows, inputs), torch.randn(rows, outputs)
    W = LAYOUTS[layout](torch.randn(outputs, inputs).to(dtype))
    updates = [Update(torch.randn(rows, 8), torch.randn(8, outputs - 7), slice(7, None), 2.0)]
    expected = exact(x, W, W[:, 0].float(), updates, out)
    assert_close(gemm.matmul(x, W, W[:, 0], updates, out, True), expected, inputs)


@TYPES
@given(rows=st.integers(1, 900), first=st.integers(0, 899), count=st.integers(1, 30), threads=st.sampled_from([1, 2, 3]))
@settings(max_examples=20)
def test_a_row_depends_on_no_other_row_nor_on_the_threads(dtype, rows, first, count, threads):
    torch.manual_seed(2)
    x, W, update = torch.randn(rows, 530), torch.randn(100, 530).to(dtype), Update(torch.randn(rows, 4), torch.randn(4, 100))
    whole, some = gemm.matmul(x, W, None, [update]), slice(min(first, rows - 1), min(first, rows - 1) + count)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(gemm.matmul(x[some], W, None, [update._replace(h=update.h[some])]), whole[some])
    finally:
        torch.set_num_threads(1)


@TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_row_or_column(dtype, layout):
    x, W = torch.ones(30, 40), torch.ones(50, 40)
    x[3, 5], x[17, 39], W[33, 2], W[49, 39] = torch.nan, torch.inf, torch.nan, -torch.inf
    y = gemm.matmul(x, LAYOUTS[layout](W.to(dtype)))
    expected = x @ W.t()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


@pytest.fixture
def at_the_end():
    """Copies a tensor to where memory ends: reading or writing behind it kills the process."""
    kept, protect = [], ctypes.CDLL(None, use_errno=True).mprotect

    def place(x):
        size, page = x.numel() * x.element_size(), mmap.PAGESIZE
        pages = -(-size // page)
        kept.append(mmap.mmap(-1, (pages + 1) * page))
        memory = (ctypes.c_char * len(kept[-1])).from_buffer(kept[-1])
        assert protect(ctypes.c_void_p(ctypes.addressof(memory) + pages * page), ctypes.c_size_t(page), 0) == 0
        copy = torch.frombuffer(kept[-1], dtype=x.dtype, count=x.numel(), offset=pages * page - size).view(x.shape)
        return copy.copy_(x)

    return place


@TYPES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(13, 37, 41), (5, 16, 33), (1, 1, 1), (12, 300, 17)])
def test_nothing_is_read_or_written_where_memory_ends(dtype, transposed, rows, inputs, outputs, at_the_end):
    torch.manual_seed(3)
    x, W, bias, h, b = map(torch.randn, ((rows, inputs), (outputs, inputs), (outputs,), (rows, 3), (3, outputs)))
    W = at_the_end((W.t() if transposed else W).contiguous().to(dtype))
    W = W.t() if transposed else W
    update = Update(at_the_end(h), at_the_end(b))
    expected = exact(x, W, bias, [update])
    found = gemm.matmul(at_the_end(x), W, at_the_end(bias), [update], at_the_end(torch.zeros(rows, outputs)))
    assert_close(found, expected, inputs)


def test_sums_with_bfloat16_weights_are_not_rounded():
    x = torch.full((1, 300), 1.0)
    W = torch.full((40, 300), 1.0, dtype=torch.bfloat16)
    W[:, 0] = 2.0 ** -10
    assert gemm.matmul(x, W)[0, 0] == 299 + 2.0 ** -10


@pytest.mark.parametrize("shapes", [
    {"W": (5, 7)}, {"bias": (4,)}, {"out": (3, 4)}, {"out": (2, 5)}, {"h": (2, 2)}, {"b": (2, 4)}, {"b": (3, 5)}], ids=str)
def test_what_does_not_fit_is_refused(shapes):
    x, W, bias, out, h, b = (torch.zeros(shapes.get(name, shape)) for name, shape in {
        "x": (3, 8), "W": (5, 8), "bias": (5,), "out": (3, 5), "h": (3, 2), "b": (2, 5)}.items())
    with pytest.raises(ValueError, match=r"\(3, 8\) by .* does not give"):
        gemm.matmul(x, W, bias, [Update(h, b)], out)


def test_other_types_and_matrices_with_gaps_both_ways_are_left_to_others():
    choice.use_matmul("gemm")
    x, W = torch.zeros(3, 8), torch.zeros(6, 8)
    assert by_gemm(x, W) and by_gemm(x, W.bfloat16()) and by_gemm(x, W.t().contiguous().t())
    assert not by_gemm(x, torch.zeros(6, 16)[:, ::2]) and not by_gemm(x.double(), W.double())
    assert not by_gemm(x.bfloat16(), W.bfloat16())
    choice.use_matmul("torch")
    assert not by_gemm(x, W)


def test_without_the_cpu_or_a_compiler_products_are_left_to_others(monkeypatch):
    def load(*_):
        raise UserError("this CPU has no avx512_bf16")

    monkeypatch.setattr(compiled, "load", load)
    gemm.load.cache_clear()
    try:
        assert not gemm.available() and choice.fastest_matmul() != "gemm"
        with pytest.warns(UserWarning, match=r"matmuls by fast/gemm\.c \(it needs .* cannot be had here, PyTorch's own"):
            choice.use_matmul("gemm")
        assert choice.matmul() == "torch"
    finally:
        gemm.load.cache_clear()
