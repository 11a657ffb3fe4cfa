"""Fails a build where an operator no longer steers: python ci_gate.py OPERATOR=λ SHARE WORD...

The exit status is 0 where at least SHARE of the texts name one of the words and do not repeat themselves, as measured
on prompts.txt, 1 where it is less, and 2 where the command is wrong.
"""

import sys
from pathlib import Path

from steer_client import OperatorUse, SamplingParams, SteerClient, SteerError

try:
    if len(sys.argv) < 4:
        raise ValueError(f"an operator, a share and a word are needed; there are {len(sys.argv) - 1} arguments")
    use, wanted, words = OperatorUse.parse(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if use.strength is None:
        raise ValueError(f"the operator {sys.argv[1]!r} has no strength")
except ValueError as error:
    print(f"{error}\n{__doc__}", file=sys.stderr)
    sys.exit(2)

try:
    with SteerClient() as client:
        result = client.sweep(
            Path(__file__).with_name("prompts.txt"),
            # Strength 0 as a control: an error where it is not the plain text.
            operators={use.name: [0, use.strength]},
            words=words,
            sampling=SamplingParams(max_tokens=24, repetition_penalty=1.2),
        )
except SteerError as error:
    sys.exit(f"not measured: {error}")
found = result.summaries[-1].useful_hits
print(f"{use.name} at λ = {use.strength:g}: {found} of the texts are useful, wanted {wanted:g}")
sys.exit(found is None or found.value < wanted)
