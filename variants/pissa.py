"""PiSSA: A and B begin as the principal components of W, and the rest of W is frozen.

    W = U S V^T,   A0 = sqrt(S_r / s) V_r^T,   B0 = U_r sqrt(S_r / s)
    y = (W - s B0 A0) x + s B A x + b = W x + s (B A - B0 A0) x + b

Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", equations 2 to 5. Here W stays as it
is, and the frozen A0 and B0 are subtracted: the same function, in the form of a LoRA of twice the rank. So it is saved:
PEFT reads it as plain LoRA, as it reads its own conversion.

Cost: a singular value decomposition of each adapted weight at the start, and a second narrow update in each pass. A sum of
low-rank terms: fused, and served by an `AdapterBank`.
"""
from __future__ import annotations

import torch
from torch import Tensor

from machine.errors import UserError
from model import LoRALinear, weight_of


def principal(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A0 (rank, in) and B0 (out, rank) of a weight (out, in): scaling * B0 A0 is its best part of that rank.

    Raises:
        UserError: the weight has fewer principal components; another start would never train.
    """
    if W.is_meta:
        return W.new_empty(rank, W.shape[1]), W.new_empty(len(W), rank)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    # As `torch.linalg.matrix_rank` counts them.
    have = int((S > S[0] * max(W.shape) * torch.finfo(S.dtype).eps).sum())
    if have < rank:
        raise UserError(f"--variant pissa: a weight or slice of {len(W)} x {W.shape[1]} has rank {have}; expected --rank of "
                        "at most that, or --targets without it")
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


class PiSSALinear(LoRALinear):
    """A frozen linear layer plus a low-rank update that begins as the principal part of W, which is subtracted."""

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, slices=None):
        super().__init__(base, rank, alpha, dropout, rslora, slices)
        with torch.no_grad():
            parts = [principal(weight_of(base)[start:stop], rank, self.scaling) for start, stop in self.slices]
            # Of several slices the As are stacked, and so are the Bs, as in the base class.
            self.lora_A.copy_(torch.cat([A for A, _ in parts]))
            self.lora_B.copy_(torch.cat([B for _, B in parts]))
            start = self.lora_A.clone(), -self.block_B()
        self.register_buffer("start_A", start[0], persistent=False)
        self.register_buffer("start_minus_B", start[1].clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:  # (2 ranks, in), (out, 2 ranks)
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.block_B(), self.start_minus_B], 1)
