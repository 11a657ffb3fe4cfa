"""Three sentences to a calibrated operator: CPU seconds, and useful texts on prompts that nothing was chosen on.

    python tests/bench/bench_calibrate.py --prompts FILE [--texts 10] [--quick]

Two concepts that ship nowhere, written down before the first run and not changed since: their sentences end before the
word. After the first of them had hit little, the same two were written again with sentences that end on the word
(``--set on-the-word``), before any run of these. Each is built and calibrated by
the commands that a user gives, in processes of their own, whose CPU time (user and system) is what is printed. Then the
stored setting steers the first 50 prompts of FILE, which must be neither prompts of the search nor held-out ones, with
the sampling that was stored.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from operators.core.apply import Setting, prepare
from operators.core.measured import Sampling
from operators.core.statistics import bootstrap_interval
from operators.core.store import Store
from operators.model.loading import load_model
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations
from operators.tune.metrics import WordList, compute_metrics, continuation_text
from operators.tune.prompts import calibration_prompts, neutral_prompts, read_prompts

BEFORE_THE_WORD = {
    "wine": (
        (
            "The grapes were picked by hand in the old",
            "She opened a bottle of red",
            "The cellar was full of barrels of aged",
        ),
        "wine,wines,winery,vineyard,vineyards,grape,grapes,bottle",
    ),
    "airplane": (
        (
            "The passengers fastened their seat belts before the",
            "The pilot landed the damaged",
            "We waited at the gate to board our",
        ),
        "plane,planes,airplane,airplanes,airport,flight,flights,pilot,pilots,aircraft,airline",
    ),
}

ON_THE_WORD = {
    "wine": (
        ("She poured a glass of red wine", "The hills are covered with old vineyards", "We tasted the local wine"),
        BEFORE_THE_WORD["wine"][1],
    ),
    "airplane": (
        ("The passengers boarded the airplane", "The pilot landed the plane", "They were late for their flight"),
        BEFORE_THE_WORD["airplane"][1],
    ),
}
SETS = {"before-the-word": BEFORE_THE_WORD, "on-the-word": ON_THE_WORD}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", choices=SETS, default="before-the-word")
    parser.add_argument("--only", default="", help="names, separated by commas")
    given = parser.parse_args()
    used = {*calibration_prompts(), *neutral_prompts()}
    prompts = [prompt for prompt in read_prompts(given.prompts) if prompt not in used][:50]
    loaded = load_model(given.model)
    with tempfile.TemporaryDirectory() as directory:
        selected = given.only.split(",") if given.only else SETS[given.set]
        for name in selected:
            texts, words = SETS[given.set][name]
            store = ["--store", directory]
            shown = [argument for text in texts for argument in ("--text", text)]
            built = _cpu_seconds("build", name, *shown, "--words", words, "--model", given.model, *store)
            quick = ["--quick"] if given.quick else []
            calibrated = _cpu_seconds("calibrate", name, *quick, *store)
            print(f"\n{name}: build {built:.0f} CPU s, calibrate {calibrated:.0f} CPU s")
            _measure(name, Store(Path(directory)), prompts, loaded, given.texts)


def _cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "operators", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _measure(name, store, prompts, loaded, shown) -> None:
    artifact = store.load(name)
    calibration = artifact.header.calibration
    sampling = calibration.sampling or Sampling()
    setting = Setting.of(artifact.header.recommended)
    push = Injection(prepare(artifact, loaded.device), artifact.header.injection_layer, setting)
    ids = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    plain, steered = (
        decode_continuations(
            [ContinuationRequest(each, injection) for each in ids], loaded, tokens=24, sampling=sampling
        )
        for injection in (None, push)
    )
    words = WordList(calibration.words)
    reference, found = (compute_metrics(texts, words, loaded) for texts in (plain, steered))
    low, high = bootstrap_interval(found.useful)
    print(
        f"{name} on {len(prompts)} fresh prompts, {sampling}: useful {found.useful_rate:.2f} [{low:.2f}, {high:.2f}] "
        f"(plain {reference.useful_rate:.2f}), hits {found.hit_rate:.2f}, KL p95 {found.kl_p95:.2f}, mean "
        f"{found.kl_mean:.2f}, perplexity x {found.perplexity / reference.perplexity:.2f}, distinct-2 "
        f"{found.distinct_2:.2f}"
    )
    for prompt, text in zip(prompts[:shown], steered, strict=False):
        print(f"  {prompt!r} -> {continuation_text(text, loaded)!r}")


if __name__ == "__main__":
    main()
