"""What a scripted server answers: the truth, but for the changes that a test asks for."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from steer_client import OperatorUse, SamplingParams
from steer_client import _encode as encode
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import steering_pb2 as sp

DIGEST = "sha256:" + "1a2b3c4d" * 8


RECOMMENDED = {
    "strength": 0.55,
    "rule": sp.RULE_CUMULATIVE,
    "blend": 0.0,
    "positions": sp.Positions(part=sp.Positions.PART_ALL),
    "anchor": sp.ANCHOR_CONTRAST,
    "first_token": sp.FIRST_TOKEN_OPERATOR,
}


def sent(use: OperatorUse) -> sp.OperatorUse:
    """The use of an operator as the client sends it."""
    return encode.generate_request("", [use], SamplingParams(), "").operators[0]


def make_receipt(operator: str | sp.OperatorUse = "golden-gate", **changes) -> sp.Receipt:
    """The truth about one use of an operator alone at its layer in the text of make_response, but for `changes`."""
    use = sp.OperatorUse(name=operator) if isinstance(operator, str) else operator
    asked = {field.name: value for field, value in use.ListFields() if field.name in RECOMMENDED}
    values = {
        "operator": use.name,
        "digest": DIGEST,
        "layer": 20,
        "defaulted": [name for name in RECOMMENDED if name not in asked],
    }
    values |= RECOMMENDED | asked
    bound = values["dose_bound"] = abs(values["strength"]) / 2
    if values["strength"] != 0:
        values |= {
            "prompt_tokens_steered": 6,
            "generated_tokens_steered": 2,
            "mean_dose": bound,
            "max_dose": bound,
        }
    values |= changes
    if values["strength"] != 0 and values.get("prompt_tokens_steered", 0) + values.get("generated_tokens_steered", 0):
        values = {"positions_checked": 1, "worst_cosine": 0.99997} | values
    return sp.Receipt(**values)


def make_response(
    text: str = "one two", *, operators: Iterable[str | sp.OperatorUse] = (), **changes
) -> text_pb2.GenerateResponse:
    receipts = [make_receipt(use) for use in operators]
    # All at one layer, so they share its bound.
    bound = sum(receipt.dose_bound for receipt in receipts)
    for receipt in receipts:
        receipt.dose_bound = bound
    values = {
        "request_id": "r1",
        "token_ids": [11, 12, 13],
        "finish_reason": text_pb2.FINISH_REASON_MAX_TOKENS,
        "usage": text_pb2.Usage(prompt_tokens=6, completion_tokens=3),
        "timings": text_pb2.Timings(
            queued=Duration(nanos=1000),
            time_to_first_token=Duration(nanos=250_000_000),
            total=Duration(seconds=1, nanos=500_000_000),
        ),
        "receipts": receipts,
        "seed": 7,
    }
    return text_pb2.GenerateResponse(text=text, **(values | changes))


def make_events(response: text_pb2.GenerateResponse) -> list[pb.GenerateEvent]:
    words = response.text.partition(" ")
    return [
        pb.GenerateEvent(started=text_pb2.Started(request_id="r1", prompt_token_ids=[1, 2, 3])),
        pb.GenerateEvent(delta=text_pb2.Delta(text=words[0], token_ids=response.token_ids[:1])),
        pb.GenerateEvent(delta=text_pb2.Delta(text=words[1] + words[2], token_ids=response.token_ids[1:])),
        pb.GenerateEvent(finished=response),
    ]


def make_comparison(
    normal: text_pb2.GenerateResponse | None,
    arms: dict[str, text_pb2.GenerateResponse],
    *,
    scored: bool = True,
    mean: float = 0.5,
    n: int = 1,
) -> list[comparison_pb2.CompareEvent]:
    texts = ({} if normal is None else {"normal": normal}) | arms
    scripts = {(name, sample): make_events(with_sample(texts[name], sample)) for name in texts for sample in range(n)}
    events = []
    for step in range(4):
        for (name, sample), script in scripts.items():
            event = script[step]
            kind = event.WhichOneof("event")
            events.append(comparison_pb2.CompareEvent(arm=name, sample=sample, **{kind: getattr(event, kind)}))
    score = {
        "kl_per_token": [0.25, 0.75, 0.5],
        "kl_mean": mean,
        "kl_p95": 0.75,
        "normal_perplexity": 3.0,
        "steered_perplexity": 9.0,
    }
    compared = [
        comparison_pb2.Comparison(arm=name, sample=sample, first_divergence=1, **(score if scored else {}))
        for name in arms
        for sample in range(n)
    ]
    return [*events, comparison_pb2.CompareEvent(compared=comparison_pb2.CompareFinished(comparisons=compared))]


def make_comparisons(ids: list[str], events: list[comparison_pb2.CompareEvent]) -> list[comparison_pb2.CompareEvent]:
    """The same events for each prompt, the prompts backwards and two at a time; no text is repeated."""
    made = []
    ids = ids[::-1]
    for pair in (ids[place : place + 2] for place in range(0, len(ids), 2)):
        for event in events:
            for prompt_id in pair:
                made.append(comparison_pb2.CompareEvent())
                made[-1].CopyFrom(event)
                made[-1].prompt_id = prompt_id
                for name in ("text", "token_ids", "logprobs") if event.HasField("finished") else ():
                    made[-1].finished.ClearField(name)
    return made


def with_sample(response: text_pb2.GenerateResponse, sample: int) -> text_pb2.GenerateResponse:
    made = text_pb2.GenerateResponse()
    made.CopyFrom(response)
    made.sample, made.seed = sample, response.seed + sample
    return made
