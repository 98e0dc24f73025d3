"""A training step on a GPU waits for nothing: between two reads no value of the device is asked for.

No GPU is needed: a mode lets plain tensors pass for a GPU's and marks what is made on the CPU. It notes whoever reads
a tensor of the "GPU" (item, tolist, bool, cpu ...) and refuses an operation that mixes the two, as a GPU does.
"""
from dataclasses import replace

import pytest
import torch
from conftest import adapted, toy_batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_utils
from data_utils import Batch
from distillation.losses import kd_objective
from fast import recurrent
from fast.installation import install
from layers import RNNConfig
from model import DistilRNN, TextClassifier
from options.schema import TrainOptions

READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.cpu,
         Tensor.numpy, Tensor.__array__, Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal}
FACTORIES = {torch.tensor, torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.randn, torch.rand}
# Both kinds of memory belong here: copies, and lengths of sentences, which the library wants on the CPU.
MIXING = {Tensor.to, Tensor.copy_, torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence, torch._VF.lstm,
          torch._VF.gru}
# Of the many that clip_grad_norm_ groups it asks C++ for the device, which knows the real one.
GROUPED = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
BELOW = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}  # reads within an operation
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
OPTIONS = TrainOptions(seed=7, epochs=1, lr=0.01)


class Host(Tensor):
    """A tensor on the CPU."""


class Below(TorchDispatchMode):
    """Notes operations that read a value of the GPU without anybody calling them by name."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if (name in BELOW or by_mask) and not isinstance(args[0], Host):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


class FakeGPU(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        hosts = [t for t in tensors if isinstance(t, Host)]
        on_host = bool(hosts)
        if func == Tensor.device.__get__:
            return CPU if on_host else GPU
        if func in (Tensor.is_cpu.__get__, Tensor.is_cuda.__get__):
            return on_host == (func == Tensor.is_cpu.__get__)
        if func in READS and not on_host:
            self.waits.append(func.__name__)
        if func in FACTORIES:
            on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        elif func in (Tensor.to, Tensor.cpu):
            to = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
            on_host = func is Tensor.cpu or (to.type == "cpu" if to else on_host)
            if to and to.type == "cpu" and not hosts:
                self.waits.append("to")
            if hosts and not on_host and not kwargs.get("non_blocking"):
                self.waits.append("a copy to the GPU that is waited for")
        elif func not in MIXING and len(hosts) < len(tensors) and any(t.dim() for t in hosts):
            raise AssertionError(f"{func}: tensors of the CPU and of the GPU")
        elif func in MIXING:
            on_host = False
        # The real device is the CPU all along.
        args, kwargs = ([CPU if isinstance(x, torch.device) else x for x in args],
                        {key: CPU if isinstance(x, torch.device) else x for key, x in kwargs.items()})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)

        def kind(value):
            if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
                return type(value)(map(kind, value))
            if isinstance(value, nn.Parameter) or not isinstance(value, Tensor) or isinstance(value, Host) == on_host:
                return value
            return value.as_subclass(Host if on_host else Tensor)
        if func in (torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence):  # sizes stay on the CPU
            return result[0].as_subclass(Tensor), result[1].as_subclass(Host)
        return kind(result)


def batches() -> list[Batch]:
    """Six batches, one of them without a pad; all of them on the CPU."""
    made = []
    for i, lengths in enumerate([(5, 9, 1, 12), (4, 4, 4, 4), (7, 2, 3, 3)] * 2):
        ids, mask = toy_batch(lengths, seed=i)
        made.append(Batch(ids, mask, torch.tensor([0, 1, 1, 0]), torch.arange(4) + 4 * i, sum(lengths)))
    return [replace(one, **{name: getattr(one, name).as_subclass(Host) for name in (
        "input_ids", "attention_mask", "labels", "rows")}) for one in made]


def student(**more) -> DistilRNN:
    torch.manual_seed(0)
    made = DistilRNN(RNNConfig(vocab_size=101, embedding_size=8, hidden_size=8, pooling="mean", **more))
    install(made)
    return made


MODELS = {**{name: lambda name=name: adapted(name) for name in ("gpt2", "llama", "bert", "distilbert")},
          "gpt2, dropout": lambda: adapted("gpt2", dropout=0.3), "student": student,
          "student, minGRU": lambda: student(cell="mingru", vocabulary=40, rare_tokens="pieces", frozen_embeddings=True)}


@pytest.mark.parametrize("name", MODELS)
def test_no_step_between_two_reads_waits_for_the_gpu(name, monkeypatch):
    monkeypatch.setattr(recurrent, "PADS", 0.0)  # as on a GPU, where rows are packed
    model = MODELS[name]().train()
    if isinstance(model, TextClassifier):
        model.net.config.pad_token_id = None  # as `from_causal_lm` leaves it, or the library looks for pads
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(Batch, "pinned", lambda self: self)  # needs a real GPU
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", lambda *tensors: {
        (GPU, kind): group for (_, kind), group in GROUPED(*tensors).items()})
    made, objective = batches(), train_utils.label_loss()
    if name == "student":
        objective = kd_objective(torch.randn(24, 2), 2.0, 0.5)
    with FakeGPU() as gpu:
        trainer = train_utils.Trainer(model, train_utils.Data(made, {}), objective, OPTIONS, None, train_utils.Hooks())
        trainer.progress.sums = dict.fromkeys((*trainer.SUMS, "rows", "tokens", "seconds"), 0.0)
        assert (trainer.device.type, trainer.read_every) == ("cuda", 16)
        trainer.step([made[0]])  # the optimiser makes its state in the first step
        gpu.waits.clear()
        with Below(gpu.waits):
            for one in made[1:]:
                trainer.step([one])
        assert gpu.waits == []
        trainer.read_sums()
        assert gpu.waits  # reading is noticed, or the line above says nothing
    assert trainer.progress.sums["rows"] == 24 and trainer.progress.sums["loss"] > 0
    assert any(not torch.equal(value, reference[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "student", "student, minGRU"])
def test_what_a_gpu_computes_is_what_the_cpu_does(name):
    """The way that the blocks and the student go on a GPU, with the mask on the CPU, gives the same logits."""
    model = MODELS[name]().eval()
    for one in batches():
        plain = [t.as_subclass(Tensor) for t in (one.input_ids, one.attention_mask)]
        with torch.no_grad():
            expected = model(*plain)
            with FakeGPU():
                found = model(*one.to(GPU).inputs())
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "distilbert"])
def test_a_backbone_in_bfloat16_trains_as_a_gpu_has_it(name):
    """On a GPU `--precision bf16` makes all that is frozen bfloat16, not linears alone."""
    exact, rough = adapted(name), adapted(name)
    for p in rough.net.base_model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    one, found = batches()[0], []
    for model in (exact, rough):
        with FakeGPU():
            loss = train_utils.label_loss()(model(*one.to(GPU).inputs()), one.to(GPU))
            loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in train_utils.trainable(model).values()])))
    (loss, gradient), (rough_loss, rough_gradient) = found
    assert 0 < abs(rough_loss - loss) < 0.05
    assert torch.cosine_similarity(gradient, rough_gradient, dim=0) > 0.99


@pytest.mark.parametrize("read", [lambda t: t.sum().item(), lambda t: t.tolist(), lambda t: bool(t.any()), lambda t: t.cpu(),
                                  lambda t: float(t.max()), lambda t: t[t > 1], lambda t: t.to(CPU), lambda t: t.nonzero()])
def test_every_way_of_reading_is_noticed(read):
    with FakeGPU() as gpu, Below(gpu.waits):
        read(torch.ones(3, device=GPU))
    assert gpu.waits
