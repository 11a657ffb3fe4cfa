"""``steer-operators``: build operators, and look after the directory that holds them.

The heavy imports are made inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from operators import _report as report
from operators.errors import OperatorError

app = typer.Typer(
    name=report.COMMAND,
    help="Build steering operators from concepts, and look after the store that holds them.",
    no_args_is_help=True,
    add_completion=False,
    # A programming error is shown as Python shows it; what a user can cause is one line.
    pretty_exceptions_enable=False,
)

# The same choices as in operators.artifact, which is not imported here because it imports torch.
ProfileChoice = Literal["golden", "residual"]
RuleChoice = Literal["cumulative", "substitute"]
DTypeChoice = Literal["float32", "float64", "bfloat16"]
DeviceChoice = Literal["cpu", "cuda"]

Name = Annotated[str, typer.Argument(help="Name of the operator.", show_default=False)]
Store = Annotated[
    Path | None,
    typer.Option(
        help="Directory of operators (default: $STEER_STORE, or one in the user's data directory).",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def build(
    name: Name,
    text: Annotated[str, typer.Option(help="The concept.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, local directory or Hugging Face id (default: $STEER_MODEL, or smollm2-135m).",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[ProfileChoice, typer.Option(help="Convention of target and injection.")] = "residual",
    layer: Annotated[
        int | None, typer.Option(help="Target layer (default: two thirds of the depth).", show_default=False)
    ] = None,
    strength: Annotated[float, typer.Option(help="Recommended strength; negative pushes away.")] = 0.5,
    rule: Annotated[RuleChoice, typer.Option(help="Recommended rule.")] = "cumulative",
    blend: Annotated[float, typer.Option(help="Recommended blend, from 0 (operator) to 1 (anchor).")] = 0.0,
    dtype: Annotated[DTypeChoice, typer.Option(help="Precision of the model and the operator.")] = "float32",
    device: Annotated[
        DeviceChoice | None, typer.Option(help="(default: cuda where there is one)", show_default=False)
    ] = None,
    store: Store = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an operator of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute the operator of a concept, check it against the model, and store it."""
    start = time.monotonic()
    with _reporting(as_json):
        from operators import store as shelf
        from operators.apply import Setting
        from operators.artifact import Recommended
        from operators.build import BuildSpec, build_operator
        from operators.concept import check_text, concept_from_text
        from operators.models import default_model, load_model

        # Everything that can be refused without the model is refused before it is loaded.
        where = _store(store)
        shelf.check_free(where, name, replace=replace)
        Setting(strength=strength, rule=rule, blend=blend)
        check_text(text)
        recommended = Recommended(strength=strength, rule=rule, blend=blend)
        loaded = load_model(model or default_model(), dtype=dtype, device=device or _device())
        concept = concept_from_text(text, loaded)
        spec = BuildSpec(concept=concept, profile=profile, layer=layer, recommended=recommended)
        with report.jacobian_progress() as progress:
            artifact = build_operator(spec, loaded, progress=progress)
        path = shelf.save(where, name, artifact, replace=replace)
        seconds = round(time.monotonic() - start, 2)
        answer = report.described(name, path, artifact)
        answer["concept_tokens"] = [loaded.tokenizer.decode([token]) for token in concept.ids]
        answer["seconds"] = seconds
        report.tell(answer, report.operator_lines(answer, seconds=seconds), as_json=as_json)


@app.command("list")
def list_operators(store: Store = None, as_json: AsJson = False) -> None:
    """List the operators in the store, broken ones with what is wrong with them."""
    with _reporting(as_json):
        from operators import store as shelf

        where = _store(store)
        entries: list[dict[str, Any]] = []
        for name in shelf.names(where):
            try:
                entries.append(report.described(name, shelf.path_of(where, name), shelf.load(where, name)))
            except OperatorError as error:
                entries.append({"name": name, "problem": report.problem(error)})
        lines = report.list_lines(entries) or [f"no operators in {where}"]
        report.tell({"store": str(where), "operators": entries}, lines, as_json=as_json)


@app.command()
def show(name: Name, store: Store = None, as_json: AsJson = False) -> None:
    """Show everything about one operator but its numbers."""
    with _reporting(as_json):
        from operators import store as shelf

        where = _store(store)
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


@app.command()
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
    with _reporting(as_json):
        from operators import store as shelf

        artifact = shelf.load(_store(store), name)
        answer: dict[str, Any] = {"name": name, "digest": artifact.digest, "file": "valid"}
        line = f"{name}: the file is valid ({artifact.digest})"
        if not file_only:
            from operators.build import verify_operator
            from operators.models import load_model

            header = artifact.header
            loaded = load_model(model or header.model, dtype=header.dtype, device=_device())
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


@app.command()
def delete(name: Name, store: Store = None, as_json: AsJson = False) -> None:
    """Remove an operator from the store."""
    with _reporting(as_json):
        from operators import store as shelf

        where = _store(store)
        shelf.delete(where, name)
        report.tell({"deleted": name, "store": str(where)}, [f"{name}: deleted"], as_json=as_json)


@contextmanager
def _reporting(as_json: bool) -> Iterator[None]:
    report.log_to_stderr()
    try:
        yield
    except OperatorError as error:
        report.tell_error(error, as_json=as_json)
        raise typer.Exit(1) from error


def _store(given: Path | None) -> Path:
    from operators.store import default_store

    return given or default_store()


def _device() -> DeviceChoice:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Entry point of the command; Ctrl-C exits with 130."""
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f"{report.COMMAND}: {error.name} is not installed; building needs its extra: pip install '.[build]'")


if __name__ == "__main__":
    main()
