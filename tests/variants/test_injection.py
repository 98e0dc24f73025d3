"""Variants of LoRA against PEFT: the same logits and gradients, files in both directions, and AdaLoRA's ranks."""

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import adapted, logits_of, one_line, toy_batch, toy_net, write_tokenizer
from peft.optimizers import create_loraplus_optimizer

import train_utils
from adapters.peft_layout import load_adapter, merge_adapter, read_adapter, save_adapter, start_from, unmerge_adapter
from fast.installation import install
from machine.errors import UserError
from model import LoRAOptions, TextClassifier, count_parameters, lora_layers, weight_of
from options.schema import RunOptions, TrainOptions
from serving.bank import AdapterBank
from serving.texts import Reading
from variants import adalora, injection, rank_budget

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning:transformers", "UserWarning", "peft.utils.warning.PeftWarning")]
HEADS = {"gpt2": "score", "llama": "score", "bert": "classifier"}
# What the roles q, v and o are called; all of them whole layers, but for GPT-2's q and v.
TARGETS = {"gpt2": ["c_attn", "attn.c_proj"], "llama": ["q_proj", "v_proj", "o_proj"],
           "bert": ["query", "value", "attention.output.dense"]}
LABELS = torch.tensor([0, 1, 1, 0])
SIZE = {"r": 4, "lora_alpha": 6}
CONFIGS = {
    "lora": (peft.LoraConfig, SIZE), "rslora": (peft.LoraConfig, {**SIZE, "use_rslora": True}),
    "loraplus": (peft.LoraConfig, SIZE), "lora-fa": (peft.LoraConfig, SIZE),
    "dora": (peft.LoraConfig, {**SIZE, "use_dora": True}),
    "pissa": (peft.LoraConfig, {**SIZE, "init_lora_weights": "pissa"}), "vera": (peft.VeraConfig, {"r": 4}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 6, "target_r": 4, "lora_alpha": 6, "total_step": 30, "tinit": 3, "tfinal": 9,
                                     "deltaT": 10, "orth_reg_weight": adalora.GAMMA})}
METHODS = {**dict.fromkeys(CONFIGS, "lora"), "ia3": "ia3", "bitfit": "bitfit"}


def fresh(architecture: str, variant: str, fast: bool = False, **options) -> TextClassifier:
    """A toy classifier under a fresh variant of LoRA, or another method of that name."""
    net = toy_net(architecture)
    torch.manual_seed(0)
    settings = {"rank": 4, "alpha": 6.0, "targets": tuple(TARGETS[architecture]), **options}
    if METHODS[variant] == "lora":
        settings["variant"] = variant
    else:
        settings["targets"] = ("k", "v", "mlp")
    classifier = injection.configure(TextClassifier(net), METHODS[variant], LoRAOptions(**settings)).eval()
    if fast:
        install(classifier)
    return classifier


