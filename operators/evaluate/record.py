"""``run.json``: what a run is, stated before its first row, and what its tables are made from."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from operators.core.errors import TrialError
from operators.core.version import __version__
from operators.evaluate.arms import form_digest, vector_digest
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.form import Form, all_forms
from operators.evaluate.material import Material
from operators.evaluate.protocol import Protocol, concept_digest, digest
from operators.evaluate.run import run_digest

RECORD = "run.json"
_MAX_BYTES = 16 << 20


def describe_run(
    material: Material, forms: Sequence[Form], concepts: Sequence[EvalConcept], protocol: Protocol
) -> dict[str, Any]:
    """What ``run.json`` says."""
    digests = [concept_digest(concept) for concept in concepts]
    return {
        "digest": run_digest(material, protocol),
        "version": __version__,
        # The last part of a path: a table says nothing about the machine.
        "model": PurePath(material.loaded.name).name,
        "model_fingerprint": material.loaded.fingerprint,
        "dtype": str(material.loaded.dtype).removeprefix("torch."),
        "device": material.loaded.device.type,
        "layer": material.layer,
        "forms": [form.name for form in forms],
        "form_digests": {name: form_digest(form) for name, form in all_forms().items()},
        "vectors": {one.name: found for one in concepts if (found := vector_digest(material, one))},
        "concepts": [
            {
                "name": one.name,
                "fresh": one.fresh,
                "word": one.word,
                "words": list(one.words),
                "texts": list(one.texts),
            }
            for one in concepts
        ],
        "concept_digests": [digest(digests), *(digest([one]) for one in digests)],
        "protocol": protocol.describe(),
    }


def write_record(folder: Path, run: dict[str, Any]) -> None:
    """Writes ``run.json`` whole or not at all; forms, regimes and doses of the same run that were there stay named.

    Raises:
        TrialError: it cannot be written.
    """
    path = folder / RECORD
    if path.exists():
        before = read_record(folder)
        if before["digest"] == run["digest"] and before["concept_digests"] == run["concept_digests"]:
            run["forms"] = list(dict.fromkeys([*before["forms"], *run["forms"]]))
            run["protocol"]["regimes"] = _joined(before["protocol"]["regimes"], run["protocol"]["regimes"])
    write_whole(path, (json.dumps(run, indent=1) + "\n").encode())


def _joined(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The regimes of both, each with the doses of both."""
    found: dict[str, dict[str, Any]] = {}
    for regime in (*before, *now):
        known = found.setdefault(regime["name"], {**regime, "budgets": []})
        known["budgets"] = list(dict.fromkeys([*known["budgets"], *regime["budgets"]]))
    return list(found.values())


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run.json`` states. Raises :class:`TrialError` where it is missing or is something else."""
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            run = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        raise TrialError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TrialError(f"{path}: is not JSON") from error
    needed = {"digest", "model", "layer", "forms", "form_digests", "vectors", "concepts", "concept_digests", "protocol"}
    if not isinstance(run, dict) or not needed <= set(run):
        raise TrialError(f"{path}: is no record of an evaluation")
    return run


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises :class:`TrialError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TrialError(f"{path}: cannot be written: {error.strerror}") from error
