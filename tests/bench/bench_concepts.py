"""Do the shipped operators work? Calibrates every concept, then measures it on prompts that calibration never saw.

    python tests/bench/bench_concepts.py [--only wedding,ocean] [--out figures.json]

Per concept: build, calibrate, and write the continuations of the neutral prompts plainly, with the best setting, with
the best one of each blend at its layer (0 the operator alone, 1 an anchor alone), and with operators of one text only
in the best setting's form. Prints a Markdown table, writes
JSON concept by concept, and goes on where it was interrupted. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import tomllib
from pathlib import Path

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import prepare
from operators.core.artifact import OperatorArtifact
from operators.core.header import Calibration, CalibrationPoint
from operators.core.measured import Sampling
from operators.model.loading import LoadedModel, load_model
from operators.tune.calibrate import calibrate
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations
from operators.tune.form import Form
from operators.tune.metrics import WordList, compute_metrics, continuation_text
from operators.tune.prompts import calibration_prompts, neutral_prompts

DATA = Path(__file__).parents[2] / "operators" / "data"
SAMPLES = 4


def main() -> None:
    """Measures the concepts that the output does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=DATA / "concepts.toml")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--layers", default="", help="numbers, separated by commas")
    parser.add_argument("--single-texts", type=int, default=1, help="how many of its texts to try alone")
    parser.add_argument("--out", type=Path, default=Path("concepts.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    concepts = tomllib.loads(options.file.read_text())["concept"]
    selected = [concept for concept in concepts if not options.only or concept["name"] in options.only.split(",")]
    layers = tuple(int(layer) for layer in options.layers.split(",")) if options.layers else None
    loaded = load_model("smollm2-135m", dtype="float32")
    for concept in selected:
        if concept["name"] not in results:
            results[concept["name"]] = measure(concept, layers, options.single_texts, loaded)
            options.out.write_text(json.dumps(results, indent=1))
            print(concept["name"], json.dumps(results[concept["name"]]["arms"], indent=1), flush=True)
    print(table(results))


def measure(concept: dict, layers: tuple[int, ...] | None, single_texts: int, loaded: LoadedModel) -> dict:
    """Everything about one concept."""
    start = time.monotonic()
    texts = tuple(concept_from_text(text, loaded) for text in concept.get("texts") or [concept["text"]])
    spec = CalibrationSpec(tuple(concept["words"]), calibration_prompts(), layers=layers)
    first = build_operator(BuildSpec(texts, layer=15), loaded)
    built = time.monotonic()
    found = calibrate(first, loaded, spec, progress=print_progress)
    calibration = found.header.calibration
    calibrated = time.monotonic()
    top = best(calibration, spec, None)
    arms = {"calibrated": (found, top)}
    for blend in (0.0, 0.5, 1.0):
        forms = tuple(form for form in spec.forms if form.blend == blend)
        alone = dataclasses.replace(spec, forms=forms, layers=(top.layer,))
        operator = calibrate(found, loaded, alone)
        arms[f"blend {blend:g}"] = (operator, best(operator.header.calibration, alone, blend))
    alone = dataclasses.replace(spec, forms=(Form.of(top),), layers=(top.layer,))
    for text in texts[:single_texts] if len(texts) > 1 else ():
        single = calibrate(build_operator(BuildSpec((text,), layer=top.layer), loaded), loaded, alone)
        arms[f"only {text.text!r}"] = (single, best(single.header.calibration, alone, None))
    return {
        "texts": [text.text for text in texts],
        "words": concept["words"],
        "seconds": {"build": built - start, "calibrate": calibrated - built},
        "arms": evaluate(arms, concept["words"], loaded),
        "calibration": calibration.model_dump(mode="json"),
    }


def best(calibration: Calibration, spec: CalibrationSpec, blend: float | None) -> CalibrationPoint:
    """The best point of a blend, or of all: within the bounds if one is, else the one nearest to the KL budget."""
    final = (point for point in calibration.points if point.texts == calibration.prompts)
    points = [point for point in final if blend in (None, point.blend)]
    fluent = [point for point in points if spec.admits(point, calibration.plain_distinct_2)]
    if fluent:
        return max(fluent, key=lambda point: (point.useful_rate, -point.perplexity_ratio))
    return min(points, key=lambda point: abs(point.kl_p95 - spec.kl_budget))


def evaluate(
    arms: dict[str, tuple[OperatorArtifact, CalibrationPoint]], words: list[str], loaded: LoadedModel
) -> dict[str, dict]:
    """The metrics of every arm over the neutral prompts, with a few of its texts."""
    neutral = neutral_prompts()
    ids = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in neutral]
    injections: dict[str, Injection | None] = {"plain": None}
    for arm, (operator, point) in arms.items():
        setting = Form.of(point).setting(point.strength)
        injections[arm] = Injection(prepare(operator, loaded.device), operator.header.injection_layer, setting)
    continuations = decode_continuations(
        [ContinuationRequest(prompt_ids, injection) for injection in injections.values() for prompt_ids in ids],
        loaded,
        tokens=24,
        sampling=Sampling(),
    )
    metrics = {}
    for index, arm in enumerate(injections):
        texts = continuations[index * len(ids) : (index + 1) * len(ids)]
        metrics[arm] = dataclasses.asdict(compute_metrics(texts, WordList(words), loaded))
        metrics[arm]["perplexity_ratio"] = metrics[arm]["perplexity"] / metrics["plain"]["perplexity"]
        metrics[arm]["samples"] = [
            prompt + continuation_text(text, loaded) for prompt, text in zip(neutral[:SAMPLES], texts, strict=False)
        ]
        if arm != "plain":
            point = arms[arm][1]
            metrics[arm]["setting"] = point.model_dump(include={"layer", "rule", "blend", "strength"}, mode="json")
    return metrics


def table(results: dict[str, dict]) -> str:
    """One line per concept and arm."""
    lines = [
        "| concept | arm | layer | rule | β | λ | hits | p95 KL | perplexity / plain | distinct-2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, concept in results.items():
        for arm, metrics in concept["arms"].items():
            setting = metrics.get("setting") or dict.fromkeys(("layer", "rule", "blend", "strength"), "")
            numbers = f"{metrics['hit_rate']:.2f} | {metrics['kl_p95']:.2f} | {metrics['perplexity_ratio']:.2f}"
            place = " | ".join(str(setting[key]) for key in ("layer", "rule", "blend", "strength"))
            lines.append(f"| {name} | {arm} | {place} | {numbers} | {metrics['distinct_2']:.2f} |")
    return "\n".join(lines)


def print_progress(what: str, done: int, total: int) -> None:
    """Progress, on a line of its own."""
    print(f"{time.strftime('%H:%M:%S')} {what}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
