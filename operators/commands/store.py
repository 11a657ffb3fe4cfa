"""``list``, ``show``, ``verify`` and ``delete``: looking after the operators that are there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from operators.commands import _output as report
from operators.commands._options import AsJson, Name, Store, device_or_default, store_or_default
from operators.core.errors import OperatorError


def list_operators(store: Store = None, as_json: AsJson = False) -> None:
    """List the operators in the store, broken ones with what is wrong with them."""
    with report.reporting(as_json):
        from operators.core import store as shelf

        where = store_or_default(store)
        entries: list[dict[str, Any]] = []
        for name in shelf.names(where):
            try:
                entries.append(report.described(name, shelf.path_of(where, name), shelf.load(where, name)))
            except OperatorError as error:
                entries.append({"name": name, "problem": report.problem(error)})
        lines = report.list_lines(entries) or [f"no operators in {where}"]
        report.tell({"store": str(where), "operators": entries}, lines, as_json=as_json)


def show(name: Name, store: Store = None, as_json: AsJson = False) -> None:
    """Show everything about one operator but its numbers."""
    with report.reporting(as_json):
        from operators.core import store as shelf

        where = store_or_default(store)
        artifact = shelf.load(where, name)
        header = artifact.header
        answer = report.described(name, shelf.path_of(where, name), artifact)
        lines = report.operator_lines(
            answer,
            rules=header.rule_set,
            fingerprints=f"model {header.model_fingerprint}, tokenizer {header.tokenizer_fingerprint}",
            created=f"{header.created.isoformat()} by version {header.builder_version}",
        )
        report.tell(answer, lines, as_json=as_json)


def verify(
    name: Name,
    model: Annotated[
        str | None,
        typer.Option(help="Model to check against (default: the one it was built on).", show_default=False),
    ] = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file; load no model.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Check an operator's file, then hold it against its model."""
    with report.reporting(as_json):
        from operators.core import store as shelf

        artifact = shelf.load(store_or_default(store), name)
        answer: dict[str, Any] = {"name": name, "digest": artifact.digest, "file": "valid"}
        line = f"{name}: the file is valid ({artifact.digest})"
        if not file_only:
            from operators.builder.verify import verify_operator
            from operators.model.loading import load_model

            header = artifact.header
            loaded = load_model(model or header.model, dtype=header.model_dtype, device=device_or_default(None))
            error = verify_operator(artifact, loaded)
            answer |= {
                "model": loaded.name,
                "reconstruction_error": error,
                "reconstruction_error_at_build": header.reconstruction_error,
            }
            line += (
                f" and fits {loaded.name}: |sum J x - y| / |y| = {error:.2e} "
                f"({header.reconstruction_error:.2e} when it was built)"
            )
        report.tell(answer, [line], as_json=as_json)


def delete(name: Name, store: Store = None, as_json: AsJson = False) -> None:
    """Remove an operator from the store."""
    with report.reporting(as_json):
        from operators.core import store as shelf

        where = store_or_default(store)
        shelf.delete(where, name)
        report.tell({"deleted": name, "store": str(where)}, [f"{name}: deleted"], as_json=as_json)
