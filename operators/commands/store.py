"""``list``, ``show``, ``verify`` and ``delete``: the operators in a store. All but ``verify`` and
``show --reads`` do without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    AttentionOption,
    JsonOption,
    NameArgument,
    StoreOption,
    default_device,
    open_store,
)
from operators.core.errors import OperatorError, VectorError
from operators.core.file_format import FileHeader
from operators.core.header import AttentionName
from operators.core.store import Store

if TYPE_CHECKING:
    from operators.analyse.operator_reads import OperatorReads
    from operators.core.artifact import OperatorArtifact

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
        lines = describe.list_lines(entries) or [f"no operators in {store.path}"]
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
    texts: Annotated[
        Path | None,
        typer.Option(help="Of a lens: its neutral texts (default: those that ship).", show_default=False),
    ] = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file; load no model.")] = False,
    attention: AttentionOption = None,
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
        if not file_only and artifact.header.lens is not None:
            found, said = _verify_lens(artifact, model, texts, attention)
            answer, line = {**answer, **found}, line + said
        elif not file_only and artifact.header.vector is not None:
            found, said = _verify_vector(artifact, model, positive, negative, attention)
            answer, line = {**answer, **found}, line + said
        elif positive is not None:
            raise VectorError(f"operator {name!r} is no contrast, so that no texts can be compared with it")
        elif not file_only:
            from operators.builder.verify import verify_operator
            from operators.model.loading import load_model

            header = artifact.header
            loaded = load_model(
                model or header.model, dtype=header.model_dtype, device=default_device(), attention=attention
            )
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


def _verify_lens(
    artifact: OperatorArtifact, model: str | None, texts: Path | None, attention: AttentionName | None
) -> tuple[dict[str, Any], str]:
    """Products of a lens, computed anew: for JSON and for a person."""
    from operators.core.neutral_texts import neutral_texts
    from operators.lens.verify import verify_lens
    from operators.model.loading import load_model
    from operators.model.unembedding import find_unembedding
    from operators.vectors.contrast import read_texts

    header = artifact.header
    assert header.lens is not None  # noqa: S101 - for the type checker
    # The shipped texts, or the first of them, as the lens was built with --quick.
    neutral = neutral_texts()[: header.lens.texts] if texts is None else read_texts(texts).texts
    name = model or header.model
    loaded = load_model(name, dtype=header.model_dtype, device=default_device(), attention=attention)
    error = verify_lens(artifact, loaded, neutral, find_unembedding(name))
    return {
        "model": loaded.name,
        "lens_error": error,
    }, f" and fits {loaded.name}: computed anew, it is off by {error:.1e}"


def _verify_vector(
    artifact: OperatorArtifact,
    model: str | None,
    positive: Path | None,
    negative: Path | None,
    attention: AttentionName | None,
) -> tuple[dict[str, Any], str]:
    """What can be said of a vector beyond its file, for JSON and for a person."""
    from operators.builder.verify import check_compatible
    from operators.model.loading import load_model
    from operators.vectors.contrast import check_contrast, read_texts

    header = artifact.header
    texts = None if positive is None or negative is None else (read_texts(positive), read_texts(negative))
    loaded = load_model(model or header.model, dtype=header.model_dtype, device=default_device(), attention=attention)
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
