"""A run killed at any moment and resumed ends in the same bytes as one that was not (invariant 12)."""
import json
import os
import subprocess
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Five SIGKILLs and two signals at statements, at moments drawn from seed 0, and one of each signal in each phase."""
    done = subprocess.run(warm.of_file(DRIVER, "--kills", 5, "--statements", 2, "--seed", 0, "--json"),
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("kill"))})
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


def test_killed_runs_end_in_the_same_bytes_once_resumed(result):
    assert result["failures"] == []
    assert (result["survived"], result["tried"]) == (5, 5)
    assert result["within_training"] > 0  # or no checkpoint was put to the test


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_asked_to_stop_saves_names_the_resume_command_and_ends_in_the_same_bytes(result, name, status):
    stopped = result["signals"][name]
    assert stopped["status"] == status
    assert stopped["stderr"].startswith("run.py: stopped; continue with: python run.py LoRA 12345 --model ")
    assert stopped["stderr"].endswith(" --resume")
    assert stopped["failures"] == []


@pytest.mark.parametrize("phase, says", [
    ("loading", "before anything was trained"), ("keeping", "before anything was trained"),
    ("teacher", "before anything was trained"), ("validation", "continue with: "), ("plotting", "continue with: ")])
def test_a_run_that_is_busy_elsewhere_stops_promptly_and_can_be_resumed(result, phase, says):
    stopped = result["busy"][phase]
    assert stopped["status"] in (130, 143) and stopped["seconds"] < 3
    assert stopped["stderr"].startswith("run.py: stopped") and says in stopped["stderr"]
    assert stopped["failures"] == []


def test_a_second_signal_ends_a_long_step_at_once(result):
    assert result["twice"]["waits"] is True
    assert result["twice"]["status"] == 130 and result["twice"]["seconds"] < 3


def test_a_signal_at_any_statement_of_a_run_with_averaged_weights_changes_nothing(result):
    """In the middle of the exchange of weights for their average, a checkpoint would hold some of each."""
    statements = result["statements"]
    assert statements["failures"] == [] and statements["survived"] == statements["tried"] == 2
    assert statements["in_validation"] >= 1
