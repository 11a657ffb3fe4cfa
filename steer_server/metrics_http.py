"""The metrics over HTTP, and the probes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from steer_server.lifecycle import Lifecycle
from steer_server.small_http import Answer, SmallHttp


def metrics_server(registry: CollectorRegistry, lifecycle: Lifecycle) -> SmallHttp:
    """Answers GET /metrics, and the probes."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    async def metrics(accepted: str) -> Answer:
        try:
            encode, kind = choose_encoder(accepted)
        except (TypeError, ValueError):
            # Of a version that is no number.
            encode, kind = choose_encoder("")
        # Beside the event loop: the engine's own collectors may have much to write. In a thread that nothing else uses:
        # whatever holds up a server, its metrics are there to show it.
        return "200 OK", kind, await asyncio.get_running_loop().run_in_executor(thread, encode, registry)

    return SmallHttp(lifecycle, {"/metrics": metrics})
