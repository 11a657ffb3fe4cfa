"""``lens``: the matrix that turns any word into a push, and where it steers a model."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._lens_plan import LensTask
from operators.commands._options import (
    AttentionOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    ReplaceOption,
    StoreOption,
    check_new,
    default_device,
    open_store,
)
from operators.core.claims import claim
from operators.core.lens_source import LensPositions
from operators.core.progress import shown_progress, working

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.lens.search import SearchResult

_QUICK_TEXTS = 6
_ALL_POSITIONS: tuple[LensPositions, ...] = ("first", "others", "all")


def lens(
    name: Annotated[str, typer.Argument(help="Name of the lens.")] = "lens",
    layer: Annotated[
        int | None, typer.Option(help="Layer whose input is pushed (default: searched).", show_default=False)
    ] = None,
    positions: Annotated[
        LensPositions | None,
        typer.Option(help="Which are pushed, and what the lens is taken from (default: searched).", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Neutral texts, one per line (default: the sixteen that ship).", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer texts, and a shorter search: a quarter of it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and leave.")] = False,
    model: ModelOption = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    attention: AttentionOption = None,
    store_path: StoreOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build a lens: from then on, any word steers this model, without texts about it.

    What Ctrl-C stops goes on where it was, when the same command is given again. Where nothing steers the model, the
    lens is stored without a strength to recommend, and JSON says "found": false.
    """
    start = time.monotonic()
    with output.exit_on_error(as_json), ExitStack() as held:
        # Everything that can be refused without the model is refused before it is loaded, and a name before torch is.
        store = open_store(store_path)
        check_new(store, name, replace=replace)
        from operators.core.neutral_texts import neutral_texts
        from operators.vectors.contrast import read_texts

        if not dry_run:
            held.enter_context(claim(store, name, "a search for a lens"))
        neutral = neutral_texts() if texts is None else read_texts(texts).texts
        if quick and texts is None:
            neutral = neutral[:_QUICK_TEXTS]

        from operators.lens.matrices import check_layers, encode_texts
        from operators.lens.partial import PartialSums
        from operators.lens.search import SearchPlan, candidate_layers
        from operators.maps.detach import family_of
        from operators.model.loading import default_model, load_model

        source = model or default_model()
        with working(f"loading {source}"):
            loaded = load_model(
                source, dtype=dtype, device=device or default_device(), attention=attention, check=family_of
            )
        layers = candidate_layers(loaded.num_layers, quick=quick) if layer is None else (layer,)
        check_layers(layers, loaded)
        partial = PartialSums(store, name, loaded, encode_texts(neutral, loaded), layers)
        kinds = _ALL_POSITIONS if positions is None else (positions,)
        plan = SearchPlan.quick() if quick else SearchPlan.default()
        task = LensTask(name, store, loaded, neutral, layers, kinds, plan, partial)
        if dry_run:
            plan_ = task.planned()
            output.print_answer(plan_, task.planned_lines(plan_), as_json=as_json)
            return
        result, artifact, built = _run(task, lines=not as_json)
        path = store.save(name, artifact, replace=replace)
        task.partial.remove()
        answer = describe.operator_json(name, path, store.read_header(name))
        answer["found"] = result.strength is not None
        answer["seconds_of_matrices"] = round(built - start, 2)
        answer["seconds"] = round(time.monotonic() - start, 2)
        further = {"seconds": f"{answer['seconds']}, of which the matrices took {answer['seconds_of_matrices']}"}
        lines = [*describe.operator_lines(answer, **further), *_verdict(result)]
        output.print_answer(answer, lines, as_json=as_json)


def _run(task: LensTask, *, lines: bool) -> tuple[SearchResult, OperatorArtifact, float]:
    """The search's result, the lens to store, and when its matrices were done."""
    from operators.core.budget import DEFAULT_KL
    from operators.lens.build import check_unembedding, lens_artifact
    from operators.lens.matrices import lens_matrices
    from operators.lens.search import search_lens
    from operators.model.unembedding import find_unembedding

    loaded = task.loaded
    # Servers read the words' rows from the files, so that a lens of a model whose files have none is refused here.
    unembedding = find_unembedding(loaded.name, loaded.files)
    check_unembedding(unembedding, loaded)
    mean = unembedding.mean()
    try:
        with shown_progress(lines=lines) as progress:
            matrices = lens_matrices(task.texts, task.layers, loaded, partial=task.partial, progress=progress)
            built = time.monotonic()
            lenses = [
                lens_artifact(matrices, positions, layer, loaded, vocabulary_mean=mean)
                for positions in task.positions
                for layer in task.layers
            ]
            result = search_lens(lenses, loaded, unembedding, task.plan, progress=progress)
    except KeyboardInterrupt:
        kept = (task.partial.load() or (0,))[0]
        print(
            f"{output.COMMAND}: stopped; the matrices of {kept} of {len(task.texts)} texts are kept in "
            f"{task.store.path}, and the same command goes on from there",
            file=sys.stderr,
        )
        raise
    best = result.lens.header
    assert best.lens is not None  # noqa: S101 - for the type checker
    artifact = lens_artifact(
        matrices,
        best.lens.positions,
        best.layer,
        loaded,
        vocabulary_mean=mean,
        strength=result.strength,
        default_kl=None if result.strength is None else DEFAULT_KL,
        curve=result.curve,
        findings=result.findings,
    )
    return result, artifact, built


def _verdict(result: SearchResult) -> list[str]:
    if result.strength is None:
        return [
            "nothing steers this model well enough: at most "
            f"{result.best_hit_rate:.0%} of the texts hold the word and do not loop, within the budget "
            f"({result.curve.plain_hit_rate:.0%} of the plain ones). No strength is recommended; requests must give one"
        ]
    share = f"{result.best_hit_rate:.0%} of the texts that it was chosen on hold the word and do not loop"
    return [f"try it: steer ab PROMPT --word coffee ({share})"]
