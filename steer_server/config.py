"""Settings of a server: one field each, from which its flag, environment variable, key in a file, line of
``steer-server config`` and row of ``docs/CONFIGURATION.md`` are made.

A field needs a default, a docstring (help and table show it) and a :class:`Shown`. Where a value comes from is the
business of ``configuration/``: this class reads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from operators.core.capacity import parse_bytes
from operators.core.errors import BuildError
from operators.core.numbers import read_decimal, read_whole

OPERATOR_MEMORY = 4 << 30
"""Default of the memory for operators, in bytes."""
MAX_RUNNING = 16
"""Default of the requests that are decoded at once."""
MAX_PORT = 65535
PREFIX = "STEER_"
"""Of the variables in the environment."""


@dataclass(frozen=True)
class Shown:
    """How a setting is shown to people.

    ``unit``: of its value; it is the flag's placeholder too, unless ``metavar`` is. ``default``: in words, where the
    value itself does not say it, such as None. ``flag``: where it is not the field's name.
    """

    unit: str = ""
    default: str = ""
    metavar: str = ""
    flag: str = ""


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


_Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
_Seconds = Shown("seconds")


def _check_admin_listen(value: str | None) -> str | None:
    return None if value is None else _check_listen(value)


class ServerConfig(BaseModel):
    """Everything that can be set, checked once at start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: object, info: ValidationInfo) -> object:
        """Of a flag, a variable, or a text in a file: pydantic takes 0_4 for 4, as Python does."""
        field = cls.model_fields[info.field_name or ""]
        is_size = any(isinstance(each, BeforeValidator) for each in field.metadata)
        kinds = get_args(field.annotation) or (field.annotation,)
        if isinstance(value, str) and not is_size and (int in kinds or float in kinds):
            try:
                (read_decimal if float in kinds else read_whole)(value)
            except ValueError:
                kind = "number" if float in kinds else "whole number"
                raise ValueError(f"is {value[:80]!r}; a {kind} in decimal digits is accepted") from None
        return value

    model: str = "smollm2-135m"
    """Built-in name, local directory, GGUF file or Hugging Face id."""
    engine: Literal["hf", "vllm"] = "hf"
    """hf: transformers, in this process. vllm: continuous batching, several devices."""
    engine_args: Annotated[dict[str, Any], Shown(metavar="KEY=VALUE|FILE.yaml")] = Field(default_factory=dict)
    """Options of vLLM, such as max_model_len=4096 or tensor_parallel_size=2; the flag may be given several times. A
    JSON object in the environment, a table in a file."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Shown(default="float32 on CPU, bfloat16 on CUDA")] = None
    """Of the model's weights and hidden states."""
    device: Annotated[Literal["cpu", "cuda"] | None, Shown(default="cuda where there is one")] = None
    """What the model runs on."""
    attention: Annotated[
        Literal["sdpa", "eager"] | None, Shown(default="sdpa, or eager where the model's own does more")
    ] = None
    """Of the engine hf."""
    store: Annotated[Path | None, Shown(default="the user's data directory")] = None
    """Directory of operators."""
    listen: Annotated[str, AfterValidator(_check_listen), Shown(metavar="HOST:PORT")] = "127.0.0.1:50051"
    """Where gRPC is served; port 0 takes a free one."""
    metrics_host: Annotated[str, Shown(metavar="HOST")] = "127.0.0.1"
    """Where the metrics are served."""
    metrics_port: Annotated[_Port, Shown(metavar="PORT")] = 0
    """Prometheus and health over HTTP; 0 is off."""
    http_host: Annotated[str, Shown(metavar="HOST")] = "127.0.0.1"
    """Where HTTP is served."""
    http_port: Annotated[_Port, Shown(metavar="PORT")] = 0
    """The page, OpenAI's API and the contract as JSON, over HTTP; 0 is off."""
    http_names: Annotated[tuple[str, ...], Shown(metavar="NAME", flag="--http-name")] = ()
    """Of this machine, under which HTTP may be asked beside its addresses and localhost; the flag may be given several
    times. A JSON list in the environment."""
    max_queue: Annotated[int, Shown("requests")] = Field(default=32, ge=1)
    """Requests that may wait while others are decoded, those included that are decoded and not read; a quarter as many
    more from clients that have none of either."""
    max_running: Annotated[int, Shown("requests")] = Field(default=MAX_RUNNING, ge=1)
    """hf: requests that are decoded at once, in turns; a quarter of them, but one at least, may be one client's."""
    max_tokens: Annotated[int | None, Shown("tokens", "what the context holds")] = Field(default=None, ge=1)
    """Most that a request may ask for in a text."""
    max_total_tokens: Annotated[int | None, Shown("tokens", "no limit")] = Field(default=None, ge=1)
    """Most that a request may ask for in all of its texts together."""
    max_time: Annotated[float | None, Shown("seconds", "no limit")] = Field(default=None, gt=0, allow_inf_nan=False)
    """What a request may take, waiting included: a time limit may not be longer, and without one it is that."""
    max_calls: Annotated[int, Shown("calls")] = Field(default=1024, ge=1)
    """Calls under way at once, whatever they wait for; more are refused at once, with a hint when to try again."""
    max_calls_per_connection: Annotated[int, Shown("calls")] = Field(default=1024, ge=1)
    """More calls of one client wait on its side."""
    max_connections: Annotated[int, Shown("connections")] = Field(default=1024, ge=1)
    """Of clients. More are not let in, nor are more than the limit of open files has room for."""
    connection_idle: Annotated[float, _Seconds] = Field(default=300.0, gt=0, le=1e6)
    """After which a connection without a call is closed; clients connect again by themselves."""
    connection_age: Annotated[float, _Seconds] = Field(default=3600.0, gt=0, le=1e6)
    """After which a connection takes no more calls, so that clients spread over servers that were added."""
    client_patience: Annotated[float, _Seconds] = Field(default=30.0, gt=0, le=1e6)
    """What a client may take to send a request, or to take the next piece of its answer."""
    max_arms: Annotated[int, Shown("arms")] = Field(default=16, ge=1)
    """Steered arms of one comparison: they share a batch."""
    max_dose: Annotated[float, Shown("|λ|/2")] = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Most that the |λ|/2 of a request's operators at one layer may add up to."""
    max_artifact_bytes: Annotated[int, BeforeValidator(_parse_size), Shown("bytes", metavar="SIZE")] = Field(
        default=4 << 30, ge=1
    )
    """Larger files in the store are not read; bytes, or a size such as 4GiB."""
    operator_admin: bool = False
    """Lets clients upload, build, load, unload and delete operators."""
    max_served_bytes: Annotated[int, BeforeValidator(_parse_size), Shown("bytes", metavar="SIZE")] = Field(
        default=8 << 30, ge=1
    )
    """Of memory, beyond which clients bring no operator into service; bytes, or a size such as 8GiB."""
    max_uploads: Annotated[int, Shown("uploads")] = Field(default=4, ge=1)
    """Unfinished ones at once."""
    max_upload_bytes: Annotated[int, BeforeValidator(_parse_size), Shown("bytes", metavar="SIZE")] = Field(
        default=8 << 30, ge=1
    )
    """What unfinished uploads may take of the store's disk together; bytes, or a size such as 8GiB."""
    upload_age: Annotated[float, _Seconds] = Field(default=3600.0, gt=0, le=1e6)
    """For which an unfinished upload is kept of which nothing comes."""
    max_builds: Annotated[int, Shown("builds")] = Field(default=1, ge=1)
    """Of operators, at once, each in a process of its own."""
    max_waiting_builds: Annotated[int, Shown("builds")] = Field(default=8, ge=1)
    """More are refused, with a hint when to try again."""
    build_memory: Annotated[int, BeforeValidator(_parse_size), Shown("bytes", metavar="SIZE")] = Field(
        default=4 << 30, ge=256 << 20
    )
    """What the process of a build may take, the model included; bytes, or a size such as 4GiB."""
    build_time: Annotated[float, _Seconds] = Field(default=3600.0, gt=0, le=1e6)
    """What a build may take."""
    build_threads: Annotated[int, Shown("threads")] = Field(default=1, ge=1)
    """Of a build, which runs on the CPU at a low priority."""
    operator_memory: Annotated[int, BeforeValidator(_parse_size), Shown("bytes", metavar="SIZE")] = Field(
        default=OPERATOR_MEMORY, ge=1 << 20
    )
    """For operators beside the model; bytes, or a size such as 4GiB. vllm: upper bound of what operators take in each
    worker, beside vLLM's own memory; a request that needs more than is left is refused. hf: what is kept between
    requests."""
    decode_memory: Annotated[
        int | None, BeforeValidator(_parse_size), Shown("bytes", "half of what is free", metavar="SIZE")
    ] = Field(default=None, ge=1 << 20)
    """hf: bytes, or a size such as 4GiB, that the KV caches and logits of running requests may take; a request waits
    until there is room, and one that needs more is refused."""
    traces: bool = False
    """Traces calls for OpenTelemetry, and sends that as its own OTEL_EXPORTER_OTLP_ENDPOINT and others say."""
    drain_delay: Annotated[float, _Seconds] = Field(default=0.0, ge=0, le=1e6)
    """For which a server that is stopped says that it does not serve and yet takes new calls, so that load balancers
    hear of it first; it is not part of the grace."""
    grace: Annotated[float, _Seconds] = Field(default=10.0, ge=0)
    """What running requests get when the server is stopped."""
    tokens: Annotated[Path | None, Shown(default="nobody needs one")] = None
    """File of tokens, and what each may do."""
    tls_cert: Annotated[Path | None, Shown(default="no TLS")] = None
    """Certificate of this server in PEM, and behind it those that lead to an authority."""
    tls_key: Annotated[Path | None, Shown(default="no TLS")] = None
    """Its key in PEM, without a password."""
    tls_client_ca: Annotated[Path | None, Shown(default="they need none")] = None
    """Authority in PEM: clients must then show a certificate that it signed."""
    admin_listen: Annotated[
        str | None, AfterValidator(_check_admin_listen), Shown(metavar="HOST:PORT", default="where all others are")
    ] = None
    """Where calls that change the server are served, and nothing else of the contract; other listeners refuse them."""
    insecure: bool = False
    """Serves an address that others can reach without TLS and tokens."""
    log_format: Literal["console", "json"] = "console"
    """Of the log on standard error."""


def shown(name: str) -> Shown:
    """What is said beside the field ``name``."""
    found = (item for item in ServerConfig.model_fields[name].metadata if isinstance(item, Shown))
    return next(found, Shown())


def flag(name: str) -> str:
    """``max_queue`` -> ``--max-queue``."""
    return shown(name).flag or f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """``max_queue`` -> ``STEER_MAX_QUEUE``."""
    return PREFIX + name.upper()
