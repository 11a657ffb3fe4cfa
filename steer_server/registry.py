"""The operators that requests may name: a snapshot of the store, checked against the model being served.

Every artifact is read and verified when the snapshot is made, so a request never waits for a disk or meets a
half-written file. A damaged artifact does not stop the server; it is listed with its problem, and a request that names
it gets an error. Requests keep the artifact objects of their snapshot, whatever a reload brings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from operators.core.artifact import OperatorArtifact, from_bytes
from operators.core.errors import ArtifactError, StoreError
from operators.core.file_format import open_regular, parse_file_header
from operators.core.header import OperatorHeader
from operators.core.model_fingerprint import renewal_hint
from operators.core.store import Store
from steer_server.applications import draft_application, finish_application, name_of, reading_words
from steer_server.caller import CALLER
from steer_server.errors import (
    DigestNotServedError,
    DoseTooHighError,
    InvalidRequestError,
    OperatorUnusableError,
    PermissionDeniedError,
    StoreUnreadableError,
    UnknownOperatorError,
)
from steer_server.types import MAX_OPERATORS, Application, ModelInfo, OperatorUse, SteeringPlan
from steer_server.words import BesideTheLoop, Words

_MAX_PROBLEM = 1024
"""Characters of a problem that are kept: listings repeat it."""
_MAX_DISTINCT_WORDS = 128
"""In the arms of one request together: others wait while their directions are worked out."""
_ROUNDING = 1e-9
"""Relative: the floating-point sum of strengths that add up to the limit may exceed it."""
_UNLOADED = "it was unloaded, and its file kept; LoadOperator (steer admin load) takes it into service again"


_T = TypeVar("_T")
_Applications = dict[str, tuple[Application, ...]]
"""By the field that holds their uses."""


@dataclass(frozen=True)
class OperatorEntry:
    """One name in the store. ``artifact`` is None where ``problem`` is not empty."""

    name: str
    problem: str
    size_bytes: int
    artifact: OperatorArtifact | None


@dataclass(frozen=True)
class StoreChanges:
    """What a reload of the store changed: names of operators. ``unusable`` are all that cannot be used now."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unusable: tuple[str, ...]


