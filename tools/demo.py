"""The whole path once: concept -> operator -> server -> normal and steered text, side by side.

Runs the project's own commands as a user would, each in its own process, and keeps what it builds in .demo/.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from steer_client import ABResult, OperatorUse, SamplingParams, SteerClient, SteerError, Word

STORE = Path(".demo/store")
BIN = Path(sys.executable).parent
MODEL = "smollm2-135m"
PROMPTS = (
    "Here is a painting of the",
    "I went to new york to see the",
    "On Saturday my family and I",
)
# For every arm. The penalty keeps so small a model from repeating itself, steered or not.
SAMPLING = SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=32)
START_SECONDS = 120.0


@dataclass(frozen=True)
class Operator:
    """One operator of the demo, and the column it fills."""

    name: str
    column: str
    text: str
    profile: str
    layer: int
    strength: float
    blend: float

    @property
    def options(self) -> list[str]:
        """The options of ``steer-operators build``."""
        return [
            *("--text", self.text, "--model", MODEL, "--profile", self.profile, "--layer", str(self.layer)),
            *("--strength", str(self.strength), "--blend", str(self.blend), "--rank", "full"),
            # The anchor that these settings were calibrated with.
            *("--anchor", "concept"),
        ]


OPERATORS = (
    Operator("golden-gate-published", "published", "The Golden Gate Bridge in San", "golden", 21, 0.55, 0.0),
    Operator("golden-gate", "best setting", "The Golden Gate Bridge in San Francisco", "residual", 15, 0.4, 0.5),
)
LENS = ("--layer", "21", "--positions", "first", "--quick")
WORD = "bridge"
console = Console(highlight=False, width=min(Console().width, 132) if sys.stdout.isatty() else 120)


def main() -> None:
    """Runs the demo; exits non-zero with one line when a step fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", help="file for step 4 as a picture")
    picture = parser.parse_args().svg
    started = time.monotonic()
    _step(f"1  model {MODEL}")
    _run(sys.executable, "-m", "operators.model", MODEL)
    _step("2  operators")
    for operator in OPERATORS:
        if _is_built(operator):
            console.print(f"   {operator.name} is in {STORE} already", style="dim")
        else:
            _run(BIN / "steer-operators", "build", operator.name, *operator.options, "--store", STORE, "--replace")
    if _stored("lens") is not None:
        console.print(f"   lens is in {STORE} already", style="dim")
    else:
        _run(BIN / "steer-operators", "lens", "--model", MODEL, *LENS, "--store", STORE)
    _step("3  server, in a process of its own")
    with _server() as target, SteerClient(target) as client:
        info = client.model_info()
        console.print(f"   {info.model} on {info.engine}, {info.dtype}, {info.device}, at {target}", style="dim")
        _step("4  normal and steered, in one batch")
        console.print(
            "   published: the paper's operator.  best setting: one blended with the concept's own hidden state.\n"
            f"   word: no text at all, the lens pushes the first token towards {WORD!r}, by its own dose curve.\n"
            "   dose: size of the push over that of the hidden state.  KL: nats per token, from the plain model.\n"
            "   perplexity: of the text, under the plain model.",
            style="dim",
        )
        console.record = picture is not None
        for prompt in PROMPTS:
            arms: dict[str, list[OperatorUse]] = {
                operator.column: [OperatorUse(operator.name)] for operator in OPERATORS
            }
            arms[f"word: {WORD}"] = [Word(WORD)]
            try:
                _show(prompt, client.compare(prompt, arms=arms, sampling=SAMPLING))
            except SteerError as error:
                sys.exit(f"demo: {error} (to begin anew, remove .demo)")
    if picture is not None:
        svg = console.export_svg(title="steering operators: one prompt, four arms, one batch")
        # Without the web fonts that rich refers to: a picture must not load anything from another host.
        Path(picture).write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))
        console.record = False
    console.print(f"\nThe server has stopped; {time.monotonic() - started:.0f} s in all. Your turn, in two terminals:")
    console.print(f'  make serve ARGS="--store {STORE}"', style="bold")
    console.print(
        '  .venv/bin/steer ab "My dream holiday is" --operator golden-gate --repetition-penalty 1.2', style="bold"
    )


