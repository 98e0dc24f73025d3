"""Kept results equal fresh ones bit for bit, are not computed again, and never answer for something else."""
import hashlib
import itertools
import random
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import toy
from conftest import ARCHITECTURES, FAMILIES, adapted, fast_classifier, randomize_B, toy_batch, toy_net
from transformers import AutoModelForSequenceClassification

import data_utils
import train_utils
from benchmarks.architectures import PAD, config_of
from data.backbones import blocks_of
from data_utils import Batch
from distillation.labels import teacher_logits
from fast.blocks import FusedBlock
from fast.frozen import CachedBatch, FrozenPrefix, lowest_trained_block
from fast.installation import install
from machine.errors import UserError
from model import LoRAOptions, TextClassifier, inject_lora
from record import tensors
from record.files import read_json
from record.tensors import batches_digest, digest_meanwhile, weights_digest
from report import figures

LENGTHS = ((5, 9, 1, 12), (7, 7, 7, 7), (2, 3))  # the second batch has no pad and is run without a mask


def toy_batches() -> list[Batch]:
    batches, row = [], 0
    for seed, lengths in enumerate(LENGTHS):
        ids, mask = toy_batch(lengths, seed)
        labels = torch.tensor([i % 2 for i in range(len(lengths))])
        batches.append(Batch(ids, mask, labels, torch.arange(row, row + len(lengths)), sum(lengths)))
        row += len(lengths)
    return batches


def made(architecture: str, part: str) -> TextClassifier:
    """A toy classifier of which the upper block (adapted) and the head train, or the head alone."""
    if part == "upper":
        return adapted(architecture, layers="1-1", dropout=0.1)
    net = toy_net(architecture)
    net.base_model.requires_grad_(False)
    return fast_classifier(net)


def step(classifier: TextClassifier, batch: Batch) -> dict[str, torch.Tensor]:
    """Logits and gradients of a training step; the head's and the adapter's dropout draw alike each time."""
    classifier.train()
    classifier.zero_grad()
    torch.manual_seed(3)
    logits = classifier(*batch.inputs())
    F.cross_entropy(logits, batch.labels).backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in train_utils.trainable(classifier).items()}}


def computations(classifier: TextClassifier, batch: Batch, monkeypatch) -> list[int]:
    """How often each block computes in a forward pass."""
    calls = [0] * len(blocks_of(classifier.net.base_model))
    plain = FusedBlock.compute

    def counted(block, *args):
        calls[block.heads.layer] += 1
        return plain(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FusedBlock, "compute", counted)
        classifier(*batch.inputs())
    return calls


# ---------------------------------------------------------------- cached equals fresh

@pytest.mark.parametrize("architecture, part, budget", [
    *itertools.product(ARCHITECTURES, ("upper", "head"), (1 << 30, 0)), *((name, "upper", 1 << 30) for name in FAMILIES)])
def test_kept_logits_and_gradients_equal_fresh_ones_bit_for_bit(architecture, part, budget, tmp_path):
    """Invariant 11; fresh ones come from a classifier that has no prefix at all."""
    classifier, untouched = made(architecture, part), made(architecture, part)
    fresh = [step(untouched, batch) for batch in toy_batches()]
    batches = toy_batches()
    classifier.prefix = FrozenPrefix(classifier)
    used = classifier.prefix.cache(batches, tmp_path, budget)
    assert used == (sum(batch.cached.nbytes for batch in batches) if budget else 0)
    assert list(tmp_path.iterdir()) == []  # what is mapped has no name
    for expected, batch, unkept in zip(fresh, batches, toy_batches(), strict=True):
        found = step(classifier, batch)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert all(expected[name].abs().max() > 0 for name in expected)
        assert torch.equal(step(classifier, unkept)["logits"], expected["logits"])  # nothing cached: computed as ever


def test_a_head_that_reads_all_tokens_gets_them_from_the_cache():
    classifier, batch = fast_classifier(toy_net("modernbert", classifier_pooling="mean")), toy_batches()[0]
    classifier.net.base_model.requires_grad_(False)
    expected = step(classifier, batch)["logits"]
    classifier.prefix = FrozenPrefix(classifier)
    classifier.prefix.cache([batch])
    assert batch.cached.shape[:2] == batch.input_ids.shape and torch.equal(step(classifier, batch)["logits"], expected)


