"""What the command does before anything of torch is imported."""

import gc
import os

import pytest

from operators import __main__ as cli
from operators.core.openmp import wait_as_usual, wait_briefly


@pytest.fixture
def without_a_policy(monkeypatch):
    """What a user may have set is not; and what is set meanwhile is undone."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "given", "used"),
    [("OMP_WAIT_POLICY", None, "2000"), ("OMP_WAIT_POLICY", "active", None), ("GOMP_SPINCOUNT", "5", "5")],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(monkeypatch, without_a_policy, name, given, used):
    collections = []
    monkeypatch.setattr(gc, "set_threshold", collections.append)
    monkeypatch.setattr("sys.argv", ["steer-operators", "--version"])
    if given is not None:
        monkeypatch.setenv(name, given)
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == used
    assert collections


def test_processes_of_others_wait_in_their_own_way(monkeypatch, without_a_policy):
    wait_briefly()
    wait_as_usual()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    wait_briefly()
    wait_as_usual()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
