"""One use of an operator, as a request names it, to what the engine applies: an artifact, a setting, their origin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from operators.core.apply import Setting, check_setting, recommended_setting
from operators.core.artifact import OperatorArtifact
from operators.core.budget import measured_doses, measured_points
from operators.core.dose_curve import strength_for
from operators.core.errors import OperatorError, SettingError, VectorError
from operators.core.header import SETTING_FIELDS, CalibrationPoint, OperatorHeader
from operators.core.vector_source import WordVector
from steer_server.errors import InvalidRequestError, OperatorUnusableError
from steer_server.types import Application, OperatorUse, SteeredWord
from steer_server.words import Words

LENS = "lens"
"""The lens of words that come without a name."""


def name_of(use: OperatorUse) -> str:
    """The name that a request means."""
    return use.name or (LENS if use.words else "")


def draft_application(use: OperatorUse, artifact: OperatorArtifact, words: Words | None, field: str) -> Application:
    """What applies ``artifact``, an operator or a lens, as ``use`` asks for it. Words are not read yet: the lens stands
    for their direction.

    Args:
        words: reads those of a lens; None in a server that cannot.
        field: path of ``use``, for errors.

    Raises:
        InvalidRequestError: a value is not accepted; names the field.
    """
    name, header = name_of(use), artifact.header
    if use.kl is not None and use.strength is not None:
        raise InvalidRequestError(f"{field}.kl", "is given beside a strength; one of the two is accepted")
    _check_words(use, header, words, field)
    try:
        setting, kl = _setting(use, header)
        _check_first_token(use, setting)
        check_setting(setting, header, f"operator {name!r}")
    except SettingError as error:
        raise InvalidRequestError(f"{field}.{error.field}", error.problem) from error
    defaulted = [name for name in SETTING_FIELDS if getattr(use, name) is None]
    if use.kl is not None:
        defaulted.remove("strength")
    return Application(
        name,
        artifact,
        setting,
        tuple(defaulted),
        calibrated=setting == Setting.of(header.recommended) and header.calibrated_point is not None,
        lens_digest="" if header.lens is None else artifact.digest,
        kl=kl,
    )


def finish_application(drafted: Application, use: OperatorUse, words: Words, field: str) -> Application:
    """The application of a lens, with the direction of its words.

    Raises:
        InvalidRequestError: the words make none.
        OperatorUnusableError: a lens does not fit the model's files, or they cannot be read.
    """
    with reading_words(drafted.name, field):
        direction = words.direction(drafted.artifact, use.words)
    return replace(drafted, artifact=direction, words=_steered_words(direction))


@contextmanager
def reading_words(name: str, field: str) -> Iterator[None]:
    """Names what is wrong with the words of a use, or with the lens ``name`` that reads them."""
    try:
        yield
    except VectorError as error:
        raise InvalidRequestError(f"{field}.words", str(error)) from error
    except OperatorError as error:
        # Of the lens or of the model's files, whatever the words are.
        raise OperatorUnusableError(name, str(error)) from error


def measured_at(header: OperatorHeader, setting: Setting) -> tuple[CalibrationPoint, ...]:
    """What a calibration measured at the operator's layer and at this setting, whatever its strength."""
    return measured_points(header, **_but_strength(setting))


def _but_strength(setting: Setting) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in SETTING_FIELDS if name != "strength"}


def _check_words(use: OperatorUse, header: OperatorHeader, words: Words | None, field: str) -> None:
    """Raises for words where none are accepted, and for none where they are needed."""
    name = name_of(use)
    if header.lens is None:
        if not use.words:
            return
        raise InvalidRequestError(f"{field}.words", f"are given to {name!r}, which is no lens; none are accepted")
    if not use.words:
        raise InvalidRequestError(f"{field}.words", f"are missing; {name!r} is a lens, and at least one is needed")
    if words is None:
        raise InvalidRequestError(f"{field}.words", "are not read by this server")


def _setting(use: OperatorUse, header: OperatorHeader) -> tuple[Setting, float | None]:
    """The setting, and the p95 KL in nats that its strength was read off the dose curve for, if it was."""
    recommended = header.recommended
    given = {name: value for name in SETTING_FIELDS if (value := getattr(use, name)) is not None}
    asked = replace(Setting.of(recommended), **given)
    own = None if header.lens is None else header.lens.default_kl
    kl = own if use.kl is None else use.kl
    if use.strength is not None:
        return asked, None
    if kl is None and header.lens is None:
        recommended_setting(header)
        return asked, None
    if kl is None:
        raise SettingError("strength", "is needed: the lens recommends none, because nothing steered or was measured")
    curve = measured_doses(header, **_but_strength(asked))
    if not curve:
        at = f"{asked.rule}, blend {asked.blend:g} with the {asked.anchor} anchor, positions {asked.positions}"
        field = "kl" if use.kl is not None else "strength"
        raise SettingError(field, f"cannot be read off a dose curve: none was measured at {at}; give a strength")
    if use.kl is None:
        return asked, kl
    return replace(asked, strength=strength_for(curve, kl)), kl


def _check_first_token(use: OperatorUse, setting: Setting) -> None:
    """Refuses an anchor that was asked for at a first token that the positions leave out."""
    if use.first_token == "anchor" and (setting.positions.part == "generated" or setting.positions.start > 0):
        raise SettingError(
            "first_token",
            f"is 'anchor', and the positions {setting.positions} leave the first token out; 'operator', or positions "
            "that begin with it, are accepted",
        )


def _steered_words(direction: OperatorArtifact) -> tuple[SteeredWord, ...]:
    source = direction.header.vector
    if not isinstance(source, WordVector):
        return ()
    return tuple(SteeredWord(word.text, word.weight, word.ids) for word in source.words)
