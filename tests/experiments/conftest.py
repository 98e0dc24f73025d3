"""One finished LoRA run and a distillation of it, which the tests of what is done with runs share."""
import pytest
import toy

from report import diagnosis, figures


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
    """Without plots: most of a toy run's time would be theirs."""
    monkeypatch.setattr(figures, "plot_run", lambda *_: [])
    monkeypatch.setattr(diagnosis, "figures", lambda *_: {})


@pytest.fixture(scope="session")
def distilled_run(work):
    """A distillation of that run."""
    assert toy.main("distil", "12345", "--plain", "--teacher", work / "LoRA", "--out", work / "distilled", "--plots",
                    work / "plots",
                    "--embedding-size", 6, "--hidden-size", 5, "--epochs", 2, "--batch-size", 8, "--no-plots") == 0
    return work / "distilled"
