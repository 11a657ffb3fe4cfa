"""What the command does before anything of torch is imported."""

import gc
import os

import pytest

from operators import __main__ as cli


@pytest.mark.parametrize(("given", "used"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch, given, used):
    collections = []
    monkeypatch.setattr(gc, "set_threshold", collections.append)
    monkeypatch.setattr("sys.argv", ["steer-operators", "--version"])
    # Set first, so that what the command sets is undone.
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == used
    assert collections
