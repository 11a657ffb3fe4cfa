"""How far a low-rank operator steers from the exact one, over ranks.

    python tests/bench/bench_rank.py [--concepts FILE] [--ranks 16,32,64,128] [--plot FILE.png] [--json]

For every concept: the exact operator, and at each rank two low-rank ones, from test vectors with the covariance of the
embedding table and from white noise. On prompts that no operator was built from, at every position: the cosine of the
two directions a_k (published rule), and whether the next token under steering (strength 0.5) is the same one. Prints
the median and the 5th percentile over all positions, concept by concept and of all together.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Direction, PreparedOperator, Setting, prepare, steer
from operators.core.artifact import OperatorArtifact
from operators.maps.sketch import embedding_root
from operators.model.loading import DEFAULT_MODEL, LoadedModel, block_input, decoder_layers, embed, load_model
from operators.tune.prompts import read_prompts

STRENGTH = 0.5
WEIGHTINGS = ("embedding", "white")


@dataclass(frozen=True)
class Curve:
    """Cosines and agreement of one concept, weighting and rank, over all positions of all prompts."""

    concept: str
    weighting: str
    rank: int
    cosines: tuple[float, ...]
    agreement: float


def main() -> None:
    """Prints the table (or JSON), and draws it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = files("operators") / "data"
    options.add_argument("--concepts", type=Path, default=Path(str(data / "concepts.toml")))
    options.add_argument("--prompts", type=Path, default=Path(str(data / "prompts_neutral.txt")))
    options.add_argument("--model", default=DEFAULT_MODEL)
    options.add_argument("--ranks", default="8,16,32,64,128,256")
    options.add_argument("--plot", type=Path)
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    loaded = load_model(arguments.model, dtype="float32")
    prompts = list(read_prompts(arguments.prompts))
    concepts = tomllib.loads(arguments.concepts.read_text())["concept"]
    root = embedding_root(loaded.model.get_input_embeddings().weight)
    curves = [curve for concept in concepts for curve in _curves(concept, ranks, prompts, loaded, root)]
    curves += [_over_all_concepts(curves, weighting, rank) for weighting in WEIGHTINGS for rank in ranks]
    if arguments.plot:
        _draw(curves, ranks, arguments.plot)
    if arguments.json:
        print(json.dumps([{**_row(curve), "concept": curve.concept} for curve in curves], indent=2))
        return
    print(f"{loaded.name}, {len(concepts)} concepts, {len(prompts)} prompts, cosine of a_k: median / 5th percentile")
    print(f"{'concept':16} {'rank':>4}  {'embedding':>13} {'same token':>10}  {'white':>13} {'same token':>10}")
    by_key = {(curve.concept, curve.weighting, curve.rank): _row(curve) for curve in curves}
    for concept in dict.fromkeys(curve.concept for curve in curves):
        for rank in ranks:
            cells = [by_key[concept, weighting, rank] for weighting in WEIGHTINGS]
            texts = [f"{c['median']:6.3f}/{c['p5']:6.3f} {c['agreement']:10.3f}" for c in cells]
            print(f"{concept:16} {rank:4}  {texts[0]}  {texts[1]}")


def _curves(
    concept: dict[str, object], ranks: list[int], prompts: list[str], loaded: LoadedModel, root: torch.Tensor
) -> Iterator[Curve]:
    texts = concept["texts"] if "texts" in concept else [concept["text"]]
    assert isinstance(texts, list)
    spec = {"texts": tuple(concept_from_text(text, loaded) for text in texts), "layer": concept.get("layer")}
    exact = _steered(build_operator(BuildSpec(**spec, rank="full"), loaded), prompts, loaded)
    for weighting in WEIGHTINGS:
        for rank in ranks:
            low_rank = build_operator(BuildSpec(**spec, rank=rank, weighting=weighting), loaded, root=root)
            found = _steered(low_rank, prompts, loaded)
            cosines = torch.cat([(a * b).sum(-1) for (a, _), (b, _) in zip(exact, found, strict=True)])
            same = torch.cat([(a == b).double() for (_, a), (_, b) in zip(exact, found, strict=True)])
            yield Curve(str(concept["name"]), weighting, rank, tuple(cosines.tolist()), float(same.mean()))


def _steered(
    artifact: OperatorArtifact, prompts: list[str], loaded: LoadedModel
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per prompt, the unit directions (T, d) and the steered model's next tokens (T,)."""
    operator, layer = prepare(artifact, torch.device("cpu")), artifact.header.injection_layer
    steered = []
    for prompt in prompts:
        ids = torch.tensor(loaded.tokenizer(prompt)["input_ids"])
        directions = _directions(operator, ids, loaded)
        with _steering(loaded, layer, STRENGTH / 2 * directions), torch.no_grad():
            steered.append((directions, loaded.model(ids[None]).logits[0].argmax(-1)))
    return steered


def _directions(operator: PreparedOperator, ids: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    x = block_input(loaded.model, embed(loaded.model, ids))
    return Direction(operator, Setting(STRENGTH, "cumulative", 0.0)).advance(x)


@contextmanager
def _steering(loaded: LoadedModel, layer: int, push: torch.Tensor) -> Iterator[None]:
    def hook(_module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (steer(args[0], push), *args[1:])

    handle = decoder_layers(loaded.model)[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _over_all_concepts(curves: list[Curve], weighting: str, rank: int) -> Curve:
    matching = [curve for curve in curves if (curve.weighting, curve.rank) == (weighting, rank)]
    cosines = tuple(cosine for curve in matching for cosine in curve.cosines)
    return Curve("all", weighting, rank, cosines, sum(curve.agreement for curve in matching) / len(matching))


def _row(curve: Curve) -> dict[str, object]:
    cosines = torch.tensor(curve.cosines)
    return {
        "weighting": curve.weighting,
        "rank": curve.rank,
        "median": float(cosines.median()),
        "p5": float(cosines.quantile(0.05)),
        "agreement": curve.agreement,
    }


def _draw(curves: list[Curve], ranks: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for weighting, colour in zip(WEIGHTINGS, ("tab:blue", "tab:orange"), strict=True):
        rows = [_row(curve) for curve in curves if (curve.concept, curve.weighting) == ("all", weighting)]
        axes.plot(ranks, [row["median"] for row in rows], "o-", color=colour, label=f"{weighting}, median")
        axes.plot(ranks, [row["p5"] for row in rows], "s--", color=colour, label=f"{weighting}, 5th percentile")
    axes.set(xscale="log", xticks=ranks, xlabel="rank", ylabel="cosine of low-rank and exact direction")
    axes.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
