"""Many LoRA updates over one frozen layer, one for each row of the batch, and no loop over them.

    layer = MixedLinear(base, routing)
    layer.pool.put(slot, scaling * ..., ...)        # adapter number `slot`
    routing.set(torch.tensor([1, 3]), {len(x): torch.tensor([4, 9])})       # rows 0-3 are adapter 1's, 4-8 adapter 3's
    y = layer(x)

Rows stand sorted by adapter, so that each adapter's rows are one run of them and both narrow products of all adapters
are one grouped matmul each (`torch.nn.functional.grouped_mm`). Multiplying by all matrices side by side and masking is
5 to 20 times as slow with 32 adapters of rank 8; batched products need as many rows of each sentence.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.peft_layout import shape_of

ALIGNMENT = 4  # float32 values: a grouped matmul takes matrices whose rows begin at multiples of 16 bytes


class RowPool:
    """Matrices of as many rows as each slot needs, each row stored once.

    Args:
        widths: columns of each of the matrices that a slot has; all of a slot's have the same number of rows.
        like: a tensor on the device where they are stored.
    """

    def __init__(self, widths: tuple[int, ...], like: Tensor):
        self.widths = widths
        # Row 0 is zero: it fills up a slot that has fewer rows than another one.
        self.data = [like.new_zeros(1, -(-width // ALIGNMENT) * ALIGNMENT, dtype=torch.float32) for width in widths]
        self.table = torch.zeros(0, 0, dtype=torch.long, device=like.device)  # (slots, most rows): where each row stands
        self.rows: dict[int, list[int]] = {}
        self.free: list[int] = []

    def put(self, slot: int, *matrices: Tensor) -> None:
        """Stores a slot's matrices, (rows, width) each."""
        self.drop(slot)
        count = len(matrices[0])
        if count > len(self.free):
            self._grow(count - len(self.free))
        self.rows[slot] = rows = [self.free.pop() for _ in range(count)]
        for data, matrix, width in zip(self.data, matrices, self.widths, strict=True):
            data[rows, :width] = matrix.detach().to(data)
        more = max(0, count - self.table.shape[1]), max(0, slot + 1 - len(self.table))
        self.table = F.pad(self.table, (0, more[0], 0, more[1]))
        self.table[slot, :count] = torch.tensor(rows)

    def drop(self, slot: int) -> None:
        """Forgets a slot; its rows are free for others."""
        if slot in self.rows:
            self.free += reversed(self.rows.pop(slot))  # the next slot takes the rows in the same order
            self.table[slot] = 0

    def _grow(self, count: int) -> None:
        """Makes room for at least so many rows more: a quarter more, so that adding n adapters copies O(n) rows."""
        old = len(self.data[0])
        size = old + max(count, old // 4)
        for i, data in enumerate(self.data):
            self.data[i] = data.new_zeros(size, data.shape[1])  # untouched pages of it take no memory
            self.data[i][:old] = data
        self.free += range(size - 1, old - 1, -1)

    def gather(self, slots: Tensor) -> list[Tensor]:
        """Returns the matrices of ascending slots (G,), filled up with zero rows: (G, rows, width) each.

        Copies nothing where the slots' rows follow one another, as they do for equal ranks; the copies cost as much as
        they are read.
        """
        known = slots[slots < len(self.table)]
        index = F.pad(self.table.index_select(0, known), (0, 0, 0, len(slots) - len(known)))  # the last have no rows here
        index = index[:, :int((index != 0).any(0).sum())]
        rows = index.reshape(-1).tolist()
        if rows and rows == list(range(rows[0], rows[0] + len(rows))):
            parts = [data[rows[0]:rows[0] + len(rows)] for data in self.data]
        else:
            parts = [data.index_select(0, index.reshape(-1)) for data in self.data]
        return [part.view(*index.shape, part.shape[1])[..., :width] for part, width in zip(parts, self.widths, strict=True)]


class Routing:
    """The adapter of each row in the running forward pass."""

    def __init__(self):
        self.slots, self.ends = torch.zeros(0), {}

    def set(self, slots: Tensor, ends: dict[int, Tensor]) -> None:
        """Begins a forward pass.

        Args:
            slots: (G,) the adapters present, ascending.
            ends: by a matmul's number of rows, (G,): where each adapter's rows end.
        """
        self.slots = slots
        self.ends = {rows: end.to(torch.int32) for rows, end in ends.items()}

    def product(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Computes each adapter's rows of x times its matrix: (rows, in), (G, in, out) -> (rows, out)."""
        if len(x) not in self.ends:
            raise RuntimeError(f"a layer reads {len(x)} rows; expected {' or '.join(map(str, self.ends))}")
        if len(matrices) == 1:
            return x @ matrices[0]
        if x.shape[1] % ALIGNMENT:
            more = -x.shape[1] % ALIGNMENT
            x, matrices = F.pad(x, (0, more)), F.pad(matrices, (0, 0, 0, more))
        return F.grouped_mm(x, matrices, offs=self.ends[len(x)])

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Repeats each adapter's values for each of its rows: (G, n) -> (rows, n)."""
        ends = self.ends[rows]
        return values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), 0)


class MixedLinear(nn.Module):
    """A frozen linear layer under a pool of LoRA updates: each row gets its own adapter's, y = W x + b + (s B) A x.

    Args:
        base: `nn.Linear` or `Conv1D`, frozen.
        routing: tells which rows are whose.
    """

    def __init__(self, base: nn.Module, routing: Routing):
        super().__init__()
        self.base, self.routing = base, routing
        self.in_features, self.out_features = shape_of(base)
        self.pool = RowPool(shape_of(base), base.weight)  # of A and of (s B)^T, as many rows as the rank

    def low_rank_terms(self) -> list | None:
        """Returns no terms where no adapter has an update of this layer; else None: only `forward` computes them."""
        return None if self.pool.rows else []

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, rows = self.base(x), x.flatten(0, -2)
        if self.low_rank_terms() == []:
            return y
        A, B = (matrix.to(x.dtype) for matrix in self.pool.gather(self.routing.slots))  # (G, r, in), (G, r, out)
        if not A.shape[1]:
            return y
        h = self.routing.product(rows, A.transpose(1, 2))  # (rows, r)
        return y + self.routing.product(h, B).view_as(y)


class MixedHead(nn.Module):
    """A linear layer of a task head with weights of its own for each adapter, of any number of outputs.

    Args:
        base: the layer that it replaces; its weights become those of slot 0.
        routing: tells which rows are whose.
    """

    def __init__(self, base: nn.Linear, routing: Routing):
        super().__init__()
        self.routing, self.has_bias = routing, base.bias is not None
        self.pool = RowPool((base.in_features, 1), base.weight)
        self.put(0, base.weight, base.bias)

    def put(self, slot: int, weight: Tensor, bias: Tensor | None) -> None:
        """Stores an adapter's weight (classes, in) and bias (classes,)."""
        self.pool.put(slot, weight, weight.new_zeros(len(weight), 1) if bias is None else bias[:, None])

    @property
    def weight(self) -> Tensor:
        """Returns all weights; a caller may read their type and device."""
        return self.pool.data[0]

    def forward(self, x: Tensor) -> Tensor:  # (B, in) -> (B, most classes of those present)
        weight, bias = self.pool.gather(self.routing.slots)  # (G, n, in), (G, n, 1)
        y = self.routing.product(x.to(weight.dtype), weight.transpose(1, 2))
        return y + self.routing.spread(bias[..., 0], len(x)) if self.has_bias else y
