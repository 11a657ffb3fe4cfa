"""Words through the registry: what a lens makes of them, at which strength, and what is refused."""

import asyncio
import math
import threading
from contextlib import ExitStack

import pytest

from operators.core.apply import Setting
from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.errors import ModelError
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.core.store import Store
from operators.model.unembedding import LoadedUnembedding, loaded_unembedding
from operators.model.words import word_direction, word_operator
from steer_server.caller import CALLER, Caller
from steer_server.errors import (
    DigestNotServedError,
    InvalidRequestError,
    OperatorUnusableError,
    QueueFullError,
    SteerServerError,
    UnknownOperatorError,
)
from steer_server.registry import Registry
from steer_server.types import OperatorUse, SteeredWord, WeightedWord
from steer_server.words import BesideTheLoop, WordDirections

FIRST = Positions(end=1)


def _curve(*points):
    return DoseCurve(
        words=("chess",),
        prompts=2,
        prompts_digest=f"sha256:{'5' * 64}",
        tokens=8,
        plain_hit_rate=0.0,
        points=tuple(
            DosePoint(strength=strength, kl_p95=kl, kl_mean=kl / 4, hit_rate=0.5, useful_rate=0.25)
            for strength, kl in points
        ),
    )


@pytest.fixture
def lens(llama, make_random_lens):
    """With a curve from 0.125 nats at strength 0.05 to 2 nats at 0.2, of which it recommends 0.5 nats at 0.1."""
    curve = _curve((0.05, 0.125), (0.1, 0.5), (0.2, 2.0))
    recommended = Recommended(strength=0.1, blend=1.0, positions=FIRST)
    return make_random_lens(llama, lens={"curve": curve, "default_kl": 0.5}, recommended=recommended)


@pytest.fixture
def directions(llama):
    return WordDirections(lambda: loaded_unembedding(llama.model), llama.tokenizer, max_kept=3)


@pytest.fixture
def registry(tmp_path, model_info, lens, artifact, llama, make_random_lens, directions):
    store = Store(tmp_path)
    store.save("lens", lens)
    store.save("bare", make_random_lens(llama, seed=1))
    store.save("golden", artifact)
    return Registry(store, model_info, max_bytes=1 << 20, max_dose=1.0, words=directions)


def words(*texts, **weighted):
    return tuple(WeightedWord(text) for text in texts) + tuple(WeightedWord(*item) for item in weighted.items())


def applied(registry, *args, **fields):
    (use,) = registry.plan((OperatorUse(*args, **fields),)).applications
    return use


def test_a_word_becomes_the_vector_of_the_lens(registry, lens, llama):
    use = applied(registry, "lens", words=words("bridge"))
    expected = word_operator(lens, {"bridge": 1.0}, loaded_unembedding(llama.model), llama.tokenizer)
    assert use.artifact.digest == expected.digest != lens.digest
    assert (use.name, use.lens_digest) == ("lens", lens.digest)
    assert use.words == (SteeredWord("bridge", 1.0, expected.header.vector.words[0].ids),)
    assert use.words[0].token_ids
    assert use.layer == lens.header.injection_layer


def test_words_without_a_name_are_for_the_lens_of_that_name(registry):
    assert applied(registry, "", words=words("bridge")).name == "lens"
    with pytest.raises(UnknownOperatorError, match="no operator ''") as caught:
        registry.plan((OperatorUse(""),))
    assert "lens`" not in str(caught.value)
    with pytest.raises(UnknownOperatorError, match="words need a lens, which `steer-operators lens` builds"):
        registry.plan((OperatorUse("none", words=words("bridge")),))


def test_weights_are_signed_and_make_another_direction(registry):
    one = applied(registry, "lens", words=words(bridge=1.0, the=0.5))
    other = applied(registry, "lens", words=words(bridge=1.0, the=-0.5))
    assert [word.weight for word in other.words] == [1.0, -0.5]
    assert one.artifact.digest != other.artifact.digest


