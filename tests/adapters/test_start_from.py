"""Training goes on from a saved adapter: the same logits at its start, and one line where the shapes differ."""


import pytest
import torch
from conftest import adapted, logits_of
from peft_toys import VARIANTS, fine_tuned, head_weights, with_other_head

from adapters.peft_layout import (
    save_adapter,
    start_from,
)
from fast.installation import install
from machine.errors import UserError
from model import LoRAOptions, inject_lora

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning:transformers", "UserWarning:peft", "peft.utils.warning.PeftWarning")]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("architecture, options", VARIANTS)
def test_a_fresh_adapter_that_starts_from_a_saved_one_computes_the_same(tmp_path, architecture, options, head):
    classifier = fine_tuned(architecture, **options)
    save_adapter(classifier, tmp_path, "the-base")
    again = with_other_head(architecture)
    inject_lora(again.net, LoRAOptions(**{"rank": 4, "alpha": 6.0, **options}))
    install(again)
    own = {name: weight.clone() for name, weight in head_weights(again.net).items()}
    start_from(again, tmp_path, head)
    assert torch.equal(logits_of(again.eval()), logits_of(classifier)) == head
    saved = {name: parameter for name, parameter in classifier.net.named_parameters() if ".lora_" in name}
    found = dict(again.net.named_parameters())
    assert saved and all(torch.equal(found[name], value) and found[name].requires_grad for name, value in saved.items())
    assert head or all(torch.equal(weight, own[name]) for name, weight in head_weights(again.net).items())


@pytest.mark.parametrize("options, said", [
    ({"rank": 3, "alpha": 4.5}, "--rank"), ({"alpha": 3.0}, "--alpha"), ({"rslora": True}, "--rslora"),
    ({"layers": "1"}, "--layers"), ({"targets": ("q", "v", "mlp", "o")}, "of other outputs"),
    ({"targets": ("o",)}, "--targets")])
def test_an_adapter_of_another_shape_is_no_beginning(tmp_path, options, said):
    save_adapter(fine_tuned("gpt2"), tmp_path, "the-base")
    fresh = adapted("gpt2", trained=False, **options)
    with pytest.raises(UserError, match=f"^--init {tmp_path}: .*{said}"):
        start_from(fresh, tmp_path, True)


def test_updates_outside_the_adapted_slices_are_no_beginning(tmp_path):
    """Of the same rank and shape: PEFT's adapter of the fused layer, where only q and v are adapted here."""
    save_adapter(fine_tuned("gpt2", targets=("c_attn",), rank=8, alpha=12.0), tmp_path, "the-base")
    fresh = adapted("gpt2", trained=False, targets=("q", "v"))
    before = {name: p.clone() for name, p in fresh.net.named_parameters()}
    with pytest.raises(UserError, match="of other outputs; expected --rank and --targets of that run"):
        start_from(fresh, tmp_path, True)
    assert all(torch.equal(p, before[name]) for name, p in fresh.net.named_parameters())
