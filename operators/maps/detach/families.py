"""One table per architecture: which rule applies to which of its module classes.

Every module of a model must be in its table; a model with any other is refused, and nothing is guessed. A table names
classes, and only that of a model's own class is looked up: no other model of transformers is imported for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import accumulate
from typing import Any

from torch import nn
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

from operators.core.errors import UnsupportedModelError
from operators.maps.detach.experts import Mixture
from operators.maps.detach.family import MLP, Attention, Family
from operators.maps.detach.rules import ForwardRule
from operators.maps.detach.tables import BUILT_IN

ENTRY_POINTS = "steer_operators.families"
"""The group of entry points by which an installed package brings tables: each names a :class:`Family`, or several."""

_LINEAR: frozenset[type[nn.Module]] = frozenset({nn.Linear, Conv1D, nn.Embedding, nn.ModuleList, nn.Dropout})
"""Classes that need no rule: affine in their input, or before the map (embeddings), or the identity in evaluation."""


@dataclass(frozen=True, eq=False)
class FamilyRules:
    """A table with its classes looked up. Filled by :func:`family_of`."""

    name: str
    causal_lm: type[nn.Module]
    forwards: Mapping[type[nn.Module], ForwardRule]
    mlps: Mapping[type[nn.Module], MLP]
    attentions: Mapping[type[nn.Module], Attention]
    containers: frozenset[type[nn.Module]]
    unset: tuple[str, ...]

    def covers(self, kind: type[nn.Module]) -> bool:
        """Whether a module of this class has its place in the table, or needs none."""
        known = (self.forwards, self.mlps, self.attentions, self.containers, _LINEAR)
        return kind is self.causal_lm or any(kind in kinds for kinds in known)


_registered: tuple[Family, ...] = ()
_GUIDE = "docs/ARCHITECTURES.md says how to add"


def families() -> tuple[Family, ...]:
    """Every table: those of this package, those of installed packages, then the registered ones.

    Raises:
        UnsupportedModelError: what an installed package brings is no table, or a second one for a class.
    """
    return (*BUILT_IN, *_installed(), *_registered)


def register(family: Family) -> None:
    """Adds the table of another architecture, for the rest of this process.

    Raises:
        ValueError: the class has a table already. Tables are never replaced: an operator must not depend on
            what was imported before it was built.
    """
    global _registered
    if any(other.causal_lm == family.causal_lm for other in families()):
        raise ValueError(f"{family.model_class} has a detach table already; a table cannot be replaced")
    _registered = (*_registered, family)


@functools.cache
def _installed() -> tuple[Family, ...]:
    """The tables of installed packages."""
    found: list[Family] = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value)):
        for family in _tables_of(point):
            if any(other.causal_lm == family.causal_lm for other in (*BUILT_IN, *found)):
                raise UnsupportedModelError(
                    f"{_described(point)} brings a detach table for {family.causal_lm}, which has one already; a table "
                    "cannot be replaced: uninstall one of the two"
                )
            found.append(family)
    return tuple(found)


def _tables_of(point: EntryPoint) -> tuple[Family, ...]:
    try:
        value = point.load()
    except Exception as error:
        # Another's module, which may raise anything when it is imported.
        raise UnsupportedModelError(
            f"{_described(point)} cannot be loaded ({type(error).__name__}: {error}); repair or uninstall it"
        ) from error
    tables = (value,) if isinstance(value, Family) else tuple(value) if isinstance(value, Iterable) else (value,)
    for table in tables:
        if not isinstance(table, Family):
            raise UnsupportedModelError(
                f"{_described(point)} is {type(table).__name__}; a Family, or an iterable of them, is accepted"
            )
    return tables


def _described(point: EntryPoint) -> str:
    package = f" of the package {point.dist.name!r}" if point.dist is not None else ""
    return f"entry point {point.name!r} = {point.value!r} in {ENTRY_POINTS!r}{package}"


def _table_of(causal_lm: type[nn.Module]) -> FamilyRules | None:
    """The table of exactly this class; looks no other class up than those of its name."""
    for family in families():
        if family.model_class == causal_lm.__name__ and _class(family, family.causal_lm) is causal_lm:
            return _looked_up(family)
    return None


@functools.cache
def _looked_up(family: Family) -> FamilyRules:
    find = functools.partial(_class, family)
    return FamilyRules(
        name=family.name,
        causal_lm=find(family.causal_lm),
        forwards={find(name): rule for name, rule in family.forwards.items()},
        mlps={find(name): rule for name, rule in family.mlps.items()},
        attentions={find(name): rule for name, rule in family.attentions.items()},
        containers=frozenset(map(find, family.containers)),
        unset=family.unset,
    )


def _class(family: Family, name: str) -> type[nn.Module]:
    """The class of this path, or of this name in the module of the model's class."""
    module, _, attribute = name.rpartition(".")
    module = module or family.causal_lm.rpartition(".")[0]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the {family.name!r} table names the class {attribute} of {module}, which is not there (transformers "
            f"{transformers_version})"
        ) from error
    assert isinstance(found, type)  # noqa: S101 - for the type checker
    return found


def family_of(model: nn.Module) -> FamilyRules:
    """The table of this model, after checking that every module is in it.

    Raises:
        UnsupportedModelError: names the first module, and its class, that no rule covers, or a setting of the
            configuration that the table does not cover; or the model is not in evaluation mode.
    """
    family = _table_of(type(model))
    if family is None:
        known = ", ".join(sorted(table.model_class for table in families()))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no detach table; there are tables for {known}. {_GUIDE} one"
        )
    if model.training:
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode; dropout is no linear map: call eval()"
        )
    _check_settings(model, family)
    modules = list(model.named_modules())
    activations = {f"{name}.{path}" for name, module in modules for path in _activations(family.mlps.get(type(module)))}
    for name, module in modules:
        if not family.covers(type(module)) and activations.isdisjoint(_path_and_parents(name)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: module {name!r} of class {type(module).__name__} is in no rule of "
                f"the {family.name!r} table; {_GUIDE} it"
            )
    return family


def _check_settings(model: Any, family: FamilyRules) -> None:
    config = model.config.get_text_config()
    for setting in family.unset:
        # Not by its truth: a bound of 0 is a bound.
        if (value := getattr(config, setting, None)) is not None and value is not False:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its configuration has {setting} = {value!r}, which the {family.name!r} table "
                "does not cover; null is accepted"
            )


def _activations(table: MLP | None) -> tuple[str, ...]:
    """Where the activations of an MLP are, whose classes need no rule: their ratio or value is frozen."""
    if table is None:
        return ()
    return (f"{table.experts}.act_fn",) if isinstance(table, Mixture) else (table.activation,)


def _path_and_parents(name: str) -> Iterator[str]:
    """``"a.b.c"``: a, a.b and a.b.c."""
    return accumulate(name.split("."), "{}.{}".format)