def test_a_strength_that_is_given_is_taken(registry):
    use = applied(registry, "lens", 0.17, words=words("bridge"))
    assert use.setting == Setting(0.17, "cumulative", 1.0, FIRST)
    assert (use.kl, use.defaulted) == (None, ("rule", "blend", "positions", "anchor", "first_token"))


def test_without_a_strength_the_lens_gives_the_one_of_its_own_budget(registry):
    use = applied(registry, "lens", words=words("bridge"))
    assert (use.setting.strength, use.kl) == (0.1, 0.5)
    assert use.defaulted == ("strength", "rule", "blend", "positions", "anchor", "first_token")


def test_a_budget_is_looked_up_in_the_curve(registry):
    use = applied(registry, "lens", words=words("bridge"), kl=1.0)
    # Halfway between two points in the logarithms of both.
    assert use.setting.strength == pytest.approx(math.sqrt(0.1 * 0.2), rel=1e-3)
    assert (use.kl, use.defaulted) == (1.0, ("rule", "blend", "positions", "anchor", "first_token"))


@pytest.mark.parametrize("kl", [0.1, 2.1])
def test_a_budget_beyond_what_was_measured_is_refused_and_the_range_named(registry, kl):
    with pytest.raises(InvalidRequestError, match=r"operators\[0\]\.kl.*0\.125 to 2 nats") as caught:
        applied(registry, "lens", words=words("bridge"), kl=kl)
    assert caught.value.field == "operators[0].kl"


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"words": words("bridge"), "kl": 0.5, "strength": 0.1}, "kl", "beside a strength"),
        ({"words": words("bridge"), "blend": 0.5}, "blend", "only 1"),
        ({"words": words("bridge"), "kl": 0.5, "positions": Positions()}, "kl", "positions all; give a strength"),
        ({"words": words("bridge"), "positions": Positions()}, "strength", "positions all; give a strength"),
        ({}, "words", "'lens' is a lens"),
        ({"strength": 0.2}, "words", "'lens' is a lens"),
        ({"words": words(" ")}, "words", "0 characters"),
        ({"words": words("\u200b")}, "words", "no visible character"),
        ({"words": words(bridge=0.0)}, "words", "weight 0"),
        ({"words": words("bridge", "bridge")}, "words", "'bridge' is there twice"),
        ({"words": words("bridge", " bridge")}, "words", "'bridge' is there twice"),
        ({"words": words(the=1.0, The=-1.0)}, "words", "cancel"),
        ({"name": "golden", "words": words("bridge")}, "words", "'golden', which is no lens"),
        ({"name": "golden", "kl": 0.5}, "kl", "none was measured"),
        ({"name": "bare", "words": words("bridge")}, "strength", "is needed"),
        ({"name": "bare", "words": words("bridge"), "kl": 0.5}, "kl", "none was measured"),
    ],
)
def test_what_is_refused_names_its_field(registry, fields, field, problem):
    use = OperatorUse(**{"name": "lens", **fields})
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        registry.plan((OperatorUse("golden"), use), field="arms[2].operators")
    assert caught.value.field == f"arms[2].operators[1].{field}"


def test_a_lens_is_pinned_by_its_own_digest(registry, lens):
    use = applied(registry, "lens", words=words("bridge"), digest=lens.digest, strength=0.1)
    assert use.lens_digest == lens.digest
    # Not by that of a direction, which is another one for every word.
    with pytest.raises(DigestNotServedError):
        applied(registry, "lens", words=words("bridge"), digest=use.artifact.digest, strength=0.1)


def test_a_special_token_is_no_word(registry, llama):
    with pytest.raises(InvalidRequestError, match="special or unknown"):
        applied(registry, "lens", 0.1, words=words(llama.tokenizer.all_special_tokens[0]))


