"""Steering inside vLLM: the one file that knows its internals (0.32).

``worker_cls`` names :class:`SteeringWorker`. It is the platform's own worker, with three things added, all of them on
the instance: a hook on every decoder layer, a look at each step before the model runs, and calls that load operators
and hand out accounts (``collective_rpc``). What is looked at is checked by name when the model is loaded, so that a
vLLM in which something moved is refused instead of half steered.

    V1 runner   ``_model_forward`` of the runner instance is wrapped (CPU, and CUDA where it is selected)
    V2 runner   ``prepare_inputs`` of the instance's ``model_state`` is wrapped

A hook calls the op ``steering::push``, which is opaque to Dynamo: it changes the rows of the step's plan in place and
leaves all other bits alone. Layers hand their input on as ``hidden_states + residual`` in most models of vLLM; the norm
is taken over the sum and the push is written into ``hidden_states``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.platforms import current_platform

from operators.core.apply import PreparedOperator, steer
from steer_server.engine.vllm.limits import check_supported
from steer_server.engine.vllm.pushes import Segment, send
from steer_server.engine.vllm.scoring import Kept, compare
from steer_server.engine.vllm.step_steering import Account, BatchSteering, Site, Sited, Use
from steer_server.engine.vllm.transfer import Arrivals, Layout

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

EXTRA = "steering"
"""Key of ``SamplingParams.extra_args``: {"key", "salt", "uses": [[digest, rule, strength, blend], ...], "keep": int}.

