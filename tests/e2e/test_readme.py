"""What the README shows is run: its commands, its Python, its picture and its printed output."""

from __future__ import annotations

import html
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
HTTP = (ROOT / "docs/HTTP.md").read_text()
ADDRESS = "127.0.0.1:50051"
ADDRESS_HTTP = "127.0.0.1:8000"

pytestmark = pytest.mark.model


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def commands(block):
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    store = tmp_path_factory.mktemp("readme") / "store"
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "STEER_STORE": str(store)}


@pytest.fixture(scope="module")
def served(environment, start_server, free_ports):
    offline, *_ = blocks("console")
    for command in commands(offline):
        run(command, environment)
    [http] = free_ports(1)
    options = ("--store", environment["STEER_STORE"], "--http-port", str(http))
    with start_server(*options, model="smollm2-135m") as server:
        yield server.target, f"127.0.0.1:{http}"


@pytest.fixture(scope="module")
def target(served):
    return served[0]


@pytest.fixture(scope="module")
def http(served):
    return served[1]


def run(command, environment, stderr=subprocess.PIPE, **options):
    done = subprocess.run(
        command if options.get("shell") else shlex.split(command),
        env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=300, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_no_placeholder_was_left():
    assert re.findall(r"@[A-Z0-9]+@|TODO|TBD", README) == []


def test_the_commands_run_and_the_steered_ones_print_text(environment, target):
    _, online = blocks("console")
    for command in commands(online):
        assert run(command, {**environment, "STEER_TARGET": target}).strip(), command


def test_the_output_that_is_shown_is_that_of_the_last_command(environment, target):
    *_, command = commands(blocks("console")[-1])
    [shown] = blocks("text")
    printed = run(command, {**environment, "STEER_TARGET": target}, stderr=subprocess.STDOUT)
    assert printed.split()[:8] == shown.split()[:8]
    there, here = ([re.split("…|, measured", line) for line in text.splitlines()[-2:]] for text in (shown, printed))
    assert there[0][0].split(" · ")[:2] == here[0][0].split(" · ")[:2]
    # The digest holds the time of the build, and the last digit of a dose depends on the processor.
    assert there[1][1] == here[1][1]
    for one, other in zip(re.findall(r"[\d.]+", there[1][2]), re.findall(r"[\d.]+", here[1][2]), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.002)


def test_the_python_runs_and_prints_a_line_per_strength(environment, target):
    [program] = [block for block in blocks("python") if "steer_client" in block]
    assert ADDRESS in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, target)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plain: ")
    assert re.findall(r"^λ = (\S+):.*, λ 0\.\d+$", done.stdout, flags=re.MULTILINE) == ["0.3", "0.4", "0.5"]
    texts = re.findall(r"^λ = .*", done.stdout, flags=re.MULTILINE)
    assert all("ocean" in text for text in texts), "what is shown first shows what steering does"


def test_the_library_builds_keeps_and_steers_in_twelve_lines(environment, tmp_path):
    [program] = [block for block in blocks("python") if "steer_client" not in block]
    assert program.count("\n") <= 12
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, text = done.stdout.split("\n", 1)
    assert float(error) <= 1e-5
    assert "ocean" in text.removeprefix("I went to see the")
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["blue-ocean.safetensors"]


def test_a_client_that_knows_only_the_address_can_ask(environment, target):
    [shown] = [block for block in blocks("sh") if "buf curl" in block]
    assert '"receipts"' in run(shown.replace(ADDRESS, target), environment, shell=True)


def test_the_commands_over_http_answer(environment, http):
    [shown] = [block for block in blocks("sh", HTTP) if "curl" in block]
    assert ADDRESS_HTTP in shown
    printed = run(shown.replace(ADDRESS_HTTP, http), environment, shell=True)
    assert printed.count('"receipts":[{"operator":"ocean"') == 2
    assert '"compared":{"comparisons":[{"arm":"steered"' in printed
    assert '"model":"smollm2-135m"' in printed


def test_the_openai_client_of_the_page_is_steered(environment, http):
    [program] = blocks("python", HTTP)
    assert ADDRESS_HTTP in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS_HTTP, http)],
        env={**environment, "NO_PROXY": "127.0.0.1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0\.(19|20)\d*$", done.stdout, flags=re.MULTILINE), done.stdout


def test_the_server_command_names_options_that_exist(environment):
    shown = [block for page in (README, HTTP) for block in blocks("sh", page) if block.startswith("steer-server")]
    assert len(shown) == 2
    options = set(re.findall(r"--[a-z-]+", "".join(shown)))
    assert options <= set(re.findall(r"--[a-z-]+", run("steer-server --help", environment)))


def test_the_commands_of_the_builder_name_options_that_exist(environment):
    pages = (README, (ROOT / "docs/MEASURED.md").read_text())
    shown = "".join(block for page in pages for block in blocks("sh", page) if block.startswith("steer-operators"))
    for line in re.sub(r"\\\n", " ", shown).splitlines():
        options = set(re.findall(r"--[a-z-]+", line))
        helped = run(f"steer-operators {line.split()[1]} --help", environment | {"COLUMNS": "200"})
        assert options <= set(re.findall(r"--[a-z-]+", helped))


def test_the_demo_ends_well_and_prints_what_the_picture_shows(environment, tmp_path):
    made = tmp_path / "demo.svg"
    printed = run(f"{sys.executable} {ROOT / 'tools/demo.py'} --svg {made}", environment, cwd=tmp_path)
    normal, published, best, word = first_panels(printed)
    assert "San Francisco" not in normal
    assert re.search("San Francisco|Golden Gate|[Bb]ridge", published)
    assert re.search("San Francisco|Golden Gate|[Bb]ridge", best)
    assert re.search("[Bb]ridge", word)
    assert made.read_text().startswith("<svg")
    [shown] = [text_of(ROOT / name) for name in re.findall(r"!\[.*?\]\((\S+\.svg)\)", README)]
    assert first_panels(text_of(made)) == [normal, published, best, word]
    # Digests hold the time of the build, and the last digits of a figure depend on the processor.
    for arm in ("published", "best setting"):
        there, here = (re.findall(rf"^ ?{arm} .*$", text, flags=re.MULTILINE) for text in (shown, printed))
        assert len(there) == len(here) == 3
        assert [constant(line) for line in there] == [constant(line) for line in here]
    assert first_panels(shown)[0].split()[:8] == normal.split()[:8]


def text_of(picture):
    """What a terminal's picture shows, each piece in its column: a character is 12.2 wide."""
    lines = {}
    pieces = re.findall(r'<text class="\S+-r\d+" x="(\S+)" y="(\S+)"[^>]*>(.*?)</text>', picture.read_text())
    for x, y, piece in pieces:
        line = lines.get(float(y), "").ljust(round(float(x) / 12.2))
        lines[float(y)] = line + html.unescape(piece).replace("\xa0", " ")
    return "\n".join(lines[y] for y in sorted(lines))


def first_panels(printed):
    """The four texts of the first prompt."""
    rows = printed.split("╭", 1)[1].split("╰", 1)[0].splitlines()[1:]
    cells = [[cell.strip() for cell in row.split("│") if cell.strip("│")] for row in rows]
    return [" ".join(row[column] for row in cells if len(row) == 4) for column in range(4)]


def constant(line):
    """The columns that follow from the operator and the prompt: block, λ, β, tokens steered, dose."""
    return re.search(r"✓ [0-9a-f]{8}\s+(\S+)\s+(\S+)\s+(\S+)\s+(.*?)\s{2,}(\S+)", line).groups()
