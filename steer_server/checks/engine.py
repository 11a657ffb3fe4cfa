"""Whether the engine can be had, with the options that it is to be given."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.engine.vllm.options import check_engine_args
from steer_server.engines import REFUSALS
from steer_server.errors import StartupError


def check_engine(config: ServerConfig) -> Iterator[Finding]:
    """One finding. Imports the engine; starts none of its processes."""
    try:
        REFUSALS[config.engine](config)
        if config.engine_args:
            from steer_server.engine.vllm.engine_config import known_engine_args

            check_engine_args(config.engine_args, known_engine_args())
    except StartupError as error:
        yield Finding("problem", "engine", str(error))
        return
    options = f" with {len(config.engine_args)} options of its own" if config.engine_args else ""
    yield Finding("ok", "engine", f"{config.engine} can be used{options}")