class Registry:
    """Operators by name: one snapshot of the store at a time."""

    def __init__(
        self, store: Store, model: ModelInfo, *, max_bytes: int, max_dose: float, words: Words | None = None
    ) -> None:
        """Reads the store. Raises :class:`StoreUnreadableError`.

        Args:
            model: the model being served, which operators must have been built for.
            max_bytes: larger files are not read.
            max_dose: upper bound of the sum of |lambda|/2 over the operators of one request at one layer.
            words: makes the directions of those that requests give to a lens; without it they are refused.
        """
        self._store = store
        self._model = model
        self._max_bytes = max_bytes
        self._max_dose = max_dose
        self._words = words
        self._beside_the_loop = BesideTheLoop()
        self._entries: Mapping[str, OperatorEntry] = MappingProxyType({})
        self._changing = threading.RLock()
        """Held by whatever replaces the snapshot: each change is made to the last one."""
        self._examining = threading.Lock()
        """Held while a file is read that is not in service yet: of such there is one in memory at a time."""
        self._store_existed = False
        """Whether the store's directory was there at the last reading: before the first save it need not be."""
        self.reload()

    def entries(self) -> tuple[OperatorEntry, ...]:
        """All of the snapshot that the caller may use, by name."""
        return tuple(self._granted().values())

    def names(self) -> Set[str]:
        """All of the snapshot, whoever asks: for the server's own books."""
        return self._entries.keys()

    def entry(self, name: str) -> OperatorEntry:
        """One entry, usable or not. Raises :class:`UnknownOperatorError` and :class:`PermissionDeniedError`."""
        check_granted([name])
        return _find(self._granted(), name)

    def _granted(self) -> Mapping[str, OperatorEntry]:
        grant = CALLER.get().grant
        if grant.operators is None:
            return self._entries
        return {name: entry for name, entry in self._entries.items() if grant.may_use(name)}

    def reload(self) -> StoreChanges:
        """Reads the store again and replaces the snapshot in one assignment. Unchanged operators stay the same objects.

        Raises :class:`StoreUnreadableError`; the snapshot then stays.
        """
        with self._changing:
            return self._reload()

    def reload_one(self, name: str) -> OperatorEntry:
        """Reads one operator again, or for the first time, and leaves the others as they are.

        Raises :class:`UnknownOperatorError` where the store does not have it (any more).
        """
        with self._changing:
            others = {each: entry for each, entry in self._entries.items() if each != name}
            if name not in self._store:
                self._entries = MappingProxyType(others)
                raise UnknownOperatorError(name, tuple(others))
            entry = _reuse_unchanged(self._entries.get(name), self._read(name))
            self._put(entry)
            return entry

    def examine(self, name: str, path: Path) -> OperatorEntry:
        """What a file would be as the operator ``name``. Raises :class:`ArtifactError` where it could not be used."""
        with open_regular(path, self._max_bytes) as (file, size):
            # What does not belong here mostly says so in its first bytes, and is read no further.
            check_fits(name, parse_file_header(file, size, source=name).header, self._model)
            with self._examining:
                file.seek(0)
                artifact = from_bytes(file.read(size), source=name)
        check_fits(name, artifact.header, self._model)
        return OperatorEntry(name, "", size, artifact)

    def bytes_beside(self, name: str) -> int:
        """What all other operators in service take."""
        return sum(
            each.size_bytes for each in self._entries.values() if each.artifact is not None and each.name != name
        )

    def put(self, entry: OperatorEntry) -> OperatorEntry:
        """Takes an operator into service that was examined and is in the store by now."""
        with self._changing:
            entry = _reuse_unchanged(self._entries.get(entry.name), entry)
            self._put(entry)
            return entry

    def _put(self, entry: OperatorEntry) -> None:
        after = {**self._entries, entry.name: entry}
        self._entries = MappingProxyType({name: after[name] for name in sorted(after)})

    def _reload(self) -> StoreChanges:
        before, exists = self._entries, self._store.path.exists()
        try:
            after = {name: _reuse_unchanged(before.get(name), self._read(name)) for name in self._store.names()}
        except StoreError as error:
            raise StoreUnreadableError(str(error)) from error
        if (exists or self._store_existed) and not self._store.path.exists():
            # Also where it went while it was read: its operators are then not removed, or broken, one by one.
            raise StoreUnreadableError(f"store {self._store.path} does not exist any more")
        self._store_existed = exists
        self._entries = MappingProxyType(after)
        in_both = before.keys() & after.keys()
        return StoreChanges(
            added=tuple(sorted(after.keys() - before.keys())),
            changed=tuple(sorted(name for name in in_both if _version(before[name]) != _version(after[name]))),
            removed=tuple(sorted(before.keys() - after.keys())),
            unusable=tuple(name for name, entry in after.items() if entry.problem),
        )

    async def plan_beside(self, groups: Mapping[str, tuple[OperatorUse, ...]]) -> tuple[SteeringPlan | None, ...]:
        """The plans of one request's groups of operators, by the field that holds each; all of one snapshot.

        Words, for which files are read, are worked out in a thread beside the event loop. Raises as :meth:`plan` does,
        :class:`QueueFullError` where too many requests wait for that, and :class:`PermissionDeniedError` for an
        operator that the caller may not use.
        """
        check_granted(name_of(use) for uses in groups.values() for use in uses)
        words = {(use.name, word.text) for uses in groups.values() for use in uses for word in use.words}
        if len(words) > _MAX_DISTINCT_WORDS:
            field = next(iter(groups)) if len(groups) == 1 else "arms"
            raise InvalidRequestError(
                field, f"have {len(words)} different words together; at most {_MAX_DISTINCT_WORDS} are accepted"
            )
        entries = self._granted()
        drafts = self._drafts(entries, groups)
        if words:
            with self._beside_the_loop.place():
                drafts = await self._read_words(drafts, groups)
        return tuple(map(_plan_of, drafts.values()))

    async def _read_words(self, drafts: _Applications, groups: Mapping[str, tuple[OperatorUse, ...]]) -> _Applications:
        """The drafts with the directions of their words; all are checked before the first is worked out."""
        assert self._words is not None  # noqa: S101 - drafts with words are refused without
        run, read = self._beside_the_loop.run, self._words
        uses = [
            (name_of(use), use.words, f"{field}[{index}]", drafted.artifact)
            for field, group in groups.items()
            for index, (use, drafted) in enumerate(zip(group, drafts[field], strict=True))
            if use.words
        ]
        for name, words, field, _ in uses:
            await run(partial(_name_errors, name, field, partial(read.check, words)))
        # Word by word, so that another caller's come in between.
        for name, words, field, lens in uses:
            for word in words if len(words) > 1 else ():
                await run(partial(_name_errors, name, field, partial(read.learn, lens, word)))
        return {
            field: tuple(
                [
                    await run(partial(self._finished, drafted, use, f"{field}[{index}]")) if use.words else drafted
                    for index, (use, drafted) in enumerate(zip(group, drafts[field], strict=True))
                ]
            )
            for field, group in groups.items()
        }

    def plan(self, uses: tuple[OperatorUse, ...], *, field: str = "operators") -> SteeringPlan | None:
        """The plan for the operators of one request; None when it names none.

        Raises:
            UnknownOperatorError, OperatorUnusableError: an operator is not in the store, or cannot be used.
            InvalidRequestError: a strength, rule, blend, anchor, range, word or KL is not accepted; names the field.
            DoseTooHighError: the doses of the operators at one layer add up to more than ``max_dose``.
        """
        drafts = self._drafts(self._entries, {field: uses})[field]
        made = [
            self._finished(each, use, f"{field}[{n}]") for n, (each, use) in enumerate(zip(drafts, uses, strict=True))
        ]
        return _plan_of(tuple(made))

    def _drafts(
        self, entries: Mapping[str, OperatorEntry], groups: Mapping[str, tuple[OperatorUse, ...]]
    ) -> _Applications:
        """Every use, with its dose, before the words of any are read."""
        drafts = {}
        for field, uses in groups.items():
            check_count(uses, field)
            drafts[field] = tuple(self._draft(entries, use, f"{field}[{index}]") for index, use in enumerate(uses))
            self._check_doses(SteeringPlan(drafts[field]), field)
        return drafts

    def _finished(self, drafted: Application, use: OperatorUse, field: str) -> Application:
        return drafted if self._words is None or not use.words else finish_application(drafted, use, self._words, field)

    def _check_doses(self, plan: SteeringPlan, field: str) -> None:
        for layer in sorted({use.layer for use in plan.applications}):
            dose = plan.dose_bound(layer)
            if dose <= self._max_dose * (1.0 + _ROUNDING):
                continue
            indices = [index for index, use in enumerate(plan.applications) if use.layer == layer]
            raise DoseTooHighError(
                f"{field}[{indices[0]}].strength" if len(indices) == 1 else field,
                layer=layer,
                dose=dose,
                max_dose=self._max_dose,
                parts=tuple(_describe_dose(plan.applications[index]) for index in indices),
            )

    def _draft(self, entries: Mapping[str, OperatorEntry], use: OperatorUse, field: str) -> Application:
        name = name_of(use)
        entry = _find(entries, name, has_words=bool(use.words))
        if entry.artifact is None:
            raise OperatorUnusableError(name, entry.problem)
        served = entry.artifact.digest
        if use.digest is not None and use.digest != served:
            raise DigestNotServedError(name, requested=use.digest, served=served)
        return draft_application(use, entry.artifact, self._words, field)

    def _read(self, name: str) -> OperatorEntry:
        size = 0
        try:
            size = self._store.path_of(name).lstat().st_size
            if self._store.is_unloaded(name):
                return OperatorEntry(name, _UNLOADED, size, None)
            artifact = read_artifact(self._store, name, self._max_bytes)
            check_fits(name, artifact.header, self._model)
        except (ArtifactError, StoreError, OSError, MemoryError) as error:
            # Cut, because a hostile file chooses parts of the message.
            return OperatorEntry(name, (str(error) or type(error).__name__)[:_MAX_PROBLEM], size, None)
        return OperatorEntry(name, "", size, artifact)


