"""Settings of a server. The command line overrides the environment (``STEER_*``), which overrides these defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from operators.core.capacity import parse_bytes
from operators.core.errors import BuildError

OPERATOR_MEMORY = 4 << 30
"""Default of the memory for operators, in bytes."""
MAX_RUNNING = 16
"""Default of the requests that are decoded at once."""
MAX_PORT = 65535


def _parse_size(value: object) -> object:
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except BuildError as error:
        raise ValueError(str(error)) from error


def _check_listen(value: str) -> str:
    address = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):([0-9]{1,5})", value)
    if address is None or int(address[2]) > MAX_PORT:
        raise ValueError(
            f"is {value!r}; HOST:PORT such as 127.0.0.1:50051 or [::1]:0 is accepted, port 0 to {MAX_PORT}"
        )
    return value


class ServerConfig(BaseSettings):
    """Everything that can be set, checked once at start."""

    model_config = SettingsConfigDict(env_prefix="STEER_", env_ignore_empty=True, frozen=True, extra="forbid")

    model: str = "smollm2-135m"
    engine: Literal["hf", "vllm"] = "hf"
    """hf: transformers, in this process. vllm: continuous batching, several devices."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Options of vLLM, by their Python names; in the environment as JSON."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """None: float32 on CPU, bfloat16 on CUDA."""
    device: Literal["cpu", "cuda"] | None = None
    """None: CUDA where there is one."""
    attention: Literal["sdpa", "eager"] | None = None
    """Of the engine hf. None: sdpa where that is the same as the model's own attention."""
    store: Path | None = None
    """None: the user's data directory."""
    listen: Annotated[str, AfterValidator(_check_listen)] = "127.0.0.1:50051"
    """HOST:PORT; port 0 takes a free one."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=MAX_PORT)
    """Prometheus over HTTP; 0 is off."""
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=MAX_PORT)
    """OpenAI's API and the contract as JSON, over HTTP; 0 is off."""
    http_names: tuple[str, ...] = ()
    """Of this machine, under which HTTP may be asked beside its addresses and localhost; in the environment as JSON."""
    max_queue: int = Field(default=32, ge=1)
    """Requests that may wait while others are decoded, those included that are decoded and not read; a quarter as many
    more from clients that have none of either."""
    max_running: int = Field(default=MAX_RUNNING, ge=1)
    """hf: requests that are decoded at once, in turns; a quarter of them, but one at least, may be one client's."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most that a request may ask for in a text; None: what the context holds."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Most that a request may ask for in all of its texts together."""
    max_time: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that a request may take, waiting included: a time limit may not be longer, and without one it is that."""
    max_calls: int = Field(default=1024, ge=1)
    """Calls under way at once, whatever they wait for; more are refused at once, with a hint when to try again."""
    max_calls_per_connection: int = Field(default=1024, ge=1)
    """More calls of one client wait on its side."""
    max_connections: int = Field(default=1024, ge=1)
    """Of clients. More are not let in, nor are more than the limit of open files has room for."""
    connection_idle: float = Field(default=300.0, gt=0, le=1e6)
    """Seconds after which a connection without a call is closed; clients connect again by themselves."""
    connection_age: float = Field(default=3600.0, gt=0, le=1e6)
    """Seconds after which a connection takes no more calls, so that clients spread over servers that were added."""
    client_patience: float = Field(default=30.0, gt=0, le=1e6)
    """Seconds that a client may take to send a request, or to take the next piece of its answer."""
    max_arms: int = Field(default=16, ge=1)
    """Steered arms of one comparison: they share a batch."""
    max_dose: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Most that the doses |strength|/2 of a request's operators at one layer may add up to."""
    max_artifact_bytes: int = Field(default=4 << 30, ge=1)
    """Larger files in the store are not read."""
    operator_admin: bool = False
    """Whether operators may be uploaded, built, loaded, unloaded and deleted over the wire."""
    max_uploads: int = Field(default=4, ge=1)
    """Unfinished ones at once."""
    max_upload_bytes: Annotated[int, BeforeValidator(_parse_size)] = Field(default=8 << 30, ge=1)
    """Bytes, or a size such as 8GiB: what unfinished uploads may take of the store's disk together."""
    upload_age: float = Field(default=3600.0, gt=0, le=1e6)
    """Seconds that an unfinished upload is kept of which nothing comes."""
    max_builds: int = Field(default=1, ge=1)
    """At once, each in a process of its own."""
    max_waiting_builds: int = Field(default=8, ge=1)
    build_memory: Annotated[int, BeforeValidator(_parse_size)] = Field(default=4 << 30, ge=256 << 20)
    """Bytes, or a size such as 4GiB, that a build's process may take, the model included."""
    build_time: float = Field(default=3600.0, gt=0, le=1e6)
    """Seconds that a build may take."""
    build_threads: int = Field(default=1, ge=1)
    """Of a build, which runs on the CPU at a low priority."""
    operator_memory: Annotated[int, BeforeValidator(_parse_size)] = Field(default=OPERATOR_MEMORY, ge=1 << 20)
    """Bytes, or a size such as 4GiB. vllm: upper bound of what operators take in each worker, beside vLLM's own memory;
    a request that needs more than is left is refused. hf: what is kept between requests."""
    decode_memory: Annotated[int | None, BeforeValidator(_parse_size)] = Field(default=None, ge=1 << 20)
    """hf: bytes, or a size such as 4GiB, that the KV caches and logits of running requests may take; a request waits
    until there is room, and one that needs more is refused. None: half of what is free when the model is loaded."""
    traces: bool = False
    """Whether calls are traced for OpenTelemetry, and sent as its own OTEL_... in the environment say."""
    grace: float = Field(default=10.0, ge=0)
    """Seconds that running requests get when the server is stopped."""
    tokens: Path | None = None
    """File of tokens, and what each may do. None: nobody needs one."""
    log_format: Literal["console", "json"] = "console"