def test_an_operator_that_was_calibrated_has_a_budget_too(
    tmp_path, model_info, low_artifact, remake, calibration_of, registry
):
    header = low_artifact.header
    Store(tmp_path).save("measured", remake(low_artifact, calibration=calibration_of(header)))
    registry.reload()
    points = registry.entry("measured").artifact.header.calibration.points
    at = header.recommended
    measured = {point.kl_p95: point.strength for point in points if (point.rule, point.blend) == (at.rule, at.blend)}
    kl, strength = max(measured.items())
    use = applied(registry, "measured", kl=kl)
    assert (use.setting.strength, use.kl) == (strength, kl)
    assert "strength" not in use.defaulted
    assert use.words == ()
    with pytest.raises(InvalidRequestError, match="none was measured at substitute"):
        applied(registry, "measured", kl=kl, rule="substitute", blend=0.125)


def test_a_server_that_reads_no_words_says_so(tmp_path, model_info, lens):
    Store(tmp_path).save("lens", lens)
    made = Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0)
    with pytest.raises(InvalidRequestError, match="not read by this server"):
        made.plan((OperatorUse("lens", words=words("bridge")),))


def test_files_that_cannot_be_read_are_not_the_callers_fault(tmp_path, model_info, lens, llama):
    def missing():
        raise ModelError("it has no model.safetensors")

    Store(tmp_path).save("lens", lens)
    small = LoadedUnembedding(loaded_unembedding(llama.model).weight[:-1], tied=False)
    for find, problem in ((missing, "no model.safetensors"), (lambda: small, "the lens was built with")):
        directions = WordDirections(find, llama.tokenizer)
        made = Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=1.0, words=directions)
        with pytest.raises(OperatorUnusableError, match=problem):
            made.plan((OperatorUse("lens", words=words("bridge")),))


def test_a_direction_is_worked_out_once_and_only_so_many_are_kept(directions, lens, llama, monkeypatch):
    made = []
    original = directions._make
    monkeypatch.setattr(directions, "_make", lambda *args: made.append(args) or original(*args))
    texts = ("bridge", "the", "painting", "golden")
    first = directions.direction(lens, words("bridge"))
    assert directions.direction(lens, words("bridge")) is first
    assert len(made) == 1
    for text in texts:
        directions.direction(lens, words(text))
    assert (len(made), len(directions)) == (4, 3)
    again = directions.direction(lens, words("bridge"))
    assert (len(made), again.digest) == (5, first.digest)


def test_weights_that_are_equal_numbers_share_a_direction_and_others_do_not(directions, lens):
    one = directions.direction(lens, (WeightedWord("bridge", 1), WeightedWord("the", 2)))
    assert directions.direction(lens, (WeightedWord("bridge", 1.0), WeightedWord("the", 2.0))) is one
    assert directions.direction(lens, (WeightedWord("bridge", 1.0), WeightedWord("the", 2.5))) is not one


async def test_words_are_read_in_another_thread_and_the_loop_goes_on(registry, directions, monkeypatch):
    threads, original = [], directions.direction
    begun, gate = threading.Event(), threading.Event()

    def slow(*args):
        threads.append(threading.current_thread())
        begun.set()
        assert gate.wait(5)
        return original(*args)

    monkeypatch.setattr(directions, "direction", slow)
    planned = asyncio.ensure_future(registry.plan_beside({"operators": (OperatorUse("", words=words("bridge")),)}))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    # The loop is free, and a plan without words does not wait.
    assert await registry.plan_beside({"operators": (OperatorUse("golden"),)}) != (None,)
    assert not planned.done()
    gate.set()
    assert (await planned)[0].applications[0].words[0].text == "bridge"
    assert threads != [threading.current_thread()]


async def test_only_so_many_different_words_are_read_for_one_request(registry):
    uses = [OperatorUse("lens", words=words(*(f"{arm} {number}" for number in range(16)))) for arm in range(9)]
    groups = {f"arms[{index}].operators": (use,) for index, use in enumerate(uses)}
    with pytest.raises(InvalidRequestError, match="144 different words together; at most 128") as caught:
        await registry.plan_beside(groups)
    assert caught.value.field == "arms"
    # The same words in many arms are read once.
    assert len(await registry.plan_beside(dict.fromkeys(groups, (uses[0],)))) == 9


def of_host(host):
    """What follows in this task is called from there."""
    CALLER.set(Caller(host, f"{host}:1"))