def read_artifact(store: Store, name: str, max_bytes: int) -> OperatorArtifact:
    """An operator, read and verified. Raises :class:`ArtifactError`, :class:`StoreError` or :class:`OSError`."""
    size = store.path_of(name).lstat().st_size
    if size > max_bytes:
        raise ArtifactError(f"{size} bytes; at most {max_bytes} are read (STEER_MAX_ARTIFACT_BYTES sets it)")
    return store.load(name, max_bytes=max_bytes)


def check_fits(name: str, header: OperatorHeader, model: ModelInfo) -> None:
    """Raises :class:`ArtifactError` for an operator that was built for another model than the one being served."""
    # By fingerprint, not by name: the same model may be served from a path or a mirror.
    for what, built_for, served in (
        ("hidden size", header.hidden_size, model.hidden_size),
        ("number of layers", header.num_layers, model.num_layers),
        (f"model {header.model}", header.model_fingerprint, model.model_fingerprint),
        ("tokenizer", header.tokenizer_fingerprint, model.tokenizer_fingerprint),
    ):
        if built_for != served:
            only_the_model = header.tokenizer_fingerprint == model.tokenizer_fingerprint
            renewable = only_the_model and built_for == header.model_fingerprint
            hint = renewal_hint(header.model_fingerprint, name) if renewable else ""
            raise ArtifactError(f"built for {what} {built_for}; this server has {served} ({model.model}){hint}")
    highest = max((max(text.ids) for text in header.texts), default=0)
    if highest >= model.vocab_size:
        raise ArtifactError(f"its concept has token {highest}; the model has {model.vocab_size}")


