"""Operators on their way to workers: in pieces, whole or not at all."""

import asyncio
import threading
from dataclasses import fields

import pytest
import torch

from operators.core.apply import prepare
from operators.core.artifact import make_artifact, tensors_of
from operators.core.errors import ArtifactError, SteeringError
from steer_server.engine.vllm import transfer
from steer_server.engine.vllm.transfer import IncomingOperators, OperatorSender

CPU = torch.device("cpu")
CHUNK_BYTES = 48


class Workers:
    """Two of them, as the worker's two calls are."""

    def __init__(self):
        self.incoming = [IncomingOperators(), IncomingOperators()]
        self.ready = [{}, {}]
        self.calls = []
        self.change = lambda worker, at, data: data
        self.error = None

    async def call(self, method, digest, *args):
        await asyncio.sleep(0)
        if method == "steering_unload":
            if self.error is not None:
                raise self.error
            for incoming in self.incoming:
                incoming.drop(*digest)
            return [None, None]
        self.calls.append((digest, args[0], len(args[1])))
        if self.error is not None and args[0]:
            raise self.error
        return [self._load(worker, digest, *args) for worker in range(2)]

    def _load(self, worker, digest, at, data, layout):
        if not data and digest not in self.incoming[worker] and digest in self.ready[worker]:
            return True
        found = self.incoming[worker].receive(digest, at, self.change(worker, at, data), layout)
        if found is not None:
            self.ready[worker][digest] = found
        return found is not None


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def workers():
    return Workers()


def _in(dtype, artifact):
    parts = (artifact.factors, artifact.anchor, artifact.substitute_base, artifact.offset)
    factors, *vectors = (part if part is None else part.to(getattr(torch, dtype)) for part in parts)
    return make_artifact(artifact.header.model_copy(update={"dtype": dtype}), factors, *vectors)


@pytest.fixture(params=["exact", "affine", "bfloat16", "low rank", "vector"])
def operator(request, make_operator, low_artifact, make_rank_0):
    return {
        "exact": make_operator(3, 5),
        "affine": make_operator(2, 7, affine=True),
        "bfloat16": _in("bfloat16", make_operator(3, 5, affine=True)),
        "low rank": low_artifact,
        "vector": make_rank_0(40),
    }[request.param]


