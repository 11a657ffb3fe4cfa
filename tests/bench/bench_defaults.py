"""What does an operator do that nobody tuned? New ones, at the setting that `build` recommends, on neutral prompts.

    python tests/bench/bench_defaults.py [--strengths 0.25,0.3,0.35] [--held-out] [--model smollm2-135m]

Every concept of `operators/data/concepts_evaluation.toml` is built at the default layer, and steers by the contrast
anchor (blend 1, all positions) at each of the strengths: 24 greedy tokens on each of the 24 calibration prompts, or,
with --held-out, of the 50 neutral ones that nothing is searched on. Prints, for each strength, the 95th percentile and
the mean of KL(plain || steered) over all tokens, with the range of the concepts, and the shares of the texts with a
word of the concept (hits), and of those that repeat no four tokens (useful). Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import statistics
import tomllib

from bench_concepts import DATA

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import Setting, prepare
from operators.core.measured import Sampling
from operators.model.loading import LoadedModel, load_model
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations
from operators.tune.metrics import TextMetrics, WordList, compute_metrics
from operators.tune.prompts import calibration_prompts, neutral_prompts

TOKENS = 24


def main() -> None:
    """Builds, steers, and prints a line for each strength."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--strengths", default="0.25,0.3,0.35")
    options.add_argument("--held-out", action="store_true")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--layer", type=int)
    given = options.parse_args()
    concepts = tomllib.loads((DATA / "concepts_evaluation.toml").read_text())["concept"]
    prompts = neutral_prompts() if given.held_out else calibration_prompts()
    loaded = load_model(given.model, dtype="float32")
    strengths = [float(strength) for strength in given.strengths.split(",")]
    found: dict[float, list[TextMetrics]] = {strength: [] for strength in strengths}
    for concept in concepts:
        measured = steer(concept, strengths, prompts, given.layer, loaded)
        for strength, metrics in zip(strengths, measured, strict=True):
            found[strength].append(metrics)
        print(concept["name"], *(f"{one.kl_p95:.2f}/{one.hit_rate:.2f}/{one.useful_rate:.2f}" for one in measured))
    print(f"{given.model}, {len(concepts)} concepts x {len(prompts)} prompts x {TOKENS} tokens, greedy")
    for strength, each in found.items():
        p95, hits, useful = ([getattr(one, name) for one in each] for name in ("kl_p95", "hit_rate", "useful_rate"))
        mean = statistics.fmean(one.kl_mean for one in each)
        print(
            f"strength {strength:g}: p95 KL median {statistics.median(p95):.2f} ({min(p95):.2f} to {max(p95):.2f}), "
            f"mean KL {mean:.2f}, hits {statistics.fmean(hits):.2f} ({min(hits):.2f} to {max(hits):.2f}), useful "
            f"{statistics.fmean(useful):.2f} ({min(useful):.2f} to {max(useful):.2f})"
        )


def steer(
    concept: dict, strengths: list[float], prompts: tuple[str, ...], layer: int | None, loaded: LoadedModel
) -> list[TextMetrics]:
    """The metrics of one concept's operator at each strength."""
    texts = tuple(concept_from_text(text, loaded) for text in concept["texts"])
    # The anchor does not depend on the rank.
    operator = build_operator(BuildSpec(texts, layer=layer, rank=4), loaded)
    ids = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    pushes = [
        Injection(
            prepare(operator, loaded.device),
            operator.header.injection_layer,
            Setting(strength, "cumulative", 1.0, anchor="contrast"),
        )
        for strength in strengths
    ]
    written = decode_continuations(
        [ContinuationRequest(each, push) for push in pushes for each in ids],
        loaded,
        tokens=TOKENS,
        sampling=Sampling(repetition_penalty=1.0),
    )
    words = WordList(concept["words"])
    return [
        compute_metrics(written[first : first + len(ids)], words, loaded) for first in range(0, len(written), len(ids))
    ]


if __name__ == "__main__":
    main()
