"""A batch that mixes adapters gives each row what it gets alone, and what PEFT gives it."""
import copy
import random
import weakref

import peft
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    CONTEXT,
    adapted,
    fast_classifier,
    logits_of,
    one_line,
    randomize_B,
    toy_batch,
    toy_net,
    write_tokenizer,
)

from adapters.mixed import MixedLinear, RowPool
from adapters.peft_layout import load_adapter, read_adapter, save_adapter
from fast.matmul import set_precision
from machine.errors import UserError
from model import LoRAOptions, TextClassifier, inject_lora, lora_layers
from serving.bank import AdapterBank
from serving.texts import Reading

# Ranks, targets, scalings, layers and numbers of classes differ; rank 3 and 5 outputs are no multiples of four.
ADAPTERS = {"all": ({}, 2), "qv": ({"targets": ("q", "v"), "rank": 3, "alpha": 5.0}, 5),
            "top": ({"layers": "1", "rank": 7, "rslora": True}, 3), "mlp": ({"targets": ("mlp",), "rank": 2}, 2)}
LENGTHS = (5, 9, 1, 12, 9, 3, 3, 7, 2, 1)


def reading(classes: int) -> Reading:
    return Reading(tuple(f"class {i}" for i in range(classes)), 32)


def fine_tuned(architecture: str, number: int, classes: int, **options) -> TextClassifier:
    """The one frozen backbone under an adapter and a head as after training."""
    net = toy_net(architecture, num_labels=classes)
    net.base_model.load_state_dict(toy_net(architecture).base_model.state_dict())
    torch.manual_seed(number)
    inject_lora(net, LoRAOptions(**{"rank": 4, "alpha": 6.0, **options}))
    randomize_B(net)
    classifier = fast_classifier(net).eval()
    for name in classifier.head_names():
        for p in net.get_submodule(name).parameters():
            torch.nn.init.normal_(p, std=0.3)
    return classifier


@pytest.fixture(params=ARCHITECTURES)
def mixed(request, tmp_path):
    """A bank, and by adapter (or none) the model that has it alone."""
    base = fast_classifier(toy_net(request.param))
    alone = {None: copy.deepcopy(base).eval()}
    bank = AdapterBank(base, write_tokenizer(tmp_path), "the-base")
    for number, (name, (options, classes)) in enumerate(ADAPTERS.items()):
        alone[name] = fine_tuned(request.param, number, classes, **options)
        (tmp_path / name).mkdir()
        save_adapter(alone[name], tmp_path / name, "the-base")
        bank.add(name, read_adapter(bank.net, tmp_path / name), reading(classes))
    return bank, alone, tmp_path