def trained(architecture: str, variant: str, fast: bool = False, **options) -> TextClassifier:
    """As after training: every trained parameter has moved."""
    classifier = fresh(architecture, variant, fast, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in classifier.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return classifier


def of_peft(architecture: str, variant: str) -> peft.PeftModel:
    """The same model and variant by PEFT, at its own start."""
    kind, settings = CONFIGS[variant]
    return peft.get_peft_model(toy_net(architecture), kind(
        task_type="SEQ_CLS", target_modules=TARGETS[architecture], modules_to_save=[HEADS[architecture]],
        fan_in_fan_out=architecture == "gpt2", **settings)).eval()


def pefts_name(name: str, architecture: str) -> str:
    """The name that PEFT gives a parameter of ours."""
    head = HEADS[architecture]
    name = name.replace("lora_magnitude", "lora_magnitude_vector").replace(f"{head}.", f"{head}.modules_to_save.default.")
    module, _, last = name.rpartition(".")
    if ".lora_" in name or ".vera_" in name:
        name += ".default"
    if last in ("lora_magnitude", "lora_magnitude_vector"):
        name += ".weight"
    return f"base_model.model.{name}"


def gradients(classifier: TextClassifier) -> dict[str, torch.Tensor]:
    classifier.zero_grad()
    F.cross_entropy(classifier(*toy_batch()), LABELS).backward()
    return {name.removeprefix("net."): p.grad for name, p in classifier.named_parameters() if p.grad is not None}


def assert_close(found, expected, what: str) -> None:
    """Within 1e-5 of the scale."""
    assert float((found - expected).abs().max()) <= 1e-5 * max(1e-3, float(expected.abs().max())), what


# ---------------------------------------------------------------- one step of PEFT's

@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("variant", CONFIGS)
def test_logits_and_gradients_are_pefts(architecture, variant):
    ours, theirs = trained(architecture, variant), of_peft(architecture, variant)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.net.named_parameters():
            if p.requires_grad or name.endswith("lora_A"):
                key = pefts_name(name, architecture)
                if key not in parameters:  # PEFT's LoRA keeps A and B in linear layers
                    key += ".weight"
                assert parameters[key].shape == p.shape, name
                parameters[key].copy_(p)
    ids, mask = toy_batch()
    logits = theirs(input_ids=ids, attention_mask=mask).logits
    assert float((logits_of(ours) - logits_of(TextClassifier(toy_net(architecture)).eval())).abs().max()) > 1e-2
    torch.testing.assert_close(logits_of(ours), logits.detach(), atol=1e-5, rtol=0)
    F.cross_entropy(logits, LABELS).backward()
    found = gradients(ours)
    assert found
    for name, grad in found.items():
        key = pefts_name(name, architecture)
        assert_close(grad, parameters[key if key in parameters else key + ".weight"].grad, name)


def test_lora_plus_takes_pefts_step():
    ours, theirs = trained("llama", "loraplus"), of_peft("llama", "loraplus")
    theirs.load_state_dict({pefts_name(name, "llama") + ".weight": p for name, p in ours.net.named_parameters()
                            if ".lora_" in name}, strict=False)
    options = TrainOptions(seed=1, lr=1e-3, weight_decay=0.0)
    optimizer = train_utils.make_optimizer(ours, options)
    rates = sorted({group["peak"] for group in optimizer.param_groups})
    assert rates == [1e-3, 16e-3]
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    random = torch.Generator().manual_seed(3)
    parameters = dict(theirs.named_parameters())
    pairs = [(p, parameters[pefts_name(name, "llama") + ".weight"]) for name, p in ours.net.named_parameters()
             if ".lora_" in name]
    for own, its in pairs:
        own.grad = torch.randn(own.shape, generator=random)
        its.grad = own.grad.clone()
    optimizer.step()
    other.step()
    for own, its in pairs:
        torch.testing.assert_close(own, its, atol=1e-7, rtol=0)


# ---------------------------------------------------------------- files in both directions

@pytest.mark.parametrize("architecture, options", [
    *[(architecture, {}) for architecture in HEADS], ("gpt2", {"targets": ("q", "v", "mlp")}),
    ("llama", {"layers": "1"})], ids=str)
@pytest.mark.parametrize("variant", [*CONFIGS, "ia3"])
def test_an_adapter_saved_here_loads_here_and_in_peft(tmp_path, architecture, variant, options):
    classifier = trained(architecture, variant, **options)
    if variant == "adalora":  # components that training dropped, a whole layer among them
        with torch.no_grad():
            for number, layer in enumerate(lora_layers(classifier.net).values()):
                layer.lora_E[:1 + number if number < 2 else 99] = 0.0
    save_adapter(classifier, tmp_path, "the-base")
    expected = logits_of(classifier)
    again = TextClassifier(toy_net(architecture)).eval()
    load_adapter(again.net, tmp_path)
    torch.testing.assert_close(logits_of(again), expected, atol=1e-6, rtol=0)
    theirs = peft.PeftModel.from_pretrained(toy_net(architecture), tmp_path).eval()
    ids, mask = toy_batch()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("variant", ["dora", "pissa", "vera", "vera without its matrices", "adalora", "ia3"])
def test_an_adapter_saved_by_peft_loads_here(tmp_path, architecture, variant):
    name, _, without = variant.partition(" ")
    if name == "ia3":
        theirs = peft.get_peft_model(toy_net(architecture), peft.IA3Config(
            task_type="SEQ_CLS", modules_to_save=[HEADS[architecture]])).eval()
    else:
        kind, settings = CONFIGS[name]
        more = {"save_projection": False, "projection_prng_key": 7} if without else {}
        theirs = peft.get_peft_model(toy_net(architecture), kind(
            task_type="SEQ_CLS", target_modules=TARGETS[architecture], modules_to_save=[HEADS[architecture]],
            **settings, **more)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    ids, mask = toy_batch()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    ours = TextClassifier(toy_net(architecture)).eval()
    assert not torch.allclose(logits_of(ours), logits, atol=1e-2)
    load_adapter(ours.net, tmp_path)
    torch.testing.assert_close(logits_of(ours), logits, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- the invariants of every adapter

@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("variant", METHODS)
def test_a_fresh_variant_changes_nothing_and_trains_its_own_parameters_alone(architecture, variant):
    if (architecture, variant) == ("llama", "bitfit"):
        with pytest.raises(UserError, match="a llama model has no biases"):
            fresh(architecture, variant)
        return
    classifier = fresh(architecture, variant)
    plain = TextClassifier(toy_net(architecture)).eval()
    # PiSSA subtracts the part of W that it adds: equal up to rounding.
    torch.testing.assert_close(logits_of(classifier), logits_of(plain), atol=2e-6 if variant == "pissa" else 0.0, rtol=0)
    names = {name for name, p in classifier.net.named_parameters() if p.requires_grad}
    marks = {"bitfit": "bias", "ia3": "ia3_l", "vera": "vera_lambda"}
    assert all(marks.get(variant, "lora_") in name or name.startswith(HEADS[architecture]) for name in names)
    assert any(marks.get(variant, "lora_") in name for name in names)
    assert all(p.grad is not None for name, p in _after_backward(classifier))


def _after_backward(classifier):
    F.cross_entropy(classifier(*toy_batch()), LABELS).backward()
    return [(name, p) for name, p in classifier.net.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("options", [{}, {"targets": ("q", "v")}], ids=str)
@pytest.mark.parametrize("variant", [*CONFIGS, "ia3"])
def test_merged_is_unmerged_and_unmerging_restores_the_base(variant, options):
    classifier = trained("gpt2", variant, **options)
    expected, before = logits_of(classifier), {name: p.clone() for name, p in classifier.net.named_parameters()}
    merge_adapter(classifier.net)
    changed = [name for name, p in classifier.net.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.endswith("weight") for name in changed)
    torch.testing.assert_close(logits_of(classifier), expected, atol=1e-5, rtol=0)
    merge_adapter(classifier.net)
    torch.testing.assert_close(logits_of(classifier), expected, atol=1e-5, rtol=0)
    unmerge_adapter(classifier.net)
    for name, p in classifier.net.named_parameters():
        torch.testing.assert_close(p, before[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits_of(classifier), expected, atol=1e-5, rtol=0)
    layer = next(iter(lora_layers(classifier.net).values()))
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite; nothing was merged"):
        merge_adapter(classifier.net)
    assert all(torch.equal(p, before[name]) or p.requires_grad or torch.allclose(p, before[name], atol=1e-6)
               for name, p in classifier.net.named_parameters())


@pytest.mark.parametrize("architecture, options", [("gpt2", {}), ("gpt2", {"targets": ("q", "v", "mlp")}), ("bert", {}),
                                                   ("llama", {"layers": "1"})], ids=str)
@pytest.mark.parametrize("variant", METHODS)
def test_the_fast_path_is_the_reference(architecture, options, variant):
    if (architecture, variant) == ("llama", "bitfit"):
        return
    found, expected = (gradients(trained(architecture, variant, fast, **options)) for fast in (True, False))
    # A fast layer computes the gradient of a frozen A too, in vain.
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, name)
    fast = trained(architecture, variant, True, **options)
    torch.testing.assert_close(logits_of(fast), logits_of(trained(architecture, variant, **options)), atol=1e-5, rtol=0)
    terms = [layer.low_rank_terms() for layer in lora_layers(fast.net).values()]
    assert (None in terms) == (variant in ("dora", "ia3"))


def test_dora_scales_no_output_outside_its_slices():
    layer = next(iter(lora_layers(trained("gpt2", "dora", targets=("q", "v")).net).values()))
    k = slice(32, 64)
    torch.testing.assert_close(layer.factor()[k], torch.ones(32), atol=0, rtol=0)
    assert not layer.delta()[k].abs().max() > 1e-7 and layer.delta()[:32].abs().max() > 1e-2


def test_vera_trains_two_vectors_a_layer_and_lora_fa_half():
    counts = {variant: count_parameters(fresh("bert", variant))["trainable"] for variant in ("lora", "lora-fa", "vera")}
    head = 2 * 32 + 2
    assert counts == {"lora": 6 * 4 * 64 + head, "lora-fa": 6 * 4 * 32 + head, "vera": 6 * (4 + 32) + head}


# ---------------------------------------------------------------- many adapters on one base

@pytest.mark.parametrize("variant", ["pissa", "vera", "adalora", "loraplus"])
def test_a_bank_answers_as_the_variant_alone(tmp_path, variant):
    classifier = trained("gpt2", variant)
    save_adapter(classifier, tmp_path, "the-base")
    torch.manual_seed(0)
    bank = AdapterBank(TextClassifier(toy_net("gpt2")), write_tokenizer(tmp_path / "tokenizer"), "toy")
    bank.add("one", read_adapter(bank.net, tmp_path), Reading(("a", "b"), 32))
    ids, mask = toy_batch()
    found = torch.stack(bank.logits(ids, mask, ["one", None, "one", "one"]))
    expected, plain = logits_of(classifier), logits_of(TextClassifier(toy_net("gpt2")).eval())
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant, name", [("dora", "DoRA"), ("ia3", "IA3")])
def test_a_bank_refuses_by_name_what_is_no_sum_of_updates(tmp_path, variant, name):
    save_adapter(trained("gpt2", variant), tmp_path, "the-base")
    bank = AdapterBank(TextClassifier(toy_net("gpt2")), write_tokenizer(tmp_path / "tokenizer"), "toy")
    with pytest.raises(UserError, match=f"an adapter of {name}, which is no sum of low-rank updates") as error:
        bank.add("one", read_adapter(bank.net, tmp_path), Reading(("a", "b"), 32))
    assert one_line(error) and not bank.entries


# ---------------------------------------------------------------- AdaLoRA's ranks

def test_adalora_drops_the_components_that_peft_drops():
    """Thirty steps of both, with the same gradients' rule: the same zeros in E after each step."""
    ours, theirs = fresh("bert", "adalora"), of_peft("bert", "adalora")
    own, its = dict(ours.net.named_parameters()), dict(theirs.named_parameters())
    pairs = [(p, its[pefts_name(name, "bert")]) for name, p in own.items() if p.requires_grad]
    with torch.no_grad():
        for p, other in pairs:
            other.copy_(p)
    budget = rank_budget.RankBudget(ours.net, 4)
    optimizers = [torch.optim.SGD(params, lr=0.5) for params in zip(*pairs, strict=True)]
    (ids, mask), zeros = toy_batch(), []
    for step in range(1, 31):
        (F.cross_entropy(ours(ids, mask), LABELS) + adalora.GAMMA * adalora.orthogonality(ours.net)).backward()
        theirs(input_ids=ids, attention_mask=mask, labels=LABELS).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        budget.after_step(step, 30)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        found = [torch.cat([p.flatten() == 0 for name, p in one.items() if "lora_E" in name]) for one in (own, its)]
        assert torch.equal(*found), step
        zeros.append(int(found[0].sum()))
    # Twelve of 36 go: most of them at the first choice, the others by the end; in between values may come back.
    assert (zeros[0], zeros[9], zeros[10], zeros[-1]) == (0, 10, 0, 36 - 24)
    for p, other in pairs:
        torch.testing.assert_close(p, other, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- what does not go together

def run_options(**values) -> RunOptions:
    lora = {key: values.pop(key) for key in ("variant", "rank_pattern") if key in values}
    train = TrainOptions(seed=1, ema=values.pop("ema", 0.0))
    return RunOptions("LoRA", "12345", "tiny", "tiny", None, "out", train, lora=LoRAOptions(**lora), **values)


@pytest.mark.parametrize("values, said", [
    ({"variant": "dora", "method": "head"}, "--variant dora: a variant of --method lora; --method head has none"),
    ({"rank_pattern": ("c_attn=2",), "method": "full"}, "--rank-pattern.*--method full has none"),
    ({"rank_pattern": ("c_attn=2",), "variant": "vera"}, "--rank-pattern: not with --variant vera"),
    ({"rank_pattern": ("c_attn=2",), "variant": "adalora"}, "--rank-pattern: not with --variant adalora"),
    ({"variant": "adalora", "ema": 0.9}, "--ema: not with --variant adalora"),
    ({"variant": "pissa", "init": "run"}, "--init: not with --variant pissa")])
def test_options_without_a_meaning_are_one_line(values, said):
    with pytest.raises(UserError, match=said) as error:
        injection.check(run_options(**values))
    assert one_line(error)


def test_rslora_has_two_spellings():
    assert LoRAOptions(rslora=True) == LoRAOptions(variant="rslora")
    with pytest.raises(UserError, match="--rslora: an old spelling .* not with --variant dora"):
        LoRAOptions(rslora=True, variant="dora")


@pytest.mark.parametrize("rank, zero", [(4, slice(0, 32)), (4, slice(0, 30))])
def test_pissa_of_a_weight_of_a_lower_rank_is_refused(rank, zero):
    net = toy_net("gpt2")
    with torch.no_grad():
        weight_of(net.transformer.h[0].attn.c_attn)[zero] = 0.0
    with pytest.raises(UserError, match=f"has rank {0 if zero.stop == 32 else 2}; expected --rank of at most that"):
        injection.configure(TextClassifier(net), "lora", LoRAOptions(rank=rank, variant="pissa", targets=("q",)))


def test_veras_matrices_of_another_rank_are_refused(tmp_path):
    import json

    save_adapter(trained("bert", "vera"), tmp_path, "the-base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(UserError, match="its shared matrices have the ranks 4 and 4, and r is 3") as error:
        load_adapter(toy_net("bert"), tmp_path)
    assert one_line(error)


@pytest.mark.parametrize("variant", ["dora", "ia3"])
def test_a_start_from_another_formula_is_refused(tmp_path, variant):
    save_adapter(trained("gpt2", variant), tmp_path, "the-base")
    with pytest.raises(UserError, match=f"--init .*: an adapter of {'DoRA' if variant == 'dora' else 'IA3'}"):
        start_from(adapted("gpt2"), tmp_path, True)


# ---------------------------------------------------------------- ranks and alphas by pattern

def test_ranks_and_alphas_by_pattern_are_pefts(tmp_path):
    patterns = {"rank_pattern": ("query=2", "layer.1.attention.output.dense=3"), "alpha_pattern": ("value=12",)}
    classifier = trained("bert", "lora", **patterns)
    sizes = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(classifier.net).items()}
    theirs = peft.get_peft_model(toy_net("bert"), peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=TARGETS["bert"], rank_pattern={
            "query": 2, "layer.1.attention.output.dense": 3}, alpha_pattern={"value": 12}))
    assert sizes == {name.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
                     for name, module in theirs.named_modules() if hasattr(module, "lora_alpha")}
    save_adapter(classifier, tmp_path, "the-base")
    again = TextClassifier(toy_net("bert")).eval()
    load_adapter(again.net, tmp_path)
    assert torch.equal(logits_of(again), logits_of(classifier))


def test_a_pattern_that_fits_nothing_is_one_line():
    with pytest.raises(UserError, match="--rank-pattern quary=2: fits none of the adapted modules, such as bert") as error:
        fresh("bert", "lora", rank_pattern=("quary=2",))
    assert one_line(error)
    with pytest.raises(UserError, match=r"--rank 33: expected 1 to 32 for attention.self.query"):
        fresh("bert", "lora", rank_pattern=("query=33",))