async def test_only_so_many_requests_wait_for_their_words_and_not_all_of_one_caller():
    beside = BesideTheLoop(max_waiting=4)
    with ExitStack() as waiting:
        for _ in range(3):
            waiting.enter_context(beside.place())
        with pytest.raises(QueueFullError, match="3 requests wait for their words; at most 4 are admitted, 3 of one"):
            beside.place().__enter__()
        of_host("another")
        waiting.enter_context(beside.place())
        of_host("a third")
        with pytest.raises(QueueFullError, match="4 requests wait"):
            beside.place().__enter__()
    with beside.place():
        assert await beside.run(lambda: 7) == 7


async def test_the_words_of_one_come_between_those_of_another(registry, directions, monkeypatch):
    original, order, gate = directions.direction, [], threading.Event()

    def seen(lens, words):
        assert gate.wait(5)
        order.append(words[0].text)
        return original(lens, words)

    monkeypatch.setattr(directions, "direction", seen)

    async def plan(host, groups):
        of_host(host)
        return await registry.plan_beside(groups)

    arms = {f"arms[{n}].operators": (OperatorUse("lens", words=words(f"many {n}")),) for n in range(6)}
    tasks = [asyncio.ensure_future(plan("many", arms)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(plan("few", {"operators": (OperatorUse("lens", words=words("bridge")),)})))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    # Behind the piece that was begun before, and at most one more.
    assert order.index("bridge") <= 2


async def test_a_word_is_worked_out_once_whatever_its_weight(registry, monkeypatch):
    worked = []

    def seen(lens, rows):
        worked.append(1)
        return word_direction(lens, rows)

    monkeypatch.setattr("operators.model.words.word_direction", seen)
    arms = {
        f"arms[{n}].operators": (OperatorUse("lens", words=(WeightedWord("bridge", n + 1.0), WeightedWord("bay"))),)
        for n in range(8)
    }
    plans = await registry.plan_beside(arms)
    assert len({plan.applications[0].artifact.digest for plan in plans}) == 8
    assert len(worked) == 2


@pytest.mark.parametrize(
    ("last", "refused"),
    [
        (OperatorUse("lens", strength=3.0, words=words("bridge")), "DoseTooHighError"),
        (OperatorUse("lens", kl=7.0, words=words("bridge")), "InvalidRequestError"),
        (OperatorUse("lens", words=(*words("bridge"), WeightedWord("bay", 0.0))), "InvalidRequestError"),
        (OperatorUse("nobody"), "UnknownOperatorError"),
    ],
)
async def test_no_direction_is_worked_out_before_the_last_arm_is_accepted(registry, monkeypatch, last, refused):
    monkeypatch.setattr("operators.model.words.word_direction", lambda *_: pytest.fail("worked out"))
    first = (OperatorUse("lens", words=words("bridge", "bay")),)
    with pytest.raises(SteerServerError) as caught:
        await registry.plan_beside({"arms[0].operators": first, "arms[1].operators": (last,)})
    assert type(caught.value).__name__ == refused


async def test_a_word_of_one_comes_between_the_words_of_one_use_of_another(registry, directions, monkeypatch):
    learn, direction, order = directions.learn, directions.direction, []
    begun, gate = threading.Event(), threading.Event()

    def learned(lens, word):
        begun.set()
        assert gate.wait(5)
        order.append(word.text)
        learn(lens, word)

    def directed(lens, many):
        order.append(len(many))
        return direction(lens, many)

    monkeypatch.setattr(directions, "learn", learned)
    monkeypatch.setattr(directions, "direction", directed)

    async def plan(host, *texts):
        of_host(host)
        return await registry.plan_beside({"operators": (OperatorUse("lens", words=words(*texts)),)})

    many = asyncio.ensure_future(plan("many", *(f"many {n}" for n in range(16))))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    few = asyncio.ensure_future(plan("few", "bridge"))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(many, few)
    # Its words are checked, then read, each behind one piece of the other's.
    assert order.index(1) < 8 < order.index(16)
