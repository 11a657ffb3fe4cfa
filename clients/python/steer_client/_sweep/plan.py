"""What a sweep runs: prompts, arms, seeds. Nothing is sent here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from steer_client import _encode as encode
from steer_client._errors import InvalidRequestError
from steer_client._requests import Chat, ChatMessage, OperatorUse, Prompt, Prompts, SamplingParams

#: By operator (as `OperatorUse.parse` reads it, or an `OperatorUse` such as a `Word`), the strengths λ to try.
Strengths: TypeAlias = Mapping[str | OperatorUse, float | Sequence[float]]


@dataclass(frozen=True, slots=True)
class SweepArm:
    """One operator at one strength."""

    operator: str
    strength: float
    use: OperatorUse

    @property
    def name(self) -> str:
        """As rows and tables call it."""
        return f"{self.operator}={self.strength:g}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Every arm runs for every prompt and seed, and a plain text once for each of these."""

    prompts: Mapping[str, Prompt]
    arms: tuple[SweepArm, ...]
    seeds: tuple[int, ...]
    sampling: SamplingParams

    def described(self) -> dict[str, Any]:
        """The plan as JSON: two plans are the same where this is."""
        return {
            "prompts": {name: prompt_json(prompt) for name, prompt in self.prompts.items()},
            "operators": [_plain(arm.use) | {"label": arm.operator} for arm in self.arms],
            "seeds": list(self.seeds),
            "sampling": _plain(self.sampling),
        }


def digest(described: Mapping[str, Any]) -> str:
    """sha256 of JSON, whatever the order of its keys."""
    text = json.dumps(described, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    prompts: Prompts | str | Path,
    operators: Strengths,
    seeds: int | Sequence[int] | None,
    sampling: SamplingParams,
) -> Plan:
    """The plan. Raises InvalidRequestError, which names the argument."""
    by_id = read_prompts(prompts) if isinstance(prompts, (str, Path)) else encode.prompts_by_id(prompts)
    if not by_id:
        raise InvalidRequestError("prompts: at least one is needed", field="prompts")
    for name, prompt in by_id.items():
        if not isinstance(name, str):
            raise InvalidRequestError(f"prompts: the id {name!r} is no text", field="prompts")
        encode.prompt_input(prompt)
    drawn = _seeds(seeds, sampling)
    return Plan(by_id, _arms(operators), drawn, dataclasses.replace(sampling, seed=None))


def read_prompts(path: str | Path) -> dict[str, Prompt]:
    """Prompts of a file: one per line, or of a .jsonl file one object per line with "prompt" and perhaps "id".

    A "prompt" is a text, a list of token ids, or a list of {"role", "content"}. Without ids they are numbered from 0.
    Blank lines are passed over. Raises InvalidRequestError, which names the file and the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise InvalidRequestError(
            f"prompts: cannot read {path}: {getattr(error, 'strerror', None) or error}", field="prompts"
        ) from None
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, prompt = str(len(found)), line.removesuffix("\r")
        if Path(path).suffix == ".jsonl":
            try:
                name, prompt = _read_line(line, name)
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidRequestError(
                    f'prompts: {path}, line {number}: {error}; {{"id": "…", "prompt": "…"}} is accepted',
                    field="prompts",
                ) from None
        if name in found:
            raise InvalidRequestError(f"prompts: {path}, line {number}: the id {name!r} comes twice", field="prompts")
        found[name] = prompt
    return found


def _read_line(line: str, name: str) -> tuple[str, Any]:
    entry = json.loads(line)
    if not isinstance(entry, dict) or "prompt" not in entry or not entry.keys() <= {"id", "prompt"}:
        raise ValueError("an object with a prompt, and perhaps an id, is needed")
    prompt = entry["prompt"]
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        prompt = Chat([ChatMessage(**turn) for turn in prompt])
    elif not isinstance(prompt, str) and not (
        isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt)
    ):
        raise ValueError("the prompt is neither a text, nor token ids, nor messages")
    return str(entry.get("id", name)), prompt


def prompt_json(prompt: Prompt) -> Any:
    """A prompt as JSON."""
    given = encode.prompt_input(prompt)
    if given.text is not None:
        return given.text
    return list(given.token_ids) if given.token_ids is not None else _plain(given.chat)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it."""
    shown = prompt_json(prompt)
    if isinstance(shown, dict):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in shown["messages"])
    return shown if isinstance(shown, str) else " ".join(map(str, shown))


def _arms(operators: Strengths) -> tuple[SweepArm, ...]:
    if not isinstance(operators, Mapping) or not operators:
        raise InvalidRequestError(
            'operators: a mapping from operators to strengths is needed, for example {"ocean": [0.2, 0.4]}, '
            f"not {operators!r}",
            field="operators",
        )
    arms: list[SweepArm] = []
    for key, given in operators.items():
        (use,) = encode.uses(key, "operators")
        if use.strength is not None or use.kl is not None:
            raise InvalidRequestError(
                f"operators: {key!r} has a strength of its own beside the sweep's", field="operators"
            )
        label = key if isinstance(key, str) else _label(use)
        for strength in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
                raise InvalidRequestError(f"operators: {label}: {strength!r} is no strength", field="operators")
            arms.append(SweepArm(label, float(strength), _at(use, float(strength))))
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or not arms:
        problem = f"{twice} comes twice" if twice else "no strength is given"
        raise InvalidRequestError(f"operators: {problem}", field="operators")
    return tuple(arms)


def _label(use: OperatorUse) -> str:
    words = ", ".join(word.text if word.weight == 1 else f"{word.text}*{word.weight:g}" for word in use.words)
    return f"{use.name}({words})" if words else use.name


def _at(use: OperatorUse, strength: float) -> OperatorUse:
    # Words have a constructor of their own.
    given = {field.name: getattr(use, field.name) for field in dataclasses.fields(OperatorUse)}
    return OperatorUse(**given | {"strength": strength})


def _seeds(seeds: int | Sequence[int] | None, sampling: SamplingParams) -> tuple[int, ...]:
    if seeds is None:
        return (sampling.seed or 0,)
    if sampling.seed is not None:
        raise InvalidRequestError("seeds: given beside sampling.seed; one of both is accepted", field="seeds")
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise InvalidRequestError(f"seeds: {seeds!r} are none, or one comes twice", field="seeds")
    if len(numbers) > 1 and not sampling.temperature:
        raise InvalidRequestError(
            f"seeds: {len(numbers)} of them, but at temperature 0 every one gives the same text; "
            "set sampling.temperature",
            field="seeds",
        )
    return numbers


def _plain(value: Any) -> Any:
    """A dataclass as JSON, without what is unset."""
    if dataclasses.is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(each) for name, each in given.items() if each is not None and each != ()}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
