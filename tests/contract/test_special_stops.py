"""A stop string that is a special token ends a text on every engine, although no text shows it."""

import pytest

from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob, FinishReason, Row, SamplingParams

pytestmark = pytest.mark.model

_PROMPT = "<|im_start|>user\nSay one word.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_a_special_token_ends_a_text_as_a_stop_string(engine, decode, ignore_eos):
    sampling = SamplingParams(max_tokens=40, stop_strings=("<|im_end|>",), ignore_eos=ignore_eos)
    ((ids, end),) = await decode(engine, _PROMPT, sampling, Row(None))
    assert (end.reason, end.stop_string) == (FinishReason.STOP_STRING, "<|im_end|>")
    assert (await engine.token_texts((ids[-1],))) == ("<|im_end|>",)


async def test_beside_other_text_it_is_refused(engine):
    with pytest.raises(InvalidRequestError, match=r"sampling\.stop_strings\[0\]: has the special token '<\|im_end\|>'"):
        engine.submit(DecodeJob.of((1, 2), SamplingParams(stop_strings=("<|im_end|>\n",)), (Row(None),)))
