"""Whether the model is there and can be served, and which operators of the store fit it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from operators.core.errors import ArtifactError, ModelError, StoreError
from operators.core.model_fingerprint import needs_renewal
from operators.core.store import Store
from steer_server.checks.finding import Finding
from steer_server.choices import device_of, dtype_of, store_of
from steer_server.config import ServerConfig
from steer_server.errors import StartupError
from steer_server.types import ModelInfo


def check_model_and_store(config: ServerConfig) -> Iterator[Finding]:
    """One finding for the model, one for the store, and one for each operator that cannot be used."""
    model = None
    try:
        said, model = _survey(config)
        yield Finding("ok" if model else "note", "model", f"{config.model} {said}")
    except (ModelError, StartupError) as error:
        yield Finding("problem", "model", str(error))
    try:
        store = store_of(config)
        names = store.names()
    except (StartupError, StoreError) as error:
        yield Finding("problem", "store", str(error))
        return
    unloaded = [name for name in names if store.is_unloaded(name)]
    names = [name for name in names if name not in unloaded]
    problems = {name: problem for name in names if (problem := _problem(store, name, model, config.max_artifact_bytes))}
    for name, problem in problems.items():
        yield Finding("problem", "store", f"operator {name!r} cannot be used: {problem}")
    if unloaded:
        yield Finding("note", "store", f"unloaded, and not looked at: {', '.join(unloaded)}")
    if model is None:
        said = "are whole; whether they fit the model is not known without it"
    elif not model.model_fingerprint:
        said = "fit the model's sizes and tokenizer; its weights are compared at the first start"
    else:
        said = "can be used with this model"
    place = store.path if store.path.exists() else f"{store.path} (made by the first operator that is saved)"
    yield Finding("ok", "store", f"{place}: {len(names) - len(problems)} of {len(names)} operators {said}")


def _survey(config: ServerConfig) -> tuple[str, ModelInfo | None]:
    """What is to be said of the model, and its description where it is on this machine."""
    from operators.model.survey import survey_model
    from steer_server.engine.describe import describe_model

    device = device_of(config)
    # vLLM has it from the server, which reads its files on the CPU.
    where = "cpu" if config.engine == "vllm" else device
    found = survey_model(config.model, dtype=dtype_of(config, device), device=where, attention=config.attention)
    return found.said, describe_model(found.model, engine=config.engine) if found.model else None


def _problem(store: Store, name: str, model: ModelInfo | None, max_bytes: int) -> str:
    from steer_server.registry import check_fits, read_artifact

    try:
        artifact = read_artifact(store, name, max_bytes)
        signed_for = artifact.header.model_fingerprint
        if model is not None and not model.model_fingerprint and not needs_renewal(signed_for):
            # Where the weights were never digested on this machine, all but their digest is compared.
            model = replace(model, model_fingerprint=signed_for)
        if model is not None:
            check_fits(name, artifact.header, model)
    except (ArtifactError, StoreError, OSError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""
