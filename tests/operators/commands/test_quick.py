"""What a person waits for on every call is quick: help, listing, showing and deleting import no numerics."""

import os
import resource
import subprocess
import sys

import pytest

from operators.core.store import Store

HEAVY = ("torch", "transformers", "numpy", "safetensors")
CPU_SECONDS = 1.5
"""Several times what is used on a quiet machine; importing torch alone takes longer."""
PROGRAM = f"""
import sys
from {{package}}.__main__ import main
sys.argv[1:] = sys.stdin.read().split()
try:
    main()
except SystemExit as left:
    print("exit", left.code or 0, file=sys.stderr)
print("heavy", sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


def _run(package, line, **environment):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROGRAM.format(package=package)]
    done = subprocess.run(command, input=line, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture
def environment(make_operator, tmp_path, monkeypatch):
    store = Store(tmp_path)
    for name in ("a", "b"):
        store.save(name, make_operator())
    (tmp_path / "broken.safetensors").write_text("no operator")
    monkeypatch.setenv("STEER_STORE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    return os.environ


OPERATORS = [
    *("--help", "--version", "list", "list --json", "show a", "show a --json", "delete b", "show missing"),
    *(
        f"{command} --help"
        for command in (
            "build",
            "list",
            "show",
            "verify",
            "delete",
            "calibrate",
            "combine",
            "import",
            "export",
            "contrast",
            "lens",
            "analyse",
        )
    ),
    "no-such-command",
]


@pytest.mark.parametrize(
    ("package", "line"),
    [*(("operators", line) for line in OPERATORS), ("steer_server", "--help"), ("steer_client", "--help")],
)
def test_a_quick_command_imports_no_numerics(environment, package, line):
    done, seconds = _run(package, line, **environment)
    code = {"show missing": 1, "no-such-command": 2}.get(line, 0)
    assert done.stderr.splitlines()[-2:] == [f"exit {code}", "heavy []"]
    assert seconds < CPU_SECONDS