@pytest.mark.parametrize("part", ["upper", "head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_blocks_are_not_run_where_their_results_are_kept(architecture, part, monkeypatch):
    classifier, batches = made(architecture, part), toy_batches()
    classifier.prefix = FrozenPrefix(classifier)
    classifier.prefix.cache(batches[:1])
    assert computations(classifier, batches[1], monkeypatch) == [1, 1]
    assert computations(classifier, batches[0], monkeypatch) == ([0, 1] if part == "upper" else [0, 0])


@pytest.mark.parametrize("part", ["upper", "head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_kept_is_what_is_read(architecture, part):
    classifier, batch = made(architecture, part), toy_batches()[0]
    classifier.prefix = FrozenPrefix(classifier)
    classifier.prefix.cache([batch])
    before = step(classifier, batch)["logits"]
    batch.cached += torch.randn(batch.cached.shape)
    assert not torch.equal(step(classifier, batch)["logits"], before)


def test_past_the_budget_the_rest_is_mapped_and_the_same(tmp_path):
    classifier, batches, other = made("gpt2", "upper"), toy_batches(), toy_batches()
    prefix = classifier.prefix = FrozenPrefix(classifier)
    prefix.cache(batches)
    sizes = [batch.cached.nbytes for batch in batches]
    assert prefix.cache(other, tmp_path, budget=sizes[0] + sizes[2]) == sizes[0] + sizes[2]  # the second is mapped
    assert prefix.cache(other[:1], tmp_path, budget=10 + sizes[0], used=11) == 11  # no room left
    assert all(torch.equal(a.cached, b.cached) for a, b in zip(batches, other, strict=True))


def test_dropout_inside_the_frozen_part_is_off_in_training():
    """The toy GPT-2 has `transformers`' default dropout of 0.1 everywhere."""
    classifier, batch = made("gpt2", "head"), toy_batches()[0]
    assert classifier.net.config.resid_pdrop == 0.1
    assert torch.equal(step(classifier, batch)["logits"], classifier.eval()(*batch.inputs()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lowest_trained_block(architecture):
    blocks = len(blocks_of(toy_net(architecture).base_model))
    assert lowest_trained_block(adapted(architecture)) == 0
    assert lowest_trained_block(adapted(architecture, layers="0-0")) == 0
    assert lowest_trained_block(adapted(architecture, layers="1-1")) == 1
    assert lowest_trained_block(made(architecture, "head")) == blocks
    assert lowest_trained_block(fast_classifier(toy_net(architecture))) == 0  # everything trains
    embeddings = made(architecture, "head")
    next(embeddings.net.base_model.parameters()).requires_grad_(True)
    assert lowest_trained_block(embeddings) == 0


# ---------------------------------------------------------------- other architectures

def made_of(architecture: str, part: str) -> TextClassifier:
    """As `made`, of an architecture that is not fused."""
    torch.manual_seed(0)
    classifier = fast_classifier(AutoModelForSequenceClassification.from_config(config_of(architecture)).eval())
    classifier.probe(architecture)
    if part == "head":
        return classifier.configure("head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its roles are not known
        classifier.configure("lora", LoRAOptions(rank=4, layers="1", dropout=0.1))
    randomize_B(classifier.net)
    install(classifier)
    return classifier


def batches_with_ends() -> list[Batch]:
    """Toy batches in the ids of `config_of`, each sentence with an end token, which BART pools at."""
    batches = toy_batches()
    for batch in batches:
        ids = (3 + batch.input_ids % 20).scatter(1, batch.attention_mask.sum(1, keepdim=True) - 1, 2)
        batch.input_ids = ids.where(batch.attention_mask.bool(), torch.tensor(PAD))
    return batches


OTHERS = [("deberta", "upper"), ("mpnet", "upper"), ("falcon", "upper"), ("gpt_neo", "upper"), ("openai-gpt", "upper"),
          ("deberta-v2", "head"), ("roberta", "head"), ("nomic_bert", "head"), ("eurobert", "head"), ("bart", "head"),
          ("falcon", "head")]


@pytest.mark.parametrize("architecture, part", OTHERS)
def test_what_other_blocks_and_heads_hand_on_is_cached_bit_for_bit(architecture, part):
    fresh = [step(made_of(architecture, part), batch) for batch in batches_with_ends()]
    classifier, batches = made_of(architecture, part), batches_with_ends()
    prefix = classifier.prefix = FrozenPrefix(classifier)
    assert prefix.cache(batches) > 0 and not prefix.obstacle
    for expected, batch in zip(fresh, batches, strict=True):
        found = step(classifier, batch)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        batch.cached += 1.0
        assert not torch.equal(step(classifier, batch)["logits"], expected["logits"])  # it is what is read


@pytest.mark.parametrize("architecture, tokens", [("roberta", 1), ("deberta", 1), ("eurobert", 12), ("bart", 12)])
def test_of_the_backbones_output_no_more_is_cached_than_the_head_reads(architecture, tokens):
    batches = batches_with_ends()
    classifier = made_of(architecture, "head")
    classifier.prefix = FrozenPrefix(classifier)
    classifier.prefix.cache(batches)
    assert batches[0].input_ids.shape == (4, 12) and batches[0].cached.shape == (4, tokens, 32)


@pytest.mark.parametrize("architecture, part, why", [
    ("t5", "upper", "a t5 model's frozen blocks cannot be cached: what follows them depends on more than"),
    ("fnet", "upper", "a fnet model's frozen blocks cannot be cached: sentences of each length are computed on their own"),
    ("xlnet", "head", "a xlnet model's frozen blocks cannot be cached: sentences of each length")])
def test_what_cannot_be_cached_is_said_and_computed_each_time(architecture, part, why):
    classifier, batches = made_of(architecture, part), batches_with_ends()
    prefix = classifier.prefix = FrozenPrefix(classifier)
    assert prefix.cache(batches, used=7) == 7
    assert prefix.obstacle.startswith(why) and not any(isinstance(batch, CachedBatch) for batch in batches)
    for batch in batches_with_ends():
        found, expected = step(classifier, batch), step(made_of(architecture, part), batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    return folder


@pytest.mark.parametrize(("options", "file"), [(("--layers", "1-1", "--dropout", 0.2), "adapter_model.safetensors"),
                                               (("--method", "head"), "trained.safetensors")], ids=["layers", "head"])
def test_a_run_that_keeps_ends_in_the_bytes_of_one_that_does_not(work, tmp_path, monkeypatch, options, file):
    """With a batch that is computed in parts."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(data_utils, "LARGE", 1.2)
    computed, found = {}, {}
    compute = FrozenPrefix.compute
    for name, keeping in (("cached", ()), ("mapped", ("--keep-memory", 0)), ("fresh", ("--no-keep",))):
        computed[name] = []
        monkeypatch.setattr(FrozenPrefix, "compute",
                            lambda self, batch, name=name: (computed[name].append(1), compute(self, batch))[1])
        assert toy.main("LoRA", "12345", "--model", work / "model", "--data", work / "cola", "--out", tmp_path / name,
                        "--plots", tmp_path, "--epochs", 2, "--batch-size", 8, "--lr", 0.01, *options, *keeping) == 0
        found[name] = (tmp_path / name / file).read_bytes(), read_json(tmp_path / name / "summary.json")["validation"]
    assert found["cached"] == found["mapped"] == found["fresh"]
    assert [len(computed[name]) for name in ("cached", "mapped", "fresh")] == [11, 11, 0]  # 5 + 2 + 2, two of them in parts
    left = [{path.name for path in (tmp_path / name).iterdir()} for name in ("mapped", "fresh")]
    assert left[0] == left[1]  # no cached file among them


# ---------------------------------------------------------------- keys

def test_the_weights_digest_changes_with_any_weight_and_only_then():
    classifier = adapted("gpt2")
    state = classifier.state_dict()
    before = weights_digest(classifier)
    assert weights_digest(adapted("gpt2")) == before
    for name, value in state.items():
        flat, at = value.view(-1), random.Random(name).randrange(value.numel())
        old = flat[at].item()
        flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf))
        assert weights_digest(classifier) != before, name
        flat[at] = old
    assert weights_digest(classifier) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_digest_made_meanwhile_is_the_formulas_whatever_is_injected_or_cast_in_between(architecture, monkeypatch):
    net, expected, digest = toy_net(architecture), hashlib.sha256(), tensors._digest
    for name, value in sorted(net.base_model.state_dict().items()):
        expected.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + value.numpy().tobytes())
    injected = threading.Event()
    monkeypatch.setattr(tensors, "_digest", lambda pieces: digest(pieces) if injected.wait(60) else None)
    future = digest_meanwhile(net.base_model)
    inject_lora(net, LoRAOptions())
    for p in net.parameters():
        p.data = p.data.bfloat16()
    injected.set()
    assert future.result() == expected.hexdigest() != weights_digest(net.base_model)


def test_what_goes_wrong_meanwhile_is_raised_with_the_result(monkeypatch):
    def fails(pieces):
        raise UserError("weights: gone")
    monkeypatch.setattr(tensors, "_digest", fails)
    future = digest_meanwhile(toy_net("gpt2"))
    with pytest.raises(UserError, match="weights: gone"):
        future.result()


def test_the_batches_digest_changes_with_any_id_mask_or_row_and_only_then():
    before = batches_digest(toy_batches())
    assert batches_digest(toy_batches()) == before
    for number, batch in enumerate(toy_batches()):
        for name in ("input_ids", "attention_mask", "rows"):
            for at in range(getattr(batch, name).numel()):
                changed = toy_batches()
                getattr(changed[number], name).view(-1)[at] += 1
                assert batches_digest(changed) != before
    assert batches_digest(toy_batches()[::-1]) != before
    assert batches_digest(toy_batches()[:-1]) != before


def test_teacher_logits_are_computed_again_only_for_another_teacher_or_other_data(tmp_path, monkeypatch):
    teacher, batches, path = adapted("gpt2"), toy_batches(), tmp_path / "teacher_logits.safetensors"
    asked, compute_logits = [], train_utils.compute_logits
    monkeypatch.setattr(train_utils, "compute_logits", lambda *args: (asked.append(1), compute_logits(*args))[1])
    first = teacher_logits([(teacher, batches)], path)
    assert torch.equal(teacher_logits([(teacher, batches)], path), first) and len(asked) == 1
    randomize_B(teacher.net, std=0.2)
    second = teacher_logits([(teacher, batches)], path)
    assert len(asked) == 2 and not torch.equal(second, first)
    assert torch.equal(second, compute_logits(teacher, batches))
    batches[0].input_ids[0, 0] += 1
    third = teacher_logits([(teacher, batches)], path)
    assert len(asked) == 3 and not torch.equal(third, second)