``keep``: the position from which on the last hidden states are kept, for a score; or None.
"""

_BOOK_EVERY = 64
"""Steps whose measurements may wait on the device: reading them makes the host wait for it."""


class _Step:
    """What the hooks of this process do in the forward pass under way. One model, one pass at a time."""

    sites: Mapping[int, Site] = {}
    kept: Sequence[tuple[Kept, Segment]] = ()
    inputs: tuple[torch.Tensor, torch.Tensor] | None = None
    """Rows and what they should be when the first layer gets them; looked at in the self-test only."""
    worst: float = 0.0
    """By how much they were not, relative to their size."""


def _push(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    if layer == 0 and _Step.inputs is not None:
        _compare_inputs(hidden, *_Step.inputs)
    site = _Step.sites.get(layer)
    if site is None:
        return
    width = hidden.shape[-1]
    rows = hidden.view(-1, width)
    rest = None if residual is None else residual.view(-1, width)[site.rows]
    moved, site.doses = steer(rows[site.rows], site.push, rest)
    rows.index_copy_(0, site.rows, moved)


def _compare_inputs(hidden: torch.Tensor, rows: torch.Tensor, expected: torch.Tensor) -> None:
    found = hidden.view(-1, hidden.shape[-1])[rows]
    _Step.worst = max(_Step.worst, float((found - expected).abs().max() / expected.abs().max()))


_LIBRARY: Any = torch.library.Library("steering", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("push(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
_LIBRARY.impl("push", _push, "CompositeExplicitAutograd")
_LIBRARY._register_fake("push", lambda _hidden, _residual, _layer: None)


class SteeringWorker(_Worker):  # type: ignore[misc]
    """The platform's worker, which also steers. Its public methods are called by ``collective_rpc``."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and prepares it. Raises :class:`RuntimeError` for what is not supported, by name."""
        check_supported(self.vllm_config)
        if not current_platform.is_cpu() and self.vllm_config.compilation_config.splitting_ops:
            # What is pushed is decided on the host in every step: captured pieces end before it.
            self.vllm_config.compilation_config.splitting_ops.append("steering::push")
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        self._steering = BatchSteering(self.model_config.dtype)
        self._embed = _embedder(model)
        self._requests: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._kept: dict[str, Kept] = {}
        self._pending: list[Mapping[int, Site]] = []
        self._arrivals = Arrivals()
        self._watching = False
        self._seen: set[str] = set()
        self._layers = _decoder_layers(model)
        for layer, module in enumerate(self._layers):
            module.register_forward_pre_hook(_hook(module, layer), with_kwargs=True)
        model.register_forward_hook(_keep)
        self._watch_runner()

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """One step. Requests that ended are kept until their accounts are taken."""
        for request in scheduler_output.finished_req_ids:
            self._requests.pop(request, None)
        # The V2 runner is told of a preempted request that comes back as of a new one.
        for new in scheduler_output.scheduled_new_reqs:
            self._meet(new)
            self._steering.arrives(new.req_id, new.num_computed_tokens)
        known = scheduler_output.scheduled_cached_reqs
        for request, computed in zip(known.req_ids, known.num_computed_tokens, strict=True):
            if request in known.resumed_req_ids:
                self._steering.arrives(request, computed)
        self._seen.clear()
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            for request in scheduler_output.num_scheduled_tokens.keys() - self._seen:
                self._steering.missed(request)
            # No other pass, of whatever kind, is to find the pushes of this one.
            for site in _Step.sites.values():
                site.let_go()
            _Step.sites, _Step.kept, _Step.inputs = {}, (), None

    # What the server calls.

    def steering_call(self, method: str, args: Sequence[Any]) -> tuple[Any, str]:
        """What one of these methods returns, or why it failed: where a worker raises, vLLM confuses the others' answers
        with those to the next call.
        """
        try:
            return getattr(self, method)(*args), ""
        except Exception as error:  # noqa: BLE001 - told instead
            return None, f"{type(error).__name__}: {error}"

    def steering_load(self, digest: str, at: int, data: bytes, layout: Layout | None) -> bool:
        """Takes a piece of an operator, or is asked again; true once the operator is ready (:mod:`.transfer`)."""
        if not data and digest not in self._arrivals and digest in self._steering.loaded:
            # Another worker took longer.
            return True
        found = self._arrivals.take(digest, at, data, layout)
        if found is not None:
            operator, layer = found
            self._steering.load(digest, Sited(operator.to(self.device), layer))
        return found is not None

    def steering_load_random(self, digest: str, layer: int) -> None:
        """An operator for the self-test: of rank 2, two positions, in no particular direction."""
        d = self.model_config.get_hidden_size()
        generator = torch.Generator().manual_seed(layer)
        basis = torch.linalg.qr(torch.randn(d, 2, generator=generator)).Q
        factors = torch.randn(2, 2, d, generator=generator)
        vectors = torch.randn(2, d, generator=generator)
        place = partial(torch.Tensor.to, device=self.device, dtype=torch.float32)
        operator = PreparedOperator(
            place(factors), place(basis), None, place(vectors[0]), place(vectors[1] / vectors[1].norm())
        )
        self._steering.load(digest, Sited(operator, layer))

    def steering_unload(self, digests: Sequence[str]) -> None:
        """Forgets operators, and what has come of them."""
        for digest in digests:
            self._arrivals.drop(digest)
            self._steering.unload(digest)

    def steering_take(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """The accounts of requests, which are forgotten; None for one that never reached the model."""
        self._book()
        return [self._take(key) for key in keys]

    def steering_score(self, steered: str, plain: str, ids: Sequence[int], at: int) -> tuple[list[float], list[float]]:
        """What :func:`.scoring.compare` makes of the states kept of two requests, for a text's tokens from ``at`` on.

        They are kept until the requests' accounts are taken. Raises :class:`ValueError` where a state was not kept.
        """
        ours, theirs = (self._kept.get(key, Kept(0)) for key in (steered, plain))
        return compare(self.model_runner.get_model().compute_logits, ours, theirs, ids, at)

    def steering_state(self) -> dict[str, int]:
        """How much is held: operators, their bytes, operators on their way, and each kind of what a request has."""
        loaded = self._steering.loaded.values()
        return {
            "operators": len(loaded),
            "bytes": sum(sited.operator.nbytes for sited in loaded),
            "arriving": len(self._arrivals),
            "requests": len(self._requests),
            "keys": len(self._keys),
            "kept": len(self._kept),
            "followed": len(self._steering),
        }

    def steering_layers(self) -> int:
        """How many decoder layers can be pushed."""
        return len(self._layers)

    def steering_watch_inputs(self, on: bool) -> float:
        """Holds what the first layer gets against the embeddings that pushes are made of, from now on or no longer.

        Returns the largest difference so far, relative to the embeddings.
        """
        self._watching = on
        _Step.inputs, worst = None, _Step.worst
        _Step.worst = 0.0
        return worst

    # What happens in a step.

    def _meet(self, new: Any) -> None:
        asked = (new.sampling_params.extra_args or {}).get(EXTRA) if new.sampling_params else None
        if asked is None or new.req_id in self._requests:
            return
        self._requests[new.req_id] = key = asked["key"]
        self._keys[key] = new.req_id
        if asked["uses"]:
            self._steering.follow(new.req_id, tuple(Use(*use) for use in asked["uses"]), asked["salt"])
        if asked["keep"] is not None:
            self._kept[key] = Kept(asked["keep"])

    def _take(self, key: str) -> dict[str, Any] | None:
        request = self._keys.pop(key, None)
        self._kept.pop(key, None)
        if request is None:
            return None
        # vLLM has ended it, and says so with its next step.
        self._requests.pop(request, None)
        if request not in self._steering:
            return None
        account: Account = self._steering.account(request)
        self._steering.forget(request)
        return {
            "cached": account.cached,
            "layers": {str(found.layer): list(found.doses) for found in account.layers},
            "failure": account.failure,
        }

    def _watch_runner(self) -> None:
        runner = self.model_runner
        if self.use_v2_model_runner:
            _require(runner, "model_state", "req_states")
            state = runner.model_state
            _require(state, "prepare_inputs")
            inner = state.prepare_inputs

            def prepare_inputs(batch: Any, states: Any) -> Any:
                self._load_step(batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np, batch.input_ids)
                return inner(batch, states)

            state.prepare_inputs = prepare_inputs
        else:
            _require(runner, "_model_forward", "input_batch", "query_start_loc", "input_ids")
            forward = runner._model_forward

            def model_forward(*args: Any, **kwargs: Any) -> Any:
                batch = runner.input_batch
                self._load_step(
                    batch.req_ids, runner.query_start_loc.np, batch.num_computed_tokens_cpu, runner.input_ids.gpu
                )
                return forward(*args, **kwargs)

            runner._model_forward = model_forward

    def _load_step(
        self, requests: Sequence[str], starts: np.ndarray[Any, Any], computed: np.ndarray[Any, Any], ids: torch.Tensor
    ) -> None:
        """Works out the pushes of the step that is about to run."""
        _Step.sites, _Step.kept = {}, ()
        if not self._requests:
            return
        segments = [
            Segment(request, int(starts[row]), int(computed[row]), int(starts[row + 1] - starts[row]))
            for row, request in enumerate(requests)
            if request in self._requests
        ]
        _Step.kept = [
            (self._kept[key], segment) for segment in segments if (key := self._requests[segment.request]) in self._kept
        ]
        segments = [segment for segment in segments if segment.request in self._steering]
        self._seen.update(segment.request for segment in segments)
        if not segments:
            return
        rows = torch.from_numpy(
            np.concatenate([np.arange(s.start, s.start + s.count, dtype=np.int64) for s in segments])
        )
        positions = torch.from_numpy(
            np.concatenate([np.arange(s.first, s.first + s.count, dtype=np.int64) for s in segments])
        )
        at = send(rows, ids.device)
        with torch.inference_mode():
            x = self._embed(ids[at], send(positions, ids.device))
            sites = self._steering.prepare(segments, x, self._earlier)
        _Step.sites = sites
        _Step.inputs = (at, x) if self._watching else None
        self._pending.append(sites)
        if len(self._pending) > _BOOK_EVERY:
            last = self._pending.pop()
            self._book()
            self._pending.append(last)

    def _book(self) -> None:
        for sites in self._pending:
            self._steering.book(sites)
        self._pending.clear()

    def _earlier(self, request: str, count: int) -> torch.Tensor:
        """Embeddings of a request's first tokens, from what the runner knows of it."""
        runner = self.model_runner
        if self.use_v2_model_runner:
            known = runner.req_states
            ids = known.all_token_ids.gpu[known.req_id_to_index[request], :count]
        else:
            batch = runner.input_batch
            ids = torch.from_numpy(batch.token_ids_cpu[batch.req_id_to_index[request], :count])
        return self._embed(ids.to(self.device), torch.arange(count, device=self.device))


def _keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    for kept, segment in _Step.kept:
        first = max(segment.first, kept.first)
        states = output[segment.start + first - segment.first : segment.start + segment.count]
        if len(states):
            kept.add(states.clone(), first)


def _hook(module: nn.Module, layer: int) -> Callable[..., None]:
    names = list(inspect.signature(module.forward).parameters)
    _require_names(module, names, "hidden_states")

    def take(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = names.index(name) if name in names else len(args)
        return args[place] if place < len(args) else None

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Traced, the op is always there; in eager mode a layer without anything to do costs next to nothing.
        if not torch.compiler.is_compiling() and layer not in _Step.sites and _Step.inputs is None:
            return
        torch.ops.steering.push(take(args, kwargs, "hidden_states"), take(args, kwargs, "residual"), layer)

    return hook


def _embedder(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``embed(ids, positions)``: (T, d) as the first block receives it; the learned positions of GPT-2 are added."""
    learned = getattr(getattr(model, "transformer", None), "wpe", None)

    def embed(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = model.embed_input_ids(ids)
        return x if learned is None else x + learned(positions)

    return embed


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    for path in ("model.layers", "transformer.h"):
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise RuntimeError(f"{type(model).__name__} has its decoder layers neither in model.layers nor in transformer.h")


def _require(owner: Any, *names: str) -> None:
    _require_names(owner, dir(owner), *names)


def _require_names(owner: Any, there: Iterable[str], *names: str) -> None:
    from vllm import __version__

    missing = [name for name in names if name not in there]
    if missing:
        raise RuntimeError(
            f"{type(owner).__name__} of vLLM {__version__} has no {', '.join(missing)}: "
            "something moved since 0.32, for which this worker was written"
        )
