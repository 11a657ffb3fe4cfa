"""How much memory vLLM and steering take of a machine of which others have a part."""

import pytest

from steer_server.engine.vllm.memory import cache_memory, default_steering_memory, share_of_free

GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "available", "workers", "taken"),
    [
        (24, 24, 1, 22.08),
        (24, 12, 1, 10.08),
        (24, 12, 2, 5.04),
        # A quarter of what is available stays free at most: a small rest can still be used.
        (24, 4, 1, 3),
        (24, 0, 1, 0),
    ],
)
def test_what_others_use_is_left_to_them_with_a_margin(total, available, workers, taken):
    assert share_of_free(total * GIB, available * GIB, workers) * total == pytest.approx(taken)


@pytest.mark.parametrize(
    ("share", "steering"), [(74 * GIB, 4 * GIB), (22 * GIB, 2 * GIB), (9 * GIB, GIB), (GIB, GIB // 8), (5, 1)]
)
def test_steering_takes_a_power_of_two_of_at_most_an_eighth(share, steering):
    assert default_steering_memory(share) == steering


def test_the_cache_is_what_steering_leaves():
    assert cache_memory(5 * GIB, 2 * GIB, 0.9) == 3 * GIB


@pytest.mark.parametrize("rest", [2 * GIB, GIB, -GIB])
def test_no_room_for_a_cache_is_an_error_with_both_figures(rest):
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization 0.9 leaves .* 2\.0 GiB .*--operator-memory"):
        cache_memory(rest, 2 * GIB, 0.9)
