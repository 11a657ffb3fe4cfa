"""Real servers in processes of their own, on a tiny random model that starts fast."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from steer_client import SteerClient
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.artifact import OperatorArtifact, make_artifact
from operators.core.defaults import PUBLISHED
from operators.core.header import Recommended
from operators.core.store import Store
from operators.model.loading import LoadedModel, load_model

BIN = Path(sys.executable).parent
CONTEXT = 4096
_SERVING = re.compile(r"serving\s.*listen=(\S+)")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Running:
    """One server process."""

    process: subprocess.Popen[str]
    metrics: str
    target: str = ""
    log: list[str] = field(default_factory=list)
    _serving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            found = _SERVING.search(line)
            if found:
                self.target = found[1]
                self._serving.set()
        # Nothing more can come: whoever waits for the line waits in vain.
        self._serving.set()

    def wait_until_serving(self, timeout: float) -> None:
        """Returns when the server says where it listens."""
        self._serving.wait(timeout)
        assert self.target, "the server did not start:\n" + "\n".join(self.log)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Asks the process to stop."""
        self.process.send_signal(number)

    def exit_code(self, timeout: float) -> int:
        """The exit status of a process that is stopping."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def sample(self, name: str, **labels: str) -> float:
        """A metric as it is now, summed over the series that have these labels."""
        with _DIRECT.open(f"http://{self.metrics}/metrics", timeout=10) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def jobs(self) -> tuple[float, float]:
        """Jobs running and jobs waiting."""
        return self.sample("steer_jobs_running"), self.sample("steer_jobs_waiting")

    def wait_for_jobs(self, running: float, waiting: float, timeout: float = 3.0) -> None:
        """Returns when so many run and wait; fails when that takes too long."""
        end = time.monotonic() + timeout
        while (found := self.jobs()) != (running, waiting):
            assert time.monotonic() < end, f"running and waiting: {found}, not {(running, waiting)}"
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    return _free_port()


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """``free_ports(n)``: so many ports of this machine that nothing listens on."""
    return lambda count: [_free_port() for _ in range(count)]


@contextmanager
def _start(
    *arguments: str, model: str | Path, metrics: bool = False, threads: int | None = None, timeout: float = 120.0
) -> Iterator[Running]:
    command = [BIN / "steer-server", "--model", model, "--listen", "127.0.0.1:0", *arguments]
    port = _free_port() if metrics else 0
    if metrics:
        command += ["--metrics-port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEER_")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A process group that can be signalled without these tests.
        start_new_session=True,
    )
    running = Running(process, f"127.0.0.1:{port}" if metrics else "")
    try:
        running.wait_until_serving(timeout)
        yield running
    finally:
        # vLLM's processes notice by themselves that the server was killed; the next test wants their memory at once.
        children = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(10)


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[Running]]:
    """``with start_server(*options, model=..., metrics=False, threads=None) as server:`` - killed at the end."""
    return _start


@pytest.fixture(scope="session")
def start_tiny(tiny_model: Path, tiny_store: Path) -> Callable[..., AbstractContextManager[Running]]:
    """``with start_tiny(*options) as server:`` - on the tiny model, whose steps are too small for two threads."""
    return lambda *options: _start("--store", str(tiny_store), *options, model=tiny_model, metrics=True, threads=1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with a long context and a chat template, in a directory as users have theirs."""
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> LoadedModel:
    """That model in this process."""
    return load_model(str(tiny_model), dtype="float32")


@pytest.fixture(scope="session")
def golden(loaded: LoadedModel) -> OperatorArtifact:
    """An operator of that model."""
    concept = concept_from_text("golden gate", loaded)
    return build_operator(BuildSpec((concept,), layer=2, recommended=Recommended(strength=0.6)), loaded)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, golden: OperatorArtifact, loaded: LoadedModel) -> Path:
    """A store with the operators ``golden`` and ``dress``."""
    directory = tmp_path_factory.mktemp("store")
    Store(directory).save("golden", golden)
    dress = build_operator(
        BuildSpec((concept_from_text("wedding dress", loaded),), layer=3, recommended=PUBLISHED), loaded
    )
    Store(directory).save("dress", dress)
    return directory


@pytest.fixture(scope="session")
def server(start_tiny: Callable[..., AbstractContextManager[Running]]) -> Iterator[Running]:
    """The server that most tests share: 8 may wait."""
    with start_tiny("--max-queue", "8") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[SteerClient]:
    """A client of the shared server."""
    with SteerClient(server.target, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def remake() -> Callable[..., OperatorArtifact]:
    """``remake(artifact, **header)``: an operator of its first ``hidden_size`` dimensions under a changed header."""

    def make(artifact: OperatorArtifact, **fields: object) -> OperatorArtifact:
        header = artifact.header.model_copy(update=fields)
        d = header.hidden_size
        cut = replace(artifact, factors=artifact.factors[:, :d, :d])
        return make_artifact(
            header, cut.factors, artifact.anchor[:d], artifact.substitute_base[:d], neutral=artifact.neutral[:d]
        )

    return make


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser without a screen; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
