"""``list``, ``show``, ``verify`` and ``delete``: the operators in a store. All but ``verify`` do without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import JsonOption, NameArgument, StoreOption, default_device, open_store
from operators.core.errors import OperatorError, VectorError
from operators.core.file_format import FileHeader
from operators.core.store import Store

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact


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
        lines = describe.list_lines(entries) or [f"no operators in {store.path}"]
        output.print_answer({"store": str(store.path), "operators": entries}, lines, as_json=as_json)


def show(name: NameArgument, store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show everything about one operator but its numbers.

    The digest is as the file states it: the numbers are not read. 'verify' reads and checks them.
    """
    with output.exit_on_error(as_json):
        store = open_store(store_path)
        found = store.read_header(name)
        header = found.header
        answer = _unverified_json(store, name, found)
        lines = describe.operator_lines(
            {**answer, "digest": f"{found.digest} (as the file states; 'verify' checks it)"},
            **({} if header.vector else {"rules": header.rule_set}),
            fingerprints=f"model {header.model_fingerprint}, tokenizer {header.tokenizer_fingerprint}",
            created=f"{header.created.isoformat()} by version {header.builder_version}",
        )
        output.print_answer(answer, lines, as_json=as_json)


def verify(
    name: NameArgument,
    model: Annotated[
        str | None,
        typer.Option(help="Model to check against (default: the one it was built on).", show_default=False),
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(help="Of a contrast: its texts, to compute it anew.", show_default=False)
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Likewise.", show_default=False)] = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file; load no model.")] = False,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an operator's file, then hold it against its model.

    Of a vector, the model's fingerprints and sizes are compared; a contrast is computed anew where its texts are given.
    """
    with output.exit_on_error(as_json):
        artifact = open_store(store_path).load(name)
        answer: dict[str, Any] = {"name": name, "digest": artifact.digest, "file": "valid"}
        line = f"{name}: the file is valid ({artifact.digest})"
        if (positive is None) != (negative is None) or (file_only and positive is not None):
            raise VectorError("--positive and --negative go together, and not with --file-only")
        if not file_only and artifact.header.vector is not None:
            found, said = _verify_vector(artifact, model, positive, negative)
            answer, line = {**answer, **found}, line + said
        elif positive is not None:
            raise VectorError(f"operator {name!r} is no contrast, so that no texts can be compared with it")
        elif not file_only:
            from operators.builder.verify import verify_operator
            from operators.model.loading import load_model

            header = artifact.header
            loaded = load_model(model or header.model, dtype=header.model_dtype, device=default_device())
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
        output.print_answer(answer, [line], as_json=as_json)


def _verify_vector(
    artifact: OperatorArtifact, model: str | None, positive: Path | None, negative: Path | None
) -> tuple[dict[str, Any], str]:
    """What can be said of a vector beyond its file, for JSON and for a person."""
    from operators.builder.verify import check_compatible
    from operators.model.loading import load_model
    from operators.vectors.contrast import check_contrast, read_texts

    header = artifact.header
    texts = None if positive is None or negative is None else (read_texts(positive), read_texts(negative))
    loaded = load_model(model or header.model, dtype=header.model_dtype, device=default_device())
    check_compatible(header, loaded)
    fits = f" and fits {loaded.name}: fingerprints, depth and width; "
    if texts is None:
        return {"model": loaded.name, "vector_error": None}, fits + "a vector's numbers are not computed anew"
    error = check_contrast(artifact, *texts, loaded)
    return {"model": loaded.name, "vector_error": error}, f"{fits}computed anew from its texts it is off by {error:.1e}"


def delete(name: NameArgument, store_path: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove an operator from the store."""
    with output.exit_on_error(as_json):
        store = open_store(store_path)
        store.delete(name)
        output.print_answer({"deleted": name, "store": str(store.path)}, [f"{name}: deleted"], as_json=as_json)


def _unverified_json(store: Store, name: str, found: FileHeader) -> dict[str, Any]:
    return {**describe.operator_json(name, store.path_of(name), found), "digest_verified": False}
