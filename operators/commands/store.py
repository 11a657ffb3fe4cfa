"""``list``, ``show``, ``verify`` and ``delete``: the operators in a store. All but ``verify`` and
``show --reads`` do without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    JsonOption,
    NameArgument,
    StoreOption,
    default_device,
    open_store,
)
from operators.core.errors import OperatorError, VectorError
from operators.core.file_format import FileHeader
from operators.core.store import Store

if TYPE_CHECKING:
    from operators.analyse.operator_reads import OperatorReads

_UNVERIFIED = "(as the file states; 'verify' checks it)"


def list_operators(store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the operators in the store, broken ones with what is wrong with them.

    Digests are as the files state them: their numbers are not read. 'verify' reads and checks them.
    """
    with output.exit_on_error(as_json):
        store = open_store(store_path)
        entries: list[dict[str, Any]] = []
        for name in store:
            try:
                entries.append(_unverified_json(store, name, store.read_header(name)))
            except OperatorError as error:
                entries.append({"name": name, "problem": output.error_json(error)})
        none = f"no operators in {store.path}" + ("" if store.path.exists() else ", which does not exist yet")
        lines = describe.list_lines(entries) or [none]
        output.print_answer({"store": str(store.path), "operators": entries}, lines, as_json=as_json)


def show(
    name: NameArgument,
    reads: Annotated[
        bool,
        typer.Option("--reads", help="Load the model, and show what the operator reads and what each token gives."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --reads: the model (default: the one it was built on).", show_default=False),
    ] = None,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything about one operator but its numbers; with --reads, what these read.

    Without --reads, the digest is as the file states it: the numbers are not read. 'verify' reads and checks them.
    """
    if model is not None and not reads:
        raise typer.BadParameter("--model goes with --reads: nothing else of 'show' needs a model")
    with output.exit_on_error(as_json):
        store = open_store(store_path)
        found = store.read_header(name)
        header = found.header
        answer = _unverified_json(store, name, found)
        further: list[str] = []
        if reads and header.lens:
            raise VectorError(f"{name!r} is a lens, which reads no text; operators with matrices are accepted")
        if reads and header.vector:
            raise VectorError(f"operator {name!r} is a vector, which reads nothing: it has no matrices")
        if reads:
            found_reads, tokens, digest = _read(name, model, store)
            # Its numbers were read.
            answer["digest_verified"] = digest == found.digest
            answer |= {"concept_tokens": tokens, "reads": found_reads.to_json()}
            further = found_reads.lines()
        lines = describe.operator_lines(
            answer if answer["digest_verified"] else {**answer, "digest": f"{found.digest} {_UNVERIFIED}"},
            **({} if header.vector else {"rules": header.rule_set}),
            fingerprints=f"model {header.model_fingerprint}, tokenizer {header.tokenizer_fingerprint}",
            created=f"{header.created.isoformat()} by version {header.builder_version}",
        )
        output.print_answer(answer, [*lines, *further], as_json=as_json)


def _read(name: str, model: str | None, store: Store) -> tuple[OperatorReads, list[str], str]:
    """What an operator reads, the tokens of its first text, and its digest, which was checked."""
    from operators.analyse.operator_reads import read_operator
    from operators.model.loading import load_model

    artifact = store.load(name)
    header = artifact.header
    loaded = load_model(model or header.model, dtype=header.model_dtype, device=default_device())
    found = read_operator(artifact, loaded)
    return found, [term.text for term in found.texts[0]], artifact.digest


def delete(name: NameArgument, store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove an operator from the store."""
    with output.exit_on_error(as_json):
        store = open_store(store_path)
        store.delete(name)
        output.print_answer({"deleted": name, "store": str(store.path)}, [f"{name}: deleted"], as_json=as_json)


def _unverified_json(store: Store, name: str, found: FileHeader) -> dict[str, Any]:
    return {**describe.operator_json(name, store.path_of(name), found), "digest_verified": False}
