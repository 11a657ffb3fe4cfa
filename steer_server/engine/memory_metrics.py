"""How much of its memory an engine has given out, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. Filled by the engine."""

    used: Callable[[], int]
    """Any thread may ask."""
    limit: int


class MemoryCollector(Collector):
    """One series for each purpose: a few, which the engine names."""

    def __init__(self, purposes: Mapping[str, MemoryUse]) -> None:
        self._purposes = purposes

    def collect(self) -> Iterable[Metric]:
        """Read when the metrics are."""
        used = GaugeMetricFamily("steer_memory_bytes", "Memory that is given out, by purpose", labels=["purpose"])
        limit = GaugeMetricFamily("steer_memory_limit_bytes", "Most that may be, by purpose", labels=["purpose"])
        for purpose, use in self._purposes.items():
            used.add_metric([purpose], use.used())
            limit.add_metric([purpose], use.limit)
        yield used
        yield limit
