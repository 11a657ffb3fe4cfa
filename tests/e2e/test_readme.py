"""What the README shows is run: its commands, its Python, its picture and its printed output."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"

pytestmark = pytest.mark.model


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands(block):
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    store = tmp_path_factory.mktemp("readme") / "store"
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "STEER_STORE": str(store)}


@pytest.fixture(scope="module")
def target(environment, start_server):
    offline, *_ = blocks("console")
    for command in commands(offline):
        run(command, environment)
    with start_server("--store", environment["STEER_STORE"], model="smollm2-135m") as server:
        yield server.target


def run(command, environment, **options):
    done = subprocess.run(
        command if options.get("shell") else shlex.split(command),
        env=environment, capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_no_placeholder_was_left():
    assert re.findall(r"@[A-Z0-9]+@|TODO|TBD", README) == []


def test_the_commands_run_and_the_steered_ones_print_text(environment, target):
    _, online = blocks("console")
    for command in commands(online):
        assert run(command, {**environment, "STEER_TARGET": target}).strip(), command


def test_the_python_runs_and_prints_a_line_per_strength(environment, target):
    [program] = blocks("python")
    assert ADDRESS in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, target)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plain: ")
    assert re.findall(r"^λ = (\S+):.*dose 0\.\d+$", done.stdout, flags=re.MULTILINE) == ["0.15", "0.25", "0.35"]


def test_a_client_that_knows_only_the_address_can_ask(environment, target):
    [shown] = [block for block in blocks("sh") if "buf curl" in block]
    assert '"receipts"' in run(shown.replace(ADDRESS, target), environment, shell=True)


def test_the_server_command_names_options_that_exist(environment):
    [shown] = [block for block in blocks("sh") if block.startswith("steer-server")]
    options = set(re.findall(r"--[a-z-]+", shown))
    assert options <= set(re.findall(r"--[a-z-]+", run("steer-server --help", environment)))


def test_the_commands_of_the_builder_name_options_that_exist(environment):
    shown = "".join(block for block in blocks("sh") if block.startswith("steer-operators"))
    for line in shown.splitlines():
        options = set(re.findall(r"--[a-z-]+", line))
        assert options <= set(re.findall(r"--[a-z-]+", run(f"steer-operators {line.split()[1]} --help", environment)))


def test_the_demo_ends_well_and_prints_what_the_readme_shows(environment, tmp_path):
    printed = run(f"{sys.executable} {ROOT / 'tools/demo.py'} --svg {tmp_path / 'demo.svg'}", environment, cwd=tmp_path)
    normal, published, best = first_panels(printed)
    assert "San Francisco" not in normal
    assert re.search("San Francisco|Golden Gate|[Bb]ridge", published)
    assert re.search("San Francisco|Golden Gate|[Bb]ridge", best)
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")
    [shown] = blocks("text")
    # Digests hold the time of the build, and the last digits of a figure depend on the processor.
    for arm in ("published", "best setting"):
        [there], [here] = (re.findall(rf"^ {arm} .*$", text, flags=re.MULTILINE)[:1] for text in (shown, printed))
        assert constant(there) == constant(here)
    assert first_panels(shown)[0].split()[:8] == normal.split()[:8]


def first_panels(printed):
    """The three texts of the first prompt."""
    rows = printed.split("╭", 1)[1].split("╰", 1)[0].splitlines()[1:]
    cells = [[cell.strip() for cell in row.split("│") if cell.strip("│")] for row in rows]
    return [" ".join(row[column] for row in cells if len(row) == 3) for column in range(3)]


def constant(line):
    """The columns that follow from the operator and the prompt: layer, λ, β, tokens steered, dose."""
    return re.search(r"✓ [0-9a-f]{8}\s+(\S+)\s+(\S+)\s+(\S+)\s+(.*?)\s{2,}(\S+)", line).groups()
