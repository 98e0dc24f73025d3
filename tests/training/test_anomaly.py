"""The first module that computes something not finite is named, forward and backward."""
import pytest
import torch
import toy
from conftest import adapted, toy_batch
from torch import nn

import speed
from report import figures
from training import anomaly
from training.anomaly import NotFinite, watching

NAME, BLOCK = "net.transformer.h.1.mlp.c_proj", "net.transformer.h.1"


class NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class InfBackward(NaNBackward):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")  # infinity, and NaN where the gradient is 0


class Broken(nn.Module):
    def __init__(self, inner, breaking):
        super().__init__()
        self.inner, self.breaking = inner, breaking

    def forward(self, x):
        return self.breaking(self.inner(x))


def plain():
    """A classifier whose modules are called one by one; fused blocks (fused.py) are named as a whole."""
    classifier = adapted("gpt2")
    classifier.has_fused_blocks = False
    return classifier


def broken(breaking):
    classifier = plain()
    classifier.set_submodule(NAME, Broken(classifier.get_submodule(NAME), breaking))
    return classifier


def loss_of(classifier):
    ids, mask = toy_batch()
    return classifier(ids, mask).square().sum()


def test_a_healthy_model_gives_the_same_gradients_and_loses_its_hooks():
    gradients = []
    for watched in (True, False):
        classifier = adapted("gpt2")
        if watched:
            with watching(classifier):
                loss_of(classifier).backward()
        else:
            loss_of(classifier).backward()
        assert not any(module._forward_hooks for module in classifier.modules())
        gradients.append([p.grad for p in classifier.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.is_anomaly_enabled() is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_innermost_module_with_a_bad_output_is_named(value):
    classifier = broken(lambda x: x * value)
    with pytest.raises(NotFinite, match=f"the output of {NAME} .Broken. is not finite$"), watching(classifier):
        loss_of(classifier)


def test_a_bad_parameter_is_named():
    classifier = plain()
    with torch.no_grad():
        classifier.get_submodule(NAME).lora_B[0, 0] = float("inf")
    with pytest.raises(NotFinite, match=f"{NAME} .FastLoRALinear. is not finite; its parameter lora_B is not"):
        with watching(classifier):
            loss_of(classifier)


def test_a_bad_gradient_is_named_with_its_operation():
    classifier = broken(NaNBackward.apply)
    with pytest.raises(NotFinite, match=f"the gradient is nan: NaNBackwardBackward made it from the finite one of {NAME}"):
        with watching(classifier):
            loss_of(classifier).backward()


def test_an_infinite_gradient_is_named_though_autograd_lets_it_pass():
    classifier = plain()
    classifier.set_submodule(NAME, Broken(classifier.get_submodule(NAME), lambda x: InfBackward.apply(x + 0)))
    with pytest.raises(NotFinite, match=f"gradient of {NAME}.inner's output is not finite|InfBackwardBackward made it"):
        with watching(classifier):
            loss_of(classifier).backward()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else"), watching(adapted("gpt2")):
        raise RuntimeError("something else")
    assert anomaly.finite([torch.ones(2), {"a": torch.tensor(3)}]) and not anomaly.finite({"a": (torch.tensor(1e39),)})


@pytest.mark.parametrize("more, says, hint", [
    ((), "loss nan at step ", "lower --lr, or find the operation with --anomaly"),
    (("--anomaly",), f"the output of {BLOCK} (", "lower --lr")])
def test_a_diverging_run_says_where_and_ends_with_status_3(tmp_path, monkeypatch, capsys, more, says, hint):
    """The second epoch's first step multiplies by NaN; a resume with --anomaly finds it from the checkpoint."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    toy.write_model(tmp_path / "model")
    toy.write_cola(tmp_path / "cola")
    install = speed.install

    def install_and_break(classifier):
        way = install(classifier)
        calls, module = [], classifier.get_submodule(BLOCK)
        forward = module.forward

        def sixth_is_nan(*args, **kwargs):
            output = forward(*args, **kwargs)
            nan = torch.is_grad_enabled() and (calls.append(1) or len(calls) == 6)
            return output * float("nan") if nan else output
        module.forward = sixth_is_nan
        return way

    line = ("LoRA", "12345", "--model", tmp_path / "model", "--data", tmp_path / "cola", "--out", tmp_path / "run",
            "--plots", tmp_path, "--batch-size", 8, "--epochs", 2)
    monkeypatch.setattr(speed, "install", install_and_break)
    assert toy.main(*line, *more) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"run.py: {says}") and "6 (epoch 2), learning rate " in said and said.endswith(hint)
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    monkeypatch.setattr(speed, "install", install)
    assert toy.main(*line, "--resume") == 0  # with and without --anomaly: it changes no result
