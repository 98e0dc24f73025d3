"""One finished LoRA run, which the tests of fine-tuning, distillation and evaluation share."""
import pytest
import toy

from report import figures


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A toy model, toy data, and one finished LoRA run with its plots."""
    folder = tmp_path_factory.mktemp("runs")
    toy.write_model(folder / "model")
    toy.write_cola(folder / "cola")
    assert toy.lora(folder, folder / "LoRA", "--plots", folder / "plots") == 0
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Without drawing plots."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
