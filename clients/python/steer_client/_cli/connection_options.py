"""Which server a command asks, and how it shows who is calling: the same options for every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import steer_client
from steer_client._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT

_CONNECTION = "Connection and output"
_ACCESS = "TLS and token"


def _checked_target(target: str) -> str:
    # Imported here because it imports gRPC, and the commands' help does without.
    from steer_client._channel import target_or_default

    try:
        return target_or_default(target)
    except steer_client.InvalidRequestError as error:
        raise typer.BadParameter(error.message, param_hint="'--target'") from None


# typer reads these annotations at run time.
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="HOST:PORT",
        envvar="STEER_TARGET",
        help="Where the server listens; several are ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT.",
        show_default=True,
        callback=_checked_target,
        rich_help_panel=_CONNECTION,
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up after so long.", rich_help_panel=_CONNECTION),
]
NoRetryOption = Annotated[
    bool,
    typer.Option(
        "--no-retry",
        help="Fail at once where the server is busy, in place of trying again when it says.",
        rich_help_panel=_CONNECTION,
    ),
]
# Without typer's `envvar`: the SDK reads the environment, by one rule for what goes with what.
TLSOption = Annotated[
    bool | None,
    typer.Option(
        "--tls/--no-tls",
        help="Speak TLS; so does each of the files below. Default: STEER_TLS.",
        show_default=False,
        rich_help_panel=_ACCESS,
    ),
]
CAOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        help="Who may have signed the server's certificate, in PEM. Default: STEER_CA, or the public authorities.",
        rich_help_panel=_ACCESS,
    ),
]
CertOption = Annotated[
    Path | None,
    typer.Option(
        "--cert",
        metavar="FILE",
        help="Your own certificate, in PEM, for a server that asks for one. Default: STEER_CERT.",
        rich_help_panel=_ACCESS,
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="Its private key. Default: STEER_KEY.", rich_help_panel=_ACCESS),
]
ServerNameOption = Annotated[
    str | None,
    typer.Option(
        "--server-name",
        metavar="NAME",
        help="The name in the server's certificate, where it is not the target's host.",
        rich_help_panel=_ACCESS,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="A file that has your token. Default: the token in STEER_TOKEN, or the file STEER_TOKEN_FILE.",
        rich_help_panel=_ACCESS,
    ),
]
MetadataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="KEY=VALUE",
        help="Send this with every call, for a proxy. May be repeated; others on this machine can read it with ps.",
        rich_help_panel=_ACCESS,
    ),
]
InsecureTokenOption = Annotated[
    bool,
    typer.Option(
        "--insecure-token",
        help="Send the token without TLS, to another machine too: everybody on the way can read it.",
        rich_help_panel=_ACCESS,
    ),
]


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Which server answers, within what time, and who is asking."""

    target: TargetOption = DEFAULT_TARGET
    timeout: TimeoutOption = DEFAULT_TIMEOUT
    no_retry: NoRetryOption = False
    tls: TLSOption = None
    ca: CAOption = None
    cert: CertOption = None
    key: KeyOption = None
    server_name: ServerNameOption = None
    token_file: TokenFileOption = None
    metadata: MetadataOption = None
    insecure_token: InsecureTokenOption = False

    def client(self) -> steer_client.SteerClient:
        """Raises InvalidRequestError for options that do not go together; a --metadata without = is a usage error."""
        return steer_client.SteerClient(
            self.target,
            timeout=self.timeout,
            retry=not self.no_retry,
            tls=self.tls,
            ca=self.ca,
            cert=self.cert,
            key=self.key,
            server_name=self.server_name,
            token_file=self.token_file,
            metadata=_metadata(self.metadata or ()),
            insecure_token=self.insecure_token,
        )


def _metadata(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, text in enumerate(texts, 1):
        key, equals, value = text.partition("=")
        if not equals or key in found:
            # Not shown: it may be a secret.
            problem = f"{key!r} is given twice" if equals else f"number {place} is not KEY=VALUE"
            raise typer.BadParameter(problem, param_hint="'--metadata'")
        found[key] = value
    return found
