"""Holding an operator in the store against its model, and signing one anew that an earlier version signed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from operators.commands import _output as output
from operators.commands._options import (
    AttentionOption,
    JsonOption,
    NameArgument,
    StoreOption,
    default_device,
    open_store,
)
from operators.core.errors import ReconstructionError, VectorError
from operators.core.header import AttentionName, OperatorHeader

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.model.loading import LoadedModel

_ModelOption = Annotated[
    str | None, typer.Option(help="Model to check against (default: the one it was built on).", show_default=False)
]
_PositiveOption = Annotated[
    Path | None, typer.Option(help="Of a contrast: its texts, to compute it anew.", show_default=False)
]
_NegativeOption = Annotated[Path | None, typer.Option(help="Likewise.", show_default=False)]
_TextsOption = Annotated[
    Path | None,
    typer.Option(help="Of a lens: its neutral texts (default: those that ship).", show_default=False),
]


def verify(
    name: NameArgument,
    model: _ModelOption = None,
    positive: _PositiveOption = None,
    negative: _NegativeOption = None,
    texts: _TextsOption = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file; load no model.")] = False,
    attention: AttentionOption = None,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an operator's file, then hold it against its model.

    Of a vector, the model's fingerprints and sizes are compared; a contrast is computed anew where its texts are given.
    """
    with output.exit_on_error(as_json):
        with output.wrong_usage():
            _check_together(positive, negative)
            if file_only and positive is not None:
                raise VectorError("--positive and --negative do not go with --file-only")
        artifact = open_store(store_path).load(name)
        answer: dict[str, Any] = {"name": name, "digest": artifact.digest, "file": "valid"}
        line = f"{name}: the file is valid ({artifact.digest})"
        contrast = _contrast_texts(name, artifact.header, positive, negative)
        if not file_only:
            loaded = _load(artifact.header, model, attention)
            found, said = _hold_against(artifact, loaded, contrast, texts)
            answer, line = {**answer, **found}, f"{line} and fits {loaded.name}{said}"
        output.print_answer(answer, [line], as_json=as_json)


def renew(
    name: NameArgument,
    model: _ModelOption = None,
    positive: _PositiveOption = None,
    negative: _NegativeOption = None,
    texts: _TextsOption = None,
    attention: AttentionOption = None,
    store_path: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign an operator of an earlier version anew, after computing it anew from its model.

    Earlier versions told models apart by a sample of their weights. What is computed anew and agrees is signed with the
    fingerprint over all of them; its digest changes. Vectors that no text gives are to be imported or combined again.
    """
    with output.exit_on_error(as_json):
        from operators.core.model_fingerprint import needs_renewal

        with output.wrong_usage():
            _check_together(positive, negative)
        store = open_store(store_path)
        artifact = store.load(name)
        answer: dict[str, Any] = {"name": name, "digest": artifact.digest, "renewed": False}
        line = f"{name}: its fingerprint is over all weights; there is nothing to renew"
        contrast = _contrast_texts(name, artifact.header, positive, negative)
        if needs_renewal(artifact.header.model_fingerprint):
            from operators.builder.renew import signed_for

            _check_computable(name, artifact.header, has_texts=contrast is not None)
            loaded = _load(artifact.header, model, attention)
            renewed = signed_for(artifact, loaded)
            try:
                found, said = _hold_against(renewed, loaded, contrast, texts)
            except ReconstructionError as error:
                raise ReconstructionError(f"{name!r} is not renewed, and is to be built again: {error}") from error
            store.save(name, renewed, instead_of=artifact.digest)
            answer |= {**found, "digest": renewed.digest, "renewed": True, "digest_before": artifact.digest}
            line = f"{name}: fits {loaded.name}{said}; signed anew as {renewed.digest}"
        output.print_answer(answer, [line], as_json=as_json)


def _check_together(positive: Path | None, negative: Path | None) -> None:
    if (positive is None) != (negative is None):
        raise VectorError("--positive and --negative go together")


def _contrast_texts(
    name: str, header: OperatorHeader, positive: Path | None, negative: Path | None
) -> tuple[Path, Path] | None:
    if positive is None or negative is None:
        return None
    if header.vector is None:
        raise VectorError(f"operator {name!r} is no contrast, so that no texts can be compared with it")
    return positive, negative


def _check_computable(name: str, header: OperatorHeader, *, has_texts: bool) -> None:
    """Refuses a vector that cannot be computed anew, before a model is loaded."""
    if header.vector is None or has_texts:
        return
    method = header.vector.method
    if method == "contrast":
        raise VectorError(f"{name!r} is a contrast: --positive and --negative take its texts, to compute it anew")
    again = {"import": "import it again", "mixture": "combine its members again", "lens": "make it again"}[method]
    raise VectorError(f"{name!r} is a vector by {method!r}, which no model gives: {again}")


def _load(header: OperatorHeader, model: str | None, attention: AttentionName | None) -> LoadedModel:
    from operators.model.loading import load_model

    return load_model(model or header.model, dtype=header.model_dtype, device=default_device(), attention=attention)


def _hold_against(
    artifact: OperatorArtifact, loaded: LoadedModel, contrast: tuple[Path, Path] | None, texts: Path | None
) -> tuple[dict[str, Any], str]:
    """What is computed anew and compared: for JSON, and to end a person's line."""
    if artifact.header.lens is not None:
        return _hold_lens(artifact, loaded, texts)
    if artifact.header.vector is not None:
        return _hold_vector(artifact, loaded, contrast)
    from operators.builder.verify import verify_operator

    error, at_build = verify_operator(artifact, loaded), artifact.header.reconstruction_error
    return {
        "model": loaded.name,
        "reconstruction_error": error,
        "reconstruction_error_at_build": at_build,
    }, f": |sum J x - y| / |y| = {error:.2e} ({at_build:.2e} when it was built)"


def _hold_lens(artifact: OperatorArtifact, loaded: LoadedModel, texts: Path | None) -> tuple[dict[str, Any], str]:
    from operators.core.neutral_texts import neutral_texts
    from operators.lens.verify import verify_lens
    from operators.model.unembedding import find_unembedding
    from operators.vectors.contrast import read_texts

    lens = artifact.header.lens
    assert lens is not None  # noqa: S101 - for the type checker
    # The shipped texts, or the first of them, as the lens was built with --quick.
    neutral = neutral_texts()[: lens.texts] if texts is None else read_texts(texts).texts
    error = verify_lens(artifact, loaded, neutral, find_unembedding(loaded.name, loaded.files))
    return {"model": loaded.name, "lens_error": error}, f": computed anew, it is off by {error:.1e}"


def _hold_vector(
    artifact: OperatorArtifact, loaded: LoadedModel, contrast: tuple[Path, Path] | None
) -> tuple[dict[str, Any], str]:
    from operators.builder.verify import check_compatible
    from operators.vectors.contrast import check_contrast, read_texts

    check_compatible(artifact.header, loaded)
    fits = ": fingerprints, depth and width; "
    if contrast is None:
        return {"model": loaded.name, "vector_error": None}, f"{fits}a vector's numbers are not computed anew"
    positive, negative = map(read_texts, contrast)
    error = check_contrast(artifact, positive, negative, loaded)
    return {"model": loaded.name, "vector_error": error}, f"{fits}computed anew from its texts it is off by {error:.1e}"
