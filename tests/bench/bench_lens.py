"""What a stored lens does to texts that its search never saw: eight words, held-out prompts, one strength for all.

    python tests/bench/bench_lens.py [LENS] [--kl 0.5 | --strength 0.12] [--prompts 20] [--tokens 24]

Prints for each word the share of the texts that hold it, and that hold it and have no four tokens in a row twice, with
p95 and mean KL(plain || steered) in nats. Words and prompts are for this report alone: nothing is chosen on them.
"""

import argparse
import time

from operators.core.budget import DEFAULT_KL, strength_within
from operators.core.store import Store
from operators.lens.measure import LensTrials, Panel
from operators.model.loading import load_model
from operators.model.unembedding import find_unembedding
from operators.tune.prompts import neutral_prompts

WORDS = ("volcano", "chess", "coffee", "dragon", "piano", "London", "robot", "honey")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lens", nargs="?", default="lens")
    parser.add_argument("--kl", type=float, default=DEFAULT_KL)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--words", nargs="+", default=WORDS)
    options = parser.parse_args()
    start = time.process_time()
    lens = Store.default().load(options.lens)
    header = lens.header
    at = header.recommended
    strength = options.strength
    if strength is None:
        strength = strength_within(header, options.kl, rule=at.rule, blend=at.blend, positions=at.positions)
    loaded = load_model(header.model, dtype=header.model_dtype)
    trials = LensTrials(loaded, find_unembedding(header.model))
    prompts = neutral_prompts()[: options.prompts]
    panels = [Panel((word,), prompts, options.tokens) for word in options.words]
    print(
        f"{header.model}, layer {header.layer}, positions {at.positions}, strength {strength:g}, {len(prompts)} prompts"
    )
    print("word       hits  useful  plain  p95 KL  mean KL")
    points = []
    for panel in panels:
        (point,) = trials.measure([(lens, strength)], panel)
        points.append(point)
        numbers = (point.hit_rate, point.useful_rate, trials.plain_hit_rate(panel), point.kl_p95, point.kl_mean)
        print(f"{panel.words[0]:9}  " + "   ".join(f"{number:4.2f}" for number in numbers), flush=True)
    for name in ("hit_rate", "useful_rate", "kl_p95", "kl_mean"):
        values = sorted(getattr(point, name) for point in points)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        print(f"{name}: median {middle:.2f}, {values[0]:.2f} to {values[-1]:.2f}")
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
