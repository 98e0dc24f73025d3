"""Many LoRA updates over one frozen layer, one for each row of the batch, and no loop over them.

    layer = MixedLinear(base, routing)
    layer.pool.store(slot, scaling * ..., ...)        # adapter number `slot`
    routing.set(torch.tensor([1, 3]), {len(x): torch.tensor([4, 9])})       # rows 0-3 are adapter 1's, 4-8 adapter 3's
    y = layer(x)

The rows are sorted by adapter, so that each adapter's rows are one run of them, and both narrow matmuls of all adapters are
one grouped matmul each (`torch.nn.functional.grouped_mm`). Multiplying by all matrices side by side and masking is 5 to 20
times as slow with 32 adapters of rank 8; a batched matmul needs the same number of rows for each adapter.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.peft_layout import shape_of

# Float32 values: a grouped matmul takes matrices with rows that begin at multiples of 16 bytes.
ALIGNMENT = 4


class RowPool:
    """The matrices of many slots, of any number of rows, in one tensor for each width; each row is stored once.

    Args:
        widths: columns of each matrix of a slot; the matrices of one slot have the same number of rows.
        like: a tensor on the device of the pool.
    """

    def __init__(self, widths: tuple[int, ...], like: Tensor):
        self.widths = widths
        # Row 0 is zero: it fills up a slot that has fewer rows than another one.
        self.data = [like.new_zeros(1, -(-width // ALIGNMENT) * ALIGNMENT, dtype=torch.float32) for width in widths]
        self.table = torch.zeros(0, 0, dtype=torch.long, device=like.device)  # (slots, most rows): the place of each row
        self.rows: dict[int, list[int]] = {}  # the places of each slot's rows
        self.free: list[int] = []

    def store(self, slot: int, *matrices: Tensor) -> None:
        """Stores a slot's matrices, (rows, width) each."""
        # A slot that holds matrices already gives its rows back first.
        self.release(slot)
        count = len(matrices[0])
        if count > len(self.free):
            self._grow(count - len(self.free))
        self.rows[slot] = rows = [self.free.pop() for _ in range(count)]
        for data, matrix, width in zip(self.data, matrices, self.widths, strict=True):
            data[rows, :width] = matrix.detach().to(data)
        # Places of missing rows and slots are 0: the row of zeros.
        more = max(0, count - self.table.shape[1]), max(0, slot + 1 - len(self.table))
        self.table = F.pad(self.table, (0, more[0], 0, more[1]))
        self.table[slot, :count] = torch.tensor(rows)

    def release(self, slot: int) -> None:
        """Frees the rows of a slot for other slots."""
        if slot in self.rows:
            # Reversed, so that the next slot takes the rows in the same order: `gather` copies nothing then.
            self.free += reversed(self.rows.pop(slot))
            self.table[slot] = 0

    def _grow(self, count: int) -> None:
        """Makes room for at least `count` more rows."""
        # By a quarter at least, so that adding n adapters copies O(n) rows.
        old = len(self.data[0])
        size = old + max(count, old // 4)
        for i, data in enumerate(self.data):
            # Untouched pages of new zeros take no memory.
            self.data[i] = data.new_zeros(size, data.shape[1])
            self.data[i][:old] = data
        self.free += range(size - 1, old - 1, -1)

    def gather(self, slots: Tensor) -> list[Tensor]:
        """Returns the matrices of ascending slots (G,), filled up with zero rows: (G, rows, width) each.

        Copies nothing where the slots' rows follow one another, as they do for equal ranks; a copy costs as much time as
        reading the matrices.
        """
        # Slots beyond the table have no rows in this layer.
        known = slots[slots < len(self.table)]
        index = F.pad(self.table.index_select(0, known), (0, 0, 0, len(slots) - len(known)))
        # As many columns as the longest of these slots needs.
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

    def matmul(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Computes each adapter's rows of x times its matrix: (rows, in), (G, in, out) -> (rows, out)."""
        # A layer with another number of rows would be multiplied by other adapters' matrices.
        if len(x) not in self.ends:
            raise RuntimeError(f"a layer reads {len(x)} rows; expected {' or '.join(map(str, self.ends))}")
        # A batch of one adapter needs no grouping.
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
    """A frozen linear layer under a pool of LoRA updates: y = W x + b + (s B) A x, with A and B of each row's own adapter.

    Args:
        base: `nn.Linear` or `Conv1D`, frozen.
        routing: the adapter of each row.
    """

    def __init__(self, base: nn.Module, routing: Routing):
        super().__init__()
        self.base, self.routing = base, routing
        self.in_features, self.out_features = shape_of(base)
        # The matrices of a slot are A and (s B)^T: both have a row for each rank.
        self.pool = RowPool(shape_of(base), base.weight)

    def low_rank_terms(self) -> list | None:
        """Returns no terms where no adapter has an update of this layer; else None: only `forward` computes them."""
        return None if self.pool.rows else []

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y, rows = self.base(x), x.flatten(0, -2)
        if self.low_rank_terms() == []:
            return y
        A, B = (matrix.to(x.dtype) for matrix in self.pool.gather(self.routing.slots))  # (G, r, in), (G, r, out)
        # No adapter of this batch has an update of this layer.
        if not A.shape[1]:
            return y
        h = self.routing.matmul(rows, A.transpose(1, 2))  # (rows, r)
        return y + self.routing.matmul(h, B).view_as(y)


class MixedHead(nn.Module):
    """A linear layer of a task head with weights of its own for each adapter, of any number of outputs.

    Args:
        base: the replaced layer; its weights become those of slot 0.
        routing: the adapter of each row.
    """

    def __init__(self, base: nn.Linear, routing: Routing):
        super().__init__()
        self.routing, self.has_bias = routing, base.bias is not None
        # The matrices of a slot are the weight and the bias as a column: both have a row for each class.
        self.pool = RowPool((base.in_features, 1), base.weight)
        self.store(0, base.weight, base.bias)

    def store(self, slot: int, weight: Tensor, bias: Tensor | None) -> None:
        """Stores an adapter's weight (classes, in) and bias (classes,)."""
        self.pool.store(slot, weight, weight.new_zeros(len(weight), 1) if bias is None else bias[:, None])

    @property
    def weight(self) -> Tensor:
        """Returns the weights of all slots; callers read their type and device."""
        return self.pool.data[0]

    def forward(self, x: Tensor) -> Tensor:  # (B, in) -> (B, most classes of those present)
        weight, bias = self.pool.gather(self.routing.slots)  # (G, n, in), (G, n, 1)
        y = self.routing.matmul(x.to(weight.dtype), weight.transpose(1, 2))
        return y + self.routing.spread(bias[..., 0], len(x)) if self.has_bias else y
