"""Three operators at five strengths on ten prompts: progress, table, plot and page. Run it again: it goes on."""

from pathlib import Path

import rich
from steer_client import SamplingParams, SteerClient

operators = {name: [0, 0.2, 0.3, 0.4, 0.6] for name in ("ocean", "tea", "volcano")}
words = {"ocean": ["ocean", "sea", "waves"], "tea": ["tea", "cup"], "volcano": ["volcano", "lava", "eruption"]}
sampling = SamplingParams(max_tokens=24, repetition_penalty=1.2)
with SteerClient() as client:
    prompts = Path(__file__).with_name("prompts.txt")
    result = client.sweep(prompts, operators=operators, words=words, sampling=sampling, out="sweep.jsonl")
rich.print(result)
result.plot().figure.savefig("sweep.pdf")
result.html("sweep.html")