def _step(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def _run(*command: str | Path) -> None:
    arguments = [str(argument) for argument in command]
    program, *rest = arguments
    quoted = [Path(program).name, *(json.dumps(argument) if " " in argument else argument for argument in rest)]
    console.print(f"   $ {' '.join(quoted)}", style="dim", soft_wrap=True)
    if subprocess.run(arguments, check=False).returncode != 0:
        sys.exit(f"demo: this step failed: {' '.join(arguments)}")


def _stored(name: str) -> Any:
    """What the store says of an operator; None where it has none of that name."""
    command: list[str | Path] = [BIN / "steer-operators", "show", name, "--store", STORE, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def _is_built(operator: Operator) -> bool:
    stored = _stored(operator.name)
    if stored is None:
        return False
    recommended = stored["recommended"]
    expected = (operator.text, operator.profile, operator.layer, operator.strength, operator.blend)
    return expected == (
        *(stored["concept"], stored["profile"], stored["layer"]),
        *(recommended["strength"], recommended["blend"]),
    )


@contextmanager
def _server() -> Iterator[str]:
    command: list[str | Path] = [BIN / "steer-server", "--model", MODEL, "--store", STORE, "--listen", "127.0.0.1:0"]
    log = STORE.parent / "server.log"
    with log.open("w+") as file:
        process = subprocess.Popen([*command, "--log-format", "json"], stderr=file)
        try:
            with console.status("   loading the model"):
                target = _address(process, log)
            yield target
        finally:
            process.terminate()
            try:
                code = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    if code != 0:
        sys.exit(f"demo: the server ended with exit code {code}; its log is {log}")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r'"listen": "([^"]+)".*"event": "serving"', log.read_text()):
            return found[1]
        time.sleep(0.1)
    sys.exit(f"demo: the server did not start:\n{log.read_text()}")


def _show(prompt: str, result: ABResult) -> None:
    console.print(_texts(prompt, result))
    console.print(_receipts(result))


def _texts(prompt: str, result: ABResult) -> Table:
    columns = Table.grid(expand=True, padding=(0, 0))
    names = ["normal", *result.steered]
    for _ in names:
        columns.add_column(ratio=1)
    texts = [result.normal.text, *(arm.generation.text for arm in result.steered.values())]
    styles = ["white", *["green"] * len(result.steered)]
    columns.add_row(
        *(
            Panel(f"[dim]{prompt}[/]{text.rstrip()}", title=name, border_style=style, height=9)
            for name, text, style in zip(names, texts, styles, strict=True)
        )
    )
    return columns


def _receipts(result: ABResult) -> Table:
    receipts = Table(box=None, padding=(0, 1), header_style="dim")
    for title in ("arm", "receipt", "block", "λ", "β", "tokens steered", "dose", "KL", "perplexity"):
        receipts.add_column(title, no_wrap=True, min_width=len(title))
    plain = f"{next(iter(result.steered.values())).normal_perplexity:.1f}"
    receipts.add_row("normal", "", "", "", "", "", "", "", plain)
    for name, arm in result.steered.items():
        receipt = arm.generation.receipts[0]
        assert arm.kl is not None  # scored by default
        receipts.add_row(
            f"[green]{name}[/]",
            f"✓ {receipt.digest.removeprefix('sha256:')[:8]}",
            str(receipt.layer),
            f"{receipt.strength:g}",
            f"{receipt.blend:g}",
            f"{receipt.prompt_tokens_steered} prompt + {receipt.generated_tokens_steered}",
            f"{receipt.mean_dose:.3f}",
            f"{arm.kl.mean:.2f}",
            f"{arm.steered_perplexity:.1f}",
        )
    return receipts


if __name__ == "__main__":
    main()
