"""Every file of examples/ runs as it is, against one server of the tiny model."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from steer_client import SamplingParams, SteerClient

from operators.core.store import Store

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = EXAMPLES / "node"


@pytest.fixture(scope="module")
def environment(start_server, tiny_model, golden, tmp_path_factory, free_ports):
    """That of a user whose server has the operators that the examples name."""
    store = tmp_path_factory.mktemp("examples") / "store"
    for name in ("ocean", "tea", "volcano"):
        Store(store).save(name, golden)
    [port] = free_ports(1)
    with start_server("--store", str(store), "--http-port", str(port), model=tiny_model, threads=1) as server:
        yield os.environ | {"STEER_TARGET": server.target, "STEER_HTTP": f"http://127.0.0.1:{port}/v1"}


@pytest.fixture
def example(environment, tmp_path):
    def run(name, *arguments, status=0):
        command = [sys.executable, EXAMPLES / name, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_example_is_run_here():
    tested = {"notebook.ipynb", "node", "prompts.txt"} | {f"{name}.py" for name in NAMES}
    assert {path.name for path in EXAMPLES.iterdir()} == tested


NAMES = ("quickstart", "sweep", "async_fan_out", "ci_gate", "openai_client", "plain_stubs")


def test_the_quickstart_shows_both_texts_and_the_receipt(example):
    plain, steered, added, receipt = example("quickstart.py").splitlines()[-4:]
    assert (plain[:6], steered[:8], added[:6]) == ("plain:", "steered:", "added:")
    assert receipt.startswith("ocean sha256:")
    assert receipt.endswith("λ 0.400")


def test_the_sweep_takes_at_most_ten_statements_and_leaves_table_plot_page_and_file(example, tmp_path):
    body = ast.parse((EXAMPLES / "sweep.py").read_text(encoding="utf-8")).body[1:]
    code = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert sum(node.end_lineno - node.lineno + 1 for node in code) <= 10
    first = example("sweep.py")
    lines = (tmp_path / "sweep.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 10 * (1 + 3 * 5)
    assert "30 texts at λ = 0: all as without steering" in first
    # Again, and nothing is left to decode.
    assert example("sweep.py") == first
    assert (tmp_path / "sweep.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert (tmp_path / "sweep.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "sweep.html").read_text(encoding="utf-8").count("<details") == 10


def test_the_page_on_sweeps_shows_this_example():
    shown = (EXAMPLES.parent / "docs/SWEEPS.md").read_text(encoding="utf-8")
    assert f"```python\n{(EXAMPLES / 'sweep.py').read_text(encoding='utf-8')}```\n" in shown


def test_the_fan_out_prints_every_prompt_with_its_text(example):
    printed = example("async_fan_out.py")
    prompts = (EXAMPLES / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert all(prompt in printed for prompt in prompts)


def test_the_gate_is_open_or_shut(example):
    # A letter that no text of the tiny model has.
    assert "useful, wanted 0" in example("ci_gate.py", "ocean=0.4", "0", "ꙮ")
    assert "0.00" in example("ci_gate.py", "ocean=0.4", "0.5", "ꙮ", status=1)
    example("ci_gate.py", "ocean", "0.5", "sea", status=2)
    example("ci_gate.py", "nobody=0.4", "0.5", "sea", status=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "an operator, a share and a word are needed; there are 0 arguments\nFails a build"),
        (["ocean=0.4", "0.5"], "there are 2 arguments"),
        (["ocean", "0.5", "sea"], "the operator 'ocean' has no strength"),
    ],
)
def test_the_gate_says_what_it_needs(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["ci_gate.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "ci_gate.py"))
    assert said in capsys.readouterr().err


def test_openais_client_gets_plain_and_steered_texts(example, environment):
    plain, steered = example("openai_client.py").split("+ocean=0.4: ")
    with SteerClient(environment["STEER_TARGET"]) as client:
        sampling = SamplingParams(max_tokens=24, temperature=0.0)
        texts = [
            client.generate("The view from the window was", operators=each, sampling=sampling).text
            for each in ((), "ocean=0.4")
        ]
    assert texts[0] in plain
    # Once by the model's name, once streamed.
    assert steered.count(texts[1]) == 2
    assert "'operator': 'ocean'" in steered


def test_plain_stubs_need_no_sdk(example):
    source = (EXAMPLES / "plain_stubs.py").read_text(encoding="utf-8")
    assert "steer_client" not in source
    printed = example("plain_stubs.py")
    assert printed.startswith(("normal: ", "ocean: "))
    assert "λ 0.400" in printed


def test_the_notebook_runs_and_shows_tables_and_charts(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_TARGET", environment["STEER_TARGET"])
    shutil.copy(EXAMPLES / "prompts.txt", tmp_path)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert any("<ins>" in each for each in shown)
    assert any("<svg" in each and "<table>" in each for each in shown)
    assert (tmp_path / "kl.png").exists()


def test_node_streams_a_steered_text(environment, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    for name in ("package.json", "stream.js"):
        shutil.copy(NODE / name, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
    try:
        got = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not get @grpc/grpc-js within two minutes")
    if got.returncode:
        pytest.skip(f"npm could not get @grpc/grpc-js: {got.stderr.strip()[-200:]}")
    variables = environment | {"STEER_PROTOS": str(EXAMPLES.parent / "protos")}
    # A proxy is for what is elsewhere.
    variables["no_grpc_proxy"] = "127.0.0.1"
    done = subprocess.run(
        ["node", "stream.js"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    text, receipt = done.stdout.rsplit("\n", 2)[:2]
    assert receipt.startswith("ocean sha256:")
    assert receipt.endswith("λ 0.400")
    with SteerClient(environment["STEER_TARGET"]) as client:
        sampling = SamplingParams(max_tokens=24)
        assert client.generate("The view from the window was", operators="ocean=0.4", sampling=sampling).text == text
    assert json.loads((NODE / "package.json").read_text(encoding="utf-8"))["private"] is True