async def test_every_worker_gets_the_very_operator_in_pieces(workers, operator):
    await OperatorSender(workers.call).send(operator)
    expected = prepare(operator, CPU)
    for ready in workers.ready:
        found, layer = ready[operator.digest]
        assert layer == operator.header.injection_layer
        for each in fields(expected):
            one, other = getattr(found, each.name), getattr(expected, each.name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    sizes = [size for _, _, size in workers.calls if size]
    assert sum(sizes) == operator.nbytes
    assert set(sizes[:-1]) == {CHUNK_BYTES}
    assert [len(incoming) for incoming in workers.incoming] == [0, 0]


async def test_a_small_operator_takes_one_call(workers, make_operator, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4 << 20)
    monkeypatch.setattr(transfer, "_LAST_CHUNK_SECONDS", 5.0)
    await OperatorSender(workers.call).send(make_operator(3, 5))
    assert len(workers.calls) == 1


async def test_operators_that_are_sent_at_once_take_turns(workers, make_operator):
    running = 0

    async def one_at_a_time(method, digest, at, data, layout):
        nonlocal running
        running += bool(data)
        assert running <= 1
        found = await workers.call(method, digest, at, data, layout)
        running -= bool(data)
        return found

    sender = OperatorSender(one_at_a_time)
    both = [make_operator(3, 5, seed=seed) for seed in range(2)]
    await asyncio.gather(*map(sender.send, both))
    order = [digest for digest, _, size in workers.calls if size]
    assert order[:6] == [each.digest for each in both] * 3
    assert all(each.digest in ready for each in both for ready in workers.ready)


async def test_it_is_verified_beside_the_steps_and_asked_for_until_every_worker_is_ready(
    workers, make_operator, monkeypatch
):
    gates, threads = [threading.Event(), threading.Event()], []
    prepare_operator = transfer._IncomingOperator.prepare

    def slowly(operator):
        threads.append(threading.current_thread())
        gates[len(threads) - 1].wait(10)
        return prepare_operator(operator)

    monkeypatch.setattr(transfer._IncomingOperator, "prepare", slowly)
    operator = make_operator(3, 5)
    sending = asyncio.ensure_future(OperatorSender(workers.call).send(operator))
    async with asyncio.timeout(5):
        while len(workers.calls) < 14:
            await asyncio.sleep(0.001)
        gates[0].set()
        while not any(workers.ready):
            await asyncio.sleep(0.001)
        asked = len(workers.calls)
        while len(workers.calls) < asked + 2:
            await asyncio.sleep(0.001)
        assert not sending.done()
        gates[1].set()
        await sending
    assert all(operator.digest in ready for ready in workers.ready)
    assert threading.main_thread() not in threads


async def _leaves_nothing(workers, operator, kind, why):
    with pytest.raises(kind, match=why):
        await OperatorSender(workers.call).send(operator)
    assert [len(incoming) for incoming in workers.incoming] == [0, 0]


async def test_a_flipped_bit_on_the_way_to_one_worker_is_an_error_and_leaves_nothing(workers, make_operator):
    operator = make_operator(3, 5)

    def flip(worker, at, data):
        return bytes([data[0] ^ 1, *data[1:]]) if worker == 1 and at == 2 * CHUNK_BYTES else data

    workers.change = flip
    await _leaves_nothing(workers, operator, ArtifactError, rf"{operator.digest}: .* is damaged")
    workers.change = lambda worker, at, data: data
    await OperatorSender(workers.call).send(operator)
    assert operator.digest in workers.ready[1]


async def test_a_piece_that_is_lost_or_too_long_is_an_error_and_leaves_nothing(workers, make_operator):
    workers.change = lambda worker, at, data: data[:-1] if at == CHUNK_BYTES else data
    await _leaves_nothing(
        workers, make_operator(3, 5), ValueError, f"came for offset {2 * CHUNK_BYTES}; {2 * CHUNK_BYTES - 1} of"
    )
    workers.change = lambda worker, at, data: data if len(data) == CHUNK_BYTES else data + bytes(CHUNK_BYTES)
    await _leaves_nothing(workers, make_operator(3, 5), ValueError, "bytes came for offset")


def test_a_piece_of_an_operator_that_was_dropped_is_an_error():
    with pytest.raises(ValueError, match="its first chunk has not been received"):
        IncomingOperators().receive("sha256:1", 64, b"x", None)


async def test_an_operator_without_a_direction_is_an_error_and_leaves_nothing(workers, make_operator):
    operator = make_operator(2, 5)
    silent = make_artifact(
        operator.header, operator.factors, torch.zeros_like(operator.anchor), operator.substitute_base
    )
    await _leaves_nothing(workers, silent, SteeringError, "has norm 0")


@pytest.mark.parametrize("after", [1, 3])
async def test_a_transfer_that_is_given_up_on_the_way_leaves_nothing(workers, make_operator, after):
    sending = asyncio.ensure_future(OperatorSender(workers.call).send(make_operator(3, 5)))
    while len(workers.calls) < after:
        await asyncio.sleep(0)
    assert [len(incoming) for incoming in workers.incoming] == [1, 1]
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert [len(incoming) for incoming in workers.incoming] == [0, 0]


async def test_the_error_of_a_dead_engine_is_the_first_one(workers, make_operator):
    workers.error = RuntimeError("the engine died")
    with pytest.raises(RuntimeError, match="the engine died"):
        await OperatorSender(workers.call).send(make_operator(3, 5))


def test_an_operator_that_is_begun_again_starts_anew(make_operator, monkeypatch):
    monkeypatch.setattr(transfer, "_LAST_CHUNK_SECONDS", 5.0)
    operator = make_operator(3, 5)
    tensors = tensors_of(operator)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    layout = (operator.header_json, "float32", [(name, list(tensor.shape)) for name, tensor in tensors.items()])
    incoming = IncomingOperators()
    assert incoming.receive(operator.digest, 0, data[:9], layout) is None
    assert incoming.receive(operator.digest, 0, data[:-1], layout) is None
    assert len(incoming) == 1
    found, layer = incoming.receive(operator.digest, len(data) - 1, data[-1:], None)
    assert torch.equal(found.factors, operator.factors)
    assert (layer, len(incoming)) == (2, 0)
