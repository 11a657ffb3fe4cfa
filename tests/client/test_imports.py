"""What is imported when: gRPC with the first public name, nothing numeric ever."""

import os
import subprocess
import sys

import pytest
import steer_client

SLOW = ("grpc", "asyncio", "google.protobuf", "numpy", "torch", "operators", "steer_server", "opentelemetry")


def imported_by(program: str) -> list[str]:
    """Which of SLOW are loaded at the end of a program, in a process of its own."""
    report = f"import sys; print(*[name for name in {SLOW!r} if name in sys.modules], file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"], env=environment, capture_output=True, text=True, check=True
    )
    return ran.stderr.split()


def test_importing_the_package_imports_nothing_slow():
    assert imported_by("import steer_client") == []


def test_the_first_public_name_imports_grpc():
    assert imported_by("from steer_client import OperatorUse") == ["grpc", "asyncio", "google.protobuf"]


@pytest.mark.parametrize(
    "command", ["", "generate", "ab", "operators", "info", "health", "tokenize", "score", "sweep", "vote"]
)
def test_help_imports_nothing_slow(command):
    arguments = ["steer", *command.split(), "--help"]
    program = f"""
import sys
from steer_client.__main__ import main
sys.argv = {arguments!r}
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""
    assert imported_by(program) == []


def test_a_name_that_does_not_exist_is_an_attribute_error():
    for name in ("Generator", "_encoder", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'steer_client' has no attribute '{name}'"):
            getattr(steer_client, name)


def test_the_package_lists_its_public_names():
    assert set(steer_client.__all__) <= set(dir(steer_client))
    everything: dict = {}
    exec("from steer_client import *", everything)
    assert set(steer_client.__all__) <= set(everything)