@torch.inference_mode()
def check_rows(bank, alone, names, batch) -> None:
    got = bank.logits(*batch, names)
    assert len(got) == len(names)
    for name, ids, mask, logits in zip(names, *batch, got, strict=True):
        length = int(mask.sum())
        expected = alone[name](ids[None, :length], mask[None, :length])[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_each_row_of_any_mix_in_any_order_gets_what_it_gets_alone(mixed):
    bank, alone, _ = mixed
    batch = toy_batch(LENGTHS)
    names = [None, *ADAPTERS]
    for name in names:  # the adapters say different things of the same rows, or the rest proves nothing
        others = [bank.logits(*batch, [other] * len(LENGTHS))[0][:2] for other in names if other != name]
        own = bank.logits(*batch, [name] * len(LENGTHS))[0][:2]
        assert all((own - other).abs().max() > 1e-2 for other in others)
    draw = random.Random(0)
    check_rows(bank, alone, [names[i % len(names)] for i in range(len(LENGTHS))], batch)
    for _ in range(6):
        chosen = draw.sample(names, draw.randint(1, len(names)))
        check_rows(bank, alone, [draw.choice(chosen) for _ in LENGTHS], batch)


def test_sentences_that_begin_alike_share_no_row_across_adapters(mixed):
    """The same sentence under each adapter, twice; and a batch with as many unique tokens as sentences."""
    bank, alone, _ = mixed
    ids, mask = toy_batch((6,))
    names = [*ADAPTERS, None] * 2
    check_rows(bank, alone, names, (ids.expand(len(names), -1), mask.expand(len(names), -1)))
    ids, mask = torch.tensor([[1, 2, 3], [4, 0, 0], [4, 0, 0], [5, 0, 0]]), torch.tensor([[1, 1, 1]] + 3 * [[1, 0, 0]])
    check_rows(bank, alone, ["all", "qv", "qv", "qv"], (ids, mask))  # 5 rows
    check_rows(bank, alone, ["all", "qv", "qv", "all"], (ids, mask))
    ids, mask = ids[:3], mask[:3]
    check_rows(bank, alone, ["all", "qv", "qv"], (ids, mask))
    ids, mask = torch.tensor([[1, 2, 3], *4 * [[4, 0, 0]]]), torch.tensor([[1, 1, 1], *4 * [[1, 0, 0]]])
    check_rows(bank, alone, ["all", *4 * ["qv"]], (ids, mask))  # 4 unique tokens
    ids, mask = torch.tensor([[1, 2, 3], *3 * [[4, 0, 0]]]), torch.tensor([[1, 1, 1], *3 * [[1, 0, 0]]])
    check_rows(bank, alone, ["all", *3 * ["qv"]], (ids, mask))  # 4 unique tokens, 4 sentences


def test_adapters_come_and_go(mixed):
    bank, alone, folder = mixed
    batch, draw = toy_batch(LENGTHS), random.Random(1)
    there = set(ADAPTERS)
    for _ in range(30):
        name = draw.choice(sorted(ADAPTERS))
        if name in there:
            bank.remove(name)
        else:
            bank.add(name, read_adapter(bank.net, folder / name), reading(ADAPTERS[name][1]))
        there ^= {name}
        check_rows(bank, alone, [draw.choice([None, *sorted(there)]) for _ in LENGTHS], batch)
    for name in there:
        bank.remove(name)
    pools = [module.pool for module in bank.net.modules() if isinstance(module, MixedLinear)]
    assert pools and all(len(pool.free) == len(pool.data[0]) - 1 for pool in pools)  # nothing leaks


def test_a_mixed_batch_gives_each_row_what_peft_gives_it(mixed):
    """PEFT's own reload of the files, adapter by adapter."""
    bank, alone, folder = mixed
    batch = toy_batch(LENGTHS)
    names = [list(ADAPTERS)[i % len(ADAPTERS)] for i in range(len(LENGTHS))]
    got = bank.logits(*batch, names)
    for name in ADAPTERS:
        net = copy.deepcopy(alone[name].net)
        plain = toy_net(net.config.model_type, num_labels=net.config.num_labels)
        theirs = peft.PeftModel.from_pretrained(plain, folder / name).eval()
        with torch.no_grad():
            expected = theirs(input_ids=batch[0], attention_mask=batch[1]).logits
        for row, other in enumerate(names):
            if other == name:
                torch.testing.assert_close(got[row], expected[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_base_in_bf16_serves_what_was_trained_on_one(tmp_path, architecture):
    """Up to the rounding of activations to bfloat16, which float32 sums of another order may turn the other way.

    That is far less than bfloat16 itself changes: a bank in float32 would be as far away as that.
    """
    alone = fine_tuned(architecture, 1, 3)
    in_fp32 = logits_of(alone)
    save_adapter(alone, tmp_path, "the-base")
    bank = AdapterBank(fast_classifier(toy_net(architecture)), write_tokenizer(tmp_path / "tokenizer"), "the-base", "bf16")
    bank.add("a", read_adapter(bank.net, tmp_path), reading(3))
    set_precision(alone.net.base_model, "bf16")
    got = bank.logits(*toy_batch(), ["a", None, "a", "a"])
    expected = logits_of(alone)
    changed = float((expected - in_fp32).abs().max())
    assert changed > 1e-2
    for row in (0, 2, 3):
        torch.testing.assert_close(got[row], expected[row], atol=changed / 5, rtol=0)


def test_load_adapter_and_the_bank_read_the_same_file(tmp_path):
    classifier = fine_tuned("gpt2", 0, 2, targets=("q", "v"), rank=20)
    save_adapter(classifier, tmp_path, "the-base")
    net = toy_net("gpt2")
    load_adapter(net, tmp_path)
    adapter = read_adapter(toy_net("gpt2"), tmp_path)
    for name, layer in lora_layers(net).items():
        A, B = adapter.pairs[name]
        torch.testing.assert_close(adapter.scaling(name) * B @ A, layer.delta())


@pytest.mark.parametrize("change, says", [
    (lambda a: a.whole.pop("score.weight"), "no classification head"),
    (lambda a: a.whole.update({"score.weight": torch.zeros(3, 32)}), "3 outputs and the run 2 classes"),
    (lambda a: a.whole.update({"score.weight": torch.zeros(2, 31)}), "no classification head"),
    (lambda a: a.whole.update({"transformer.wte.weight": torch.zeros(2)}), "transformer.wte.weight is no LoRA matrix"),
    (lambda a: a.whole["score.weight"].fill_(float("nan")), "not finite"),
    (lambda a: next(iter(a.pairs.values()))[1].fill_(float("inf")), "not finite")])
def test_what_does_not_fit_is_refused_and_the_bank_is_as_it_was(tmp_path, change, says):
    save_adapter(fine_tuned("gpt2", 0, 2), tmp_path, "the-base")
    bank = AdapterBank(fast_classifier(toy_net("gpt2")), write_tokenizer(tmp_path / "tokenizer"), "the-base")
    bank.add("good", read_adapter(bank.net, tmp_path), reading(2))
    before = [list(module.pool.free) for module in bank.net.modules() if isinstance(module, MixedLinear)]
    adapter = read_adapter(bank.net, tmp_path)
    change(adapter)
    with pytest.raises(UserError, match=says) as error:
        bank.add("bad", adapter, reading(2))
    assert one_line(error) and list(bank.entries) == ["good"]
    assert before == [list(module.pool.free) for module in bank.net.modules() if isinstance(module, MixedLinear)]


@pytest.mark.parametrize("name, says", [("good", "the name is taken"), *(
    (name, "expected up to 64") for name in ("", "a/b", "../x", "a" * 65, "a\n", "ä"))])
def test_names_are_unique_and_plain(tmp_path, name, says):
    save_adapter(fine_tuned("gpt2", 0, 2), tmp_path, "the-base")
    bank = AdapterBank(fast_classifier(toy_net("gpt2")), write_tokenizer(tmp_path / "tokenizer"), "the-base")
    bank.add("good", read_adapter(bank.net, tmp_path), reading(2))
    with pytest.raises(UserError, match=says) as error:
        bank.add(name, read_adapter(bank.net, tmp_path), reading(2))
    assert one_line(error)
    with pytest.raises(UserError, match="unknown adapter 'bad'; expected one of good"):
        bank.remove("bad")


@pytest.mark.filterwarnings("ignore:.*were truncated")
@pytest.mark.parametrize("limit", [int(1e30), 20])
def test_a_row_without_an_adapter_is_cut_to_the_models_positions(tmp_path, limit):
    """A tokenizer may know no limit, or a larger one than the model's."""
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.model_max_length = limit
    bank = AdapterBank(fast_classifier(toy_net("gpt2", vocab_size=280)), tokenizer, "the-base")
    ids = torch.tensor(tokenizer(LONG := "The cat sat on the mat. " * 9)["input_ids"])[None, :min(limit, CONTEXT)]
    (answer,) = bank.classify([(None, LONG)])
    expected = bank.logits(ids, torch.ones_like(ids), [None])[0].softmax(-1)
    assert answer["truncated"] and list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_adapter_for_another_base_is_named(tmp_path):
    save_adapter(adapted("gpt2", rank=2), tmp_path, "the-base")
    bank = AdapterBank(fast_classifier(toy_net("llama")), write_tokenizer(tmp_path / "tokenizer"), "another")
    with pytest.raises(UserError, match="adapter for another base: transformer.h.0.* does not exist"):
        read_adapter(bank.net, tmp_path)


def test_each_row_is_stored_once_and_old_stores_are_freed():
    """256 adapters of rank 8 take little more than their own bytes."""
    pool = RowPool((12, 20), torch.zeros(1))
    first = weakref.ref(pool.data[0])
    for slot in range(1, 257):
        pool.store(slot, torch.full((8, 12), float(slot)), torch.full((8, 20), -float(slot)))
    assert first() is None
    assert 256 * 8 <= len(pool.data[0]) <= 256 * 8 * 1.26
    A, B = pool.gather(torch.tensor([3, 255, 300]))  # 300 has no rows here
    assert A.shape == (3, 8, 12) and B.shape == (3, 8, 20)
    assert A[:, :, 0].tolist() == [[3.0] * 8, [255.0] * 8, [0.0] * 8] and B[1].unique().tolist() == [-255.0]
    pool.store(3, torch.ones(2, 12), torch.ones(2, 20))
    assert pool.gather(torch.tensor([3]))[0].sum() == 24


def test_slots_whose_rows_follow_one_another_are_read_in_place():
    pool, matrices = RowPool((12, 20), torch.zeros(1)), {}
    for slot in (1, 2, 3, 2):  # the second slot once more: its rows are where they were
        matrices[slot] = torch.randn(8, 12), torch.randn(8, 20)
        pool.store(slot, *matrices[slot])
    for slots in ([1, 2, 3], [2, 3], [1, 3]):
        A, B = pool.gather(torch.tensor(slots))
        torch.testing.assert_close(A, torch.stack([matrices[slot][0] for slot in slots]), atol=0, rtol=0)
        torch.testing.assert_close(B, torch.stack([matrices[slot][1] for slot in slots]), atol=0, rtol=0)
        in_place = A.untyped_storage().data_ptr() == pool.data[0].untyped_storage().data_ptr()
        assert in_place == (slots != [1, 3])
