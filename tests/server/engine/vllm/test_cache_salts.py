"""Who shares keys and values with whom, before and after a failure."""

import sys
from itertools import combinations

from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.worker_protocol import OperatorSetting

GATE, DRESS = OperatorSetting("gate", "cumulative", 0.4, 0.0), OperatorSetting("dress", "cumulative", 0.4, 0.0)
STEERINGS = (
    (GATE,),
    (DRESS,),
    (GATE, DRESS),
    (GATE, GATE),
    (OperatorSetting("gate", "cumulative", 0.4000000001, 0.0),),
    (OperatorSetting("gate", "cumulative", -0.4, 0.0),),
    (OperatorSetting("gate", "substitute", 0.4, 0.0),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.5),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.0, 1),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.0, anchor="contrast"),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.0, first_token="anchor"),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.0, 0, 1),),
    (OperatorSetting("gate", "cumulative", 0.4, 0.0, 0, 2),),
    (GATE, OperatorSetting("gate", "cumulative", 0.4, 0.0, 0, 2)),
)


def test_the_very_same_steering_has_one_salt_and_every_other_another():
    salts = CacheSalts()
    for one, other in combinations(STEERINGS, 2):
        assert salts.of(one) != salts.of(other)
    assert [salts.of(each) for each in STEERINGS] == [CacheSalts().of(each) for each in STEERINGS]
    assert salts.of((GATE, DRESS)) == salts.of((DRESS, GATE))


def test_a_failure_renews_the_salt_of_its_own_steering_and_of_no_other():
    salts = CacheSalts()
    before = [salts.of(each) for each in STEERINGS]
    salts.renew(STEERINGS[2][::-1])
    after = [salts.of(each) for each in STEERINGS]
    assert [place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [2]


def test_no_salt_comes_back_whatever_fails_afterwards():
    salts, seen = CacheSalts(max_renewed=3), set()
    for strength in range(1, 50):
        settings = (OperatorSetting("gate", "cumulative", float(strength % 7), 0.0),)
        assert salts.of(settings) not in seen
        seen.add(salts.of(settings))
        salts.renew(settings)
        assert salts.of(settings) not in seen


def test_what_is_remembered_of_failures_is_bounded():
    salts = CacheSalts(max_renewed=8)
    for strength in range(1000):
        salts.renew((OperatorSetting("gate", "cumulative", float(strength), 0.0),))
        assert sum(map(sys.getsizeof, salts._renewals)) <= 8 * 150
