"""What to build, and what its defaults come to on a given model and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from operators.builder import memory
from operators.builder.concept import Concept
from operators.core import capacity
from operators.core.defaults import default_recommended
from operators.core.errors import BuildError
from operators.core.file_format import MAX_BYTES
from operators.core.header import Member, NeutralTexts, Profile, Recommended
from operators.maps.replay import VECTORS_PER_PASS
from operators.maps.sketch import (
    FIRST_RANK,
    POWER_ITERATIONS,
    PROBES,
    TOLERANCE_POWER_ITERATIONS,
    TOLERANCE_PROBES,
    num_products,
)
from operators.model.loading import LoadedModel

DEFAULT_RANK = 64
"""Rank of an operator where none is given; the README (*How much rank*) has the measurements behind it."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build: one operator of one or more texts.

    ``layer`` None means the default of two thirds of the depth, floor(2L/3). ``rank`` None means DEFAULT_RANK, or the
    exact operator where that takes no more numbers; "full" means the exact one. ``tolerance``, in place of a rank, asks
    for the smallest rank with that residual |J - U B|_F / |J|_F. ``weighting`` and ``seed`` are those of the sketch.
    ``weights`` are the texts' weights in a mixture (:mod:`operators.builder.combine`); without, the operator is the
    mean of their maps. ``neutral`` are the texts that the contrast anchor is measured against; None means those that
    ship. ``words``, ``recommended`` (None means the default of profile and model) and ``members`` are only written
    into the header.
    """

    texts: tuple[Concept, ...]
    profile: Profile = "residual"
    layer: int | None = None
    rank: int | Literal["full"] | None = None
    tolerance: float | None = None
    weighting: Literal["embedding", "white"] = "embedding"
    seed: int = 0
    words: tuple[str, ...] = ()
    recommended: Recommended | None = None
    weights: tuple[float, ...] = ()
    members: tuple[Member, ...] = ()
    neutral: NeutralTexts | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each text's map in the operator's."""
        return self.weights or (1.0 / len(self.texts),) * len(self.texts)

    def setting_on(self, loaded: LoadedModel) -> Recommended:
        """What the operator recommends on this model."""
        return self.recommended or default_recommended(self.profile, type(loaded.model).__name__)

    @property
    def num_probes(self) -> int:
        """Random cotangents of the sketch's certificate."""
        return PROBES if self.tolerance is None else TOLERANCE_PROBES

    @property
    def power_iterations(self) -> int:
        """q of the sketch."""
        return POWER_ITERATIONS if self.tolerance is None else TOLERANCE_POWER_ITERATIONS

    def num_products(self, rank: int, d: int) -> int:
        """JVPs and VJPs of a sketch of this rank."""
        return num_products(rank, d, power_iterations=self.power_iterations, probes=self.num_probes)

    def num_passes(self, rank: int | None) -> int:
        """Passes over the blocks of a streamed model: one to record, one for each product of the sketch."""
        return 2 if rank is None else 2 + 2 * self.power_iterations

    @property
    def num_positions(self) -> int:
        """n, the number of blocks: the tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)


@dataclass(frozen=True)
class BuildParameters:
    """The numbers of one build. Filled by :func:`resolve_spec`."""

    layer: int
    rank: int | None
    """Of the sketch; with a tolerance, that of the first attempt. None means the exact operator."""
    vectors_per_pass: int
    """Tangents or cotangents that go through the model at a time, within the memory."""


def resolve_spec(
    spec: BuildSpec, loaded: LoadedModel, *, max_memory: int | None = None, streamed: bool | None = None
) -> BuildParameters:
    """What the defaults of ``spec`` come to on this model, after checking all that can be checked before the build.

    Args:
        max_memory: bytes beside the model, and of the host where its blocks are streamed to an accelerator, whose own
            bound the model has; None means most of what is free.
        streamed: whether its blocks will be read one at a time; None means as it was loaded.

    Raises:
        BuildError: the layer, rank or tolerance is out of range; or the operator takes more memory than there is,
            or would be larger than any reader accepts.
    """
    check_first_token(spec.setting_on(loaded))
    layer = resolve_layer(spec.layer, spec.profile, loaded)
    rank = _resolve_rank(spec, loaded)
    vectors = vectors_per_pass(spec, loaded, layer, rank, max_memory=max_memory, streamed=streamed)
    return BuildParameters(layer, rank, vectors)


def check_first_token(setting: Recommended) -> None:
    """Raises :class:`BuildError` for an anchor at the first token where the positions leave that token out."""
    if setting.first_token == "anchor" and not setting.positions.count(0, 1, prompt_tokens=1):
        raise BuildError(
            f"first_token is 'anchor', and positions {setting.positions} leave the first token out; positions that "
            "have it (all, first, prompt, 0..8), or first_token 'operator', are accepted"
        )


def resolve_layer(layer: int | None, profile: Profile, loaded: LoadedModel) -> int:
    """The layer to build at. Raises :class:`BuildError` when there is no such layer for this profile."""
    if layer is None:
        return max(1, 2 * loaded.num_layers // 3)
    # The residual operator is added to the input of block `layer`, so that block must exist.
    last = loaded.num_layers if profile == "golden" else loaded.num_layers - 1
    if not 1 <= layer <= last:
        raise BuildError(f"layer {layer} of {loaded.name} for profile {profile!r}; 1 to {last} are accepted")
    return layer


def vectors_per_pass(
    spec: BuildSpec,
    loaded: LoadedModel,
    layer: int,
    rank: int | None,
    *,
    max_memory: int | None,
    streamed: bool | None = None,
) -> int:
    """How many tangents or cotangents fit into one pass of a build at ``layer`` with ``rank`` (None: exact).

    Raises:
        BuildError: not even one fits into ``max_memory`` and the device's, or the operator's file would exceed
            MAX_BYTES.
    """
    n, d = spec.num_positions, loaded.hidden_size
    itemsize = torch.promote_types(loaded.dtype, torch.float32).itemsize
    num_bytes = (n * d * d if rank is None else (n + 1) * rank * d) * itemsize
    if num_bytes > MAX_BYTES:
        raise BuildError(
            f"the operator of {n} tokens at hidden size {d} takes {num_bytes} bytes; at most {MAX_BYTES} are accepted"
        )
    streamed = loaded.blocks is not None if streamed is None else streamed
    estimate = estimate_memory(spec, loaded, layer, rank, streamed=streamed)
    subject = f"the operator of {n} tokens of {loaded.name} at layer {layer}"
    device, bound = loaded.runs_on, loaded.device_memory
    fit = partial(memory.rows_within, limit=VECTORS_PER_PASS, subject=subject)
    if streamed and device.type != "cpu":
        # Two memories, each with its bound.
        host = memory.MemoryEstimate(memory.host_bytes(loaded, n, rank), per_row=1)
        fit(_budget(max_memory, torch.device("cpu")), host, where="of the host beside the program")
        return fit(_budget(bound, device), estimate, where=f"of {device} beside the program", option="--device-memory")
    if bound is not None:
        weights = sum(weight.numel() * weight.itemsize for weight in loaded.model.parameters())
        fit(bound - weights, estimate, option="--device-memory")
        bound = min(bound - weights, _budget(max_memory, device))
    where = f"beside the {'program' if streamed else 'model'}"
    return fit(_budget(max_memory, device) if bound is None else bound, estimate, where=where)


def _budget(bound: int | None, device: torch.device) -> int:
    return capacity.free_memory(device) if bound is None else bound


def estimate_memory(
    spec: BuildSpec, loaded: LoadedModel, layer: int, rank: int | None, *, streamed: bool
) -> memory.MemoryEstimate:
    """What a build takes beside the model, and beside the program where the model's blocks are streamed.

    For an accelerator, of its memory; :func:`~operators.builder.memory.host_bytes` is what streamed blocks take of the
    host's.
    """
    n, d, texts = spec.num_positions, loaded.hidden_size, len(spec.texts)
    # The widest product is the last one: the basis and the probes.
    width = d if rank is None else num_products(rank, d, power_iterations=0, probes=spec.num_probes)
    if streamed:
        on_accelerator, sketched = loaded.runs_on.type != "cpu", rank is not None
        return memory.estimate_streamed(
            *(loaded, n, layer, width, texts), sketched=sketched, on_accelerator=on_accelerator
        )
    if rank is None:
        return memory.estimate_exact(loaded, n, layer, texts)
    return memory.estimate_sketch(loaded, n, layer, width, texts)


def _resolve_rank(spec: BuildSpec, loaded: LoadedModel) -> int | None:
    """The rank to sketch, with a tolerance the first one; None means the exact operator."""
    d, n = loaded.hidden_size, spec.num_positions
    if spec.tolerance is not None:
        if spec.rank is not None:
            raise BuildError(f"rank {spec.rank} and tolerance {spec.tolerance:g} were both given; one is accepted")
        if not 0.0 < spec.tolerance < 1.0:
            raise BuildError(f"tolerance is {spec.tolerance:g}; a number between 0 and 1 is accepted")
        return FIRST_RANK
    if spec.rank == "full":
        return None
    if spec.rank is None:
        return DEFAULT_RANK if DEFAULT_RANK * (n + 1) < n * d and d > DEFAULT_RANK else None
    if not 1 <= spec.rank <= d:
        raise BuildError(f"rank is {spec.rank}; 1 to {d} (the hidden size of {loaded.name}) or 'full' are accepted")
    return spec.rank