def _plan_of(applications: tuple[Application, ...]) -> SteeringPlan | None:
    return SteeringPlan(applications) if applications else None


def _name_errors(name: str, field: str, piece: Callable[[], _T]) -> _T:
    """A piece of the reading of a use's words."""
    with reading_words(name, field):
        return piece()


def _describe_dose(use: Application) -> str:
    recommended = ", the recommended strength" if "strength" in use.defaulted else ""
    return f"{use.name} {abs(use.setting.strength):.12g}{recommended}"


def check_count(uses: tuple[OperatorUse, ...], field: str) -> None:
    """Raises :class:`InvalidRequestError` for more operators than a text may have."""
    if len(uses) > MAX_OPERATORS:
        raise InvalidRequestError(field, f"has {len(uses)} operators; at most {MAX_OPERATORS} are accepted")


def check_granted(names: Iterable[str]) -> None:
    """Before any is looked for: whether there is one of that name is nothing that a caller without it learns."""
    grant = CALLER.get().grant
    for name in names:
        if not grant.may_use(name):
            may = ", ".join(sorted(grant.operators or ())) or "none"
            raise PermissionDeniedError(
                f"token {grant.token!r} may not use operator {name[:64]!r}; it may use: {may}", cause="operator"
            )


def _find(entries: Mapping[str, OperatorEntry], name: str, *, has_words: bool = False) -> OperatorEntry:
    entry = entries.get(name)
    if entry is None:
        raise UnknownOperatorError(name, tuple(entries), has_words=has_words)
    return entry


def _reuse_unchanged(before: OperatorEntry | None, read: OperatorEntry) -> OperatorEntry:
    """The earlier entry where the artifact is the same: running requests and operator caches hold that object."""
    if before is None or before.artifact is None or read.artifact is None:
        return read
    return before if before.artifact.digest == read.artifact.digest else read


def _version(entry: OperatorEntry) -> str:
    return entry.artifact.digest if entry.artifact is not None else entry.problem
