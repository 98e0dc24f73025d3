"""IA3: trained vectors scale keys, values and the inner activations of the MLP.

    y = l * (W x + b)      keys and values, l of (out_features,)
    y = W (l * x) + b      the last layer of the MLP, l of (in_features,)

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3.
Every l begins as 1. GPT-2 computes q, k and v in one layer: of its l the thirds of k and v train.

Cost: one vector a layer. It is no sum of low-rank terms: fused blocks call this `forward`, and an `AdapterBank` cannot hold
it. It merges into W and b.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.architectures import FUSED_QKV, find_targets, parse_layers
from data.backbones import blocks_of, freeze_backbone
from machine.errors import UserError
from model import LoRALinear, weight_of
from options.schema import LoRAOptions

ROLES = ("k", "v", "mlp")  # of --targets


class IA3Linear(LoRALinear):
    """A frozen linear layer with scaled inputs or outputs; it has no A and no B.

    Attributes:
        ia3_l: (in_features,) with `inputs`, else (adapted outputs,).
        held: the changes of W and b that `merge` made, for `unmerge`.
    """

    def __init__(self, base: nn.Module, inputs: bool, slices: list[tuple[int, int]] | None = None):
        nn.Module.__init__(self)
        self.base, self.inputs, self.merged, self.held = base.requires_grad_(False), inputs, False, None
        self.out_features, self.in_features = weight_of(base).shape
        self.slices = slices or [(0, self.out_features)]
        size = self.in_features if inputs else sum(stop - start for start, stop in self.slices)
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device))

    def scales(self) -> Tensor:
        """Returns l, (in_features,) or (out_features,): 1 outside the slices."""
        if self.inputs or self.slices == [(0, self.out_features)]:
            return self.ia3_l
        rows = torch.cat([torch.arange(start, stop, device=self.ia3_l.device) for start, stop in self.slices])
        return self.ia3_l.new_ones(self.out_features).index_copy(0, rows, self.ia3_l)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self.merged:
            return self.base(x)
        scales = self.scales().to(x.dtype)
        return self.base(x * scales) if self.inputs else self.base(x) * scales

    def delta(self) -> Tensor:
        """Returns the change of W, (out_features, in_features)."""
        if self.merged:
            return self.held[0]
        change = self.scales().float() - 1
        return weight_of(self.base).float() * (change if self.inputs else change[:, None])

    @torch.no_grad()
    def merge(self) -> None:
        if self.merged:
            return
        # Scaled outputs have a scaled bias.
        bias = None if self.inputs or self.base.bias is None else self.base.bias * (self.scales() - 1)
        self.held = self.delta(), bias
        super().merge()
        if bias is not None:
            self.base.bias.add_(bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged and self.held[1] is not None:
            self.base.bias.sub_(self.held[1])
        super().unmerge()


def inject(net: PreTrainedModel, options: LoRAOptions) -> None:
    """Adapts keys, values and the last layer of each MLP, as far as --targets and --layers say, and freezes the rest.

    Raises:
        UserError: none of them is a target, or the architecture's roles are not known.
    """
    roles = tuple(role for role in options.targets if role in ROLES)
    if not roles:
        raise UserError(f"--targets {','.join(options.targets)}: --method ia3 scales {', '.join(ROLES)} alone")
    found = find_targets(net.base_model, roles)
    # The roles stand in the order of the computation: the last layer of the MLP reads its inner activations.
    mlp = [name for name, its_roles in found.items() if its_roles == {"mlp"}]
    blocks = list(blocks_of(net.base_model).items())
    freeze_backbone(net)
    for block_name, block in (blocks[number] for number in parse_layers(options.layers, len(blocks))):
        modules = dict(block.named_modules())
        for name, its_roles in found.items():
            if name not in modules or name in mlp[:-1]:
                continue
            slices = None
            if name.endswith(FUSED_QKV):
                third = weight_of(modules[name]).shape[0] // 3
                slices = [(i * third, (i + 1) * third) for i, role in enumerate("qkv") if role in its_roles]
            layer = IA3Linear(modules[name], name in mlp, slices)
            net.base_model.set_submodule(f"{block_name}.{name}", layer)
