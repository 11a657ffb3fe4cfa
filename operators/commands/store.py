"""``list``, ``show``, ``verify`` and ``delete``: looking after the operators that are there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from operators.commands import _output as report
from operators.commands._options import JsonOption, NameArgument, StoreOption, device_or_default, open_store
from operators.core.errors import OperatorError


def list_operators(store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the operators in the store, broken ones with what is wrong with them."""
    with report.reporting(as_json):
        store = open_store(store_path)
        entries: list[dict[str, Any]] = []
        for name in store.names():
            try:
                entries.append(report.described(name, store.path_of(name), store.load(name)))
            except OperatorError as error:
                entries.append({"name": name, "problem": report.problem(error)})
        lines = report.list_lines(entries) or [f"no operators in {store.path}"]
        report.tell({"store": str(store.path), "operators": entries}, lines, as_json=as_json)


def show(name: NameArgument, store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show everything about one operator but its numbers."""
    with report.reporting(as_json):
        store = open_store(store_path)
        artifact = store.load(name)
        header = artifact.header
        answer = report.described(name, store.path_of(name), artifact)
        lines = report.operator_lines(
            answer,
            rules=header.rule_set,
            fingerprints=f"model {header.model_fingerprint}, tokenizer {header.tokenizer_fingerprint}",
            created=f"{header.created.isoformat()} by version {header.builder_version}",
        )
        report.tell(answer, lines, as_json=as_json)


def verify(
    name: NameArgument,
    model: Annotated[
        str | None,
        typer.Option(help="Model to check against (default: the one it was built on).", show_default=False),
    ] = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file; load no model.")] = False,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an operator's file, then hold it against its model."""
    with report.reporting(as_json):
        artifact = open_store(store_path).load(name)
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


def delete(name: NameArgument, store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove an operator from the store."""
    with report.reporting(as_json):
        store = open_store(store_path)
        store.delete(name)
        report.tell({"deleted": name, "store": str(store.path)}, [f"{name}: deleted"], as_json=as_json)
