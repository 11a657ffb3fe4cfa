"""Steering inside vLLM's worker processes. With ``layer_hooks`` and ``runner_hooks``, all that knows their internals.

``worker_cls`` names :class:`SteeringWorker`. It is the platform's own worker with three additions, all made on
instances: a hook on every decoder layer, a look at each step before the model runs, and methods that load operators and
hand out measurements (called by ``collective_rpc``). What they rely on is checked by name when the model is loaded, so
that a vLLM in which something moved is refused instead of half steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from steer_server.engine.vllm.limits import check_supported
from steer_server.engine.vllm.start_problem import reports_problems
from steer_server.engine.vllm.transfer import IncomingOperators, TensorLayout
from steer_server.engine.vllm.worker.layer_hooks import PUSH_OP, forward_pass, install_hooks, make_embedder
from steer_server.engine.vllm.worker.pushes import TokenSpan, concatenate_ranges, copy_to_device
from steer_server.engine.vllm.worker.runner_hooks import V1RunnerHook, V2RunnerHook
from steer_server.engine.vllm.worker.scoring import KeptStates, score_states
from steer_server.engine.vllm.worker.sized_worker import SizedWorker
from steer_server.engine.vllm.worker.step_push import StepPush
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker.witness import Witness
from steer_server.engine.vllm.worker_protocol import SteeringArgs
from steer_server.types import Report

_MAX_UNRECORDED_STEPS = 64
"""Steps whose measurements may wait on the device: reading them makes the host wait for it."""


class SteeringWorker(SizedWorker):
    """The platform's worker, which also steers. The server calls its ``steering_`` methods."""

    @reports_problems
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and hooks it. Raises :class:`RuntimeError` for what is not supported, by name."""
        check_supported(self.vllm_config)
        if not current_platform.is_cpu() and self.vllm_config.compilation_config.splitting_ops:
            # The host decides in every step what is pushed, so the op must not be captured in a graph.
            self.vllm_config.compilation_config.splitting_ops.append(PUSH_OP)
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        self._steering = StepSteering()
        self._witness = Witness()
        self._embed = make_embedder(model)
        self._keys: dict[str, str] = {}
        """Keys of running requests, by vLLM's request id."""
        self._requests: dict[str, str] = {}
        """vLLM's request ids by key, until the request's measurement is taken."""
        self._kept_states: dict[str, KeptStates] = {}
        """By key, until the request's measurement is taken."""
        self._unrecorded: list[Mapping[int, StepPush]] = []
        """The pushes of steps whose measurements have not been read from the device."""
        self._incoming = IncomingOperators()
        self._checks_inputs = False
        self._prepared_requests: set[str] = set()
        """Steered requests for which the step under way was prepared."""
        self._num_layers = install_hooks(model)
        runner_hook = V2RunnerHook if self.use_v2_model_runner else V1RunnerHook
        self._runner_hook = runner_hook(self.model_runner, self._prepare_step)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """One step. The state of requests that ended is kept until their measurements are taken."""
        for request in scheduler_output.finished_req_ids:
            self._keys.pop(request, None)
        # The V2 runner announces a preempted request that comes back as a new one.
        for new in scheduler_output.scheduled_new_reqs:
            self._add_request(new)
            self._start_at(new.req_id, new.num_computed_tokens)
        known = scheduler_output.scheduled_cached_reqs
        for request, computed in zip(known.req_ids, known.num_computed_tokens, strict=True):
            if request in known.resumed_req_ids:
                self._start_at(request, computed)
        self._prepared_requests.clear()
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            for request in scheduler_output.num_scheduled_tokens.keys() - self._prepared_requests:
                self._steering.fail_unprepared(request)
            with torch.inference_mode():
                forward_pass.movements.measure()
            for step_push in forward_pass.pushes.values():
                step_push.release()
            forward_pass.clear()

    # What the server calls.

    def steering_call(self, method: str, args: Sequence[Any]) -> tuple[Any, str]:
        """What a method returns, or why it failed.

        Exceptions do not pass: where one worker raises, vLLM takes the answers of the others for those to its next
        call.
        """
        try:
            return getattr(self, method)(*args), ""
        except Exception as error:  # noqa: BLE001 - returned instead
            return None, f"{type(error).__name__}: {error}"

    def steering_load(self, digest: str, offset: int, data: bytes, layout: TensorLayout | None) -> bool:
        """Takes the next chunk of an operator, if any (:mod:`.transfer`). Whether the operator can be used now."""
        if not data and digest not in self._incoming and digest in self._steering.loaded:
            # Asked again because another worker is not ready.
            return True
        received = self._incoming.receive(digest, offset, data, layout)
        if received is not None:
            operator, layer = received
            self._steering.load(digest, LoadedOperator(operator.to(self.device), layer))
        return received is not None

    def steering_unload(self, digests: Sequence[str]) -> None:
        """Forgets operators, and what has been received of them."""
        for digest in digests:
            self._incoming.drop(digest)
            self._steering.unload(digest)

    def steering_take(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """The measurements of requests, which are then forgotten; None for one that never reached the model."""
        self._record_steps()
        return [self._take_measurement(key) for key in keys]

    def steering_score(
        self,
        steered_key: str,
        plain_key: str,
        ids: Sequence[int],
        start: int,
        top: int = 0,
        words: Sequence[Sequence[int]] = (),
    ) -> list[tuple[Any, ...]]:
        """:func:`.scoring.score_states` of two requests, for a text's tokens from ``start`` on.

        Their states are kept until their measurements are taken. Raises :class:`ValueError` for one that was not kept.
        """
        steered, plain = (self._kept_states.get(key, KeptStates(0)) for key in (steered_key, plain_key))
        report = Report(top, tuple(map(tuple, words)))
        compute_logits = self.model_runner.get_model().compute_logits
        return [astuple(each) for each in score_states(compute_logits, steered, plain, ids, start, report)]

    def steering_state(self) -> dict[str, int]:
        """Counts of what is held: operators, their bytes, incoming operators, and each kind of state of a request."""
        loaded = self._steering.loaded.values()
        return {
            "operators": len(loaded),
            "bytes": sum(one.operator.nbytes for one in loaded),
            "incoming": len(self._incoming),
            "requests": len(self._requests),
            "keys": len(self._keys),
            "kept_states": len(self._kept_states),
            "steered": len(self._steering),
            "watched": len(self._witness),
        }

    def steering_layers(self) -> int:
        """Number of decoder layers that can be pushed."""
        return self._num_layers

    def steering_check_inputs(self, enabled: bool) -> float:
        """Switches the comparison of the first layer's input with the embeddings that pushes are computed from.

        Returns the largest difference since the last call, relative to the embeddings.
        """
        self._checks_inputs = enabled
        forward_pass.expected_inputs, error = None, forward_pass.input_error
        forward_pass.input_error = 0.0
        return error

    # What happens in a step.

    def _start_at(self, request: str, position: int) -> None:
        self._steering.start_at(request, position)
        self._witness.start_at(request, position)

    def _add_request(self, new: Any) -> None:
        steering = SteeringArgs.from_extra_args(new.sampling_params.extra_args) if new.sampling_params else None
        if steering is None or new.req_id in self._keys:
            return
        self._keys[new.req_id] = steering.key
        self._requests[steering.key] = new.req_id
        if steering.settings:
            self._steering.add_request(new.req_id, steering.settings, steering.salt)
            self._witness.add(new.req_id, steering.looks_at)
        if steering.keep_from is not None:
            self._kept_states[steering.key] = KeptStates(steering.keep_from)

    def _take_measurement(self, key: str) -> dict[str, Any] | None:
        request = self._requests.pop(key, None)
        self._kept_states.pop(key, None)
        if request is None:
            return None
        # vLLM has ended it, but names it as finished only in its next step.
        self._keys.pop(request, None)
        seen = self._witness.take(request)
        if request not in self._steering:
            return None
        measurement = self._steering.measurement(request)
        self._steering.remove_request(request)
        return {
            "cached": measurement.cached,
            "layers": {
                str(measured.layer): {"first": measured.first, "doses": list(measured.doses)}
                for measured in measurement.layers
            },
            "seen": {str(layer): states for layer, states in seen.items()},
            "failure": measurement.failure,
        }

    def _prepare_step(
        self, requests: Sequence[str], starts: np.ndarray[Any, Any], computed: np.ndarray[Any, Any], ids: torch.Tensor
    ) -> None:
        """Computes the pushes of the step that is about to run; see :data:`.runner_hooks.BeforeStep`."""
        forward_pass.pushes, forward_pass.sights, forward_pass.kept = {}, {}, ()
        if not self._keys:
            return
        spans = [
            TokenSpan(request, int(starts[row]), int(computed[row]), int(starts[row + 1] - starts[row]))
            for row, request in enumerate(requests)
            if request in self._keys
        ]
        forward_pass.kept = [
            (self._kept_states[key], span) for span in spans if (key := self._keys[span.request]) in self._kept_states
        ]
        spans = [span for span in spans if span.request in self._steering]
        self._prepared_requests.update(span.request for span in spans)
        if not spans:
            return
        if len(self._unrecorded) >= _MAX_UNRECORDED_STEPS:
            self._record_steps()
        with torch.inference_mode():
            forward_pass.sights = self._witness.watch(spans, ids)
            pushes = self._steering.prepare(spans, partial(self._embed_spans, ids), self._embed_prefix)
        if not pushes:
            return
        forward_pass.pushes = pushes
        self._unrecorded.append(pushes)

    def _embed_spans(self, ids: torch.Tensor, spans: Sequence[TokenSpan]) -> torch.Tensor:
        """Embeddings of tokens of the step whose ids (T,) these are; see :data:`.step_steering.EmbedSpans`."""
        # On accelerators these ranges are built on the host and copied without waiting for the device.
        counts = [span.num_tokens for span in spans]
        rows, positions = (
            copy_to_device(concatenate_ranges(starts, counts), ids.device)
            for starts in ([span.start_row for span in spans], [span.first_position for span in spans])
        )
        x = self._embed(ids[rows], positions)
        forward_pass.expected_inputs = (rows, x) if self._checks_inputs else None
        return x

    def _record_steps(self) -> None:
        for pushes in self._unrecorded:
            self._steering.record(pushes)
        self._unrecorded.clear()
        self._witness.read()

    def _embed_prefix(self, request: str, start: int, end: int) -> torch.Tensor:
        """Embeddings (end - start, d) of tokens of a request; see :data:`.step_steering.EmbedPrefix`."""
        ids = self._runner_hook.ids_of(request, start, end)
        return self._embed(ids.to(self.device), torch.arange(start, end, device=self.device))
