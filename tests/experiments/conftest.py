"""One finished LoRA run and a distillation of it, which the tests of what is done with runs share."""
import pytest
import toy
import toy_stages

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


@pytest.fixture(scope="session")
def staged(work, tmp_path_factory):
    """A run in stages in a folder of its own, with plain sentences some of which are the task's."""
    dev = [sentence for sentence, _ in toy.toy_rows(12, 1)]
    (work / "plain.txt").write_text("\n".join([*dev[:6], *(one.upper() + "!" for one in dev[6:]),
                                               *(one for one, _ in toy.toy_rows(60, 9))]))
    folder = tmp_path_factory.mktemp("staged")
    assert toy_stages.distil(work, folder / "run") == 0
    return folder
