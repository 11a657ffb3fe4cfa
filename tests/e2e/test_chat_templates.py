"""A template that has no end for some conversations: it ends them, and nothing else."""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from steer_client import Chat, ChatMessage, InvalidRequestError, SamplingParams, SteerClient
from transformers import PreTrainedTokenizerFast

SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
TEMPLATE = (
    "{% if messages[0].role == 'endless' %}"
    + "{% for x in range(99999) %}" * 3
    + "{% endfor %}" * 3
    + "{% elif messages[0].role == 'huge' %}{{ 'x' * 10 ** 9 }}"
    + "{% else %}{{ messages[0].content }}{% endif %}"
)


@pytest.fixture(scope="module")
def hostile_model(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_model, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def chat(role):
    return Chat((ChatMessage(role, "the bay"),))


def test_a_template_stops_neither_other_prompts_nor_other_chats_nor_the_end_of_the_server(
    start_server, hostile_model, tiny_store
):
    options = ("--store", str(tiny_store), "--grace", "2")
    with (
        start_server(*options, model=hostile_model, threads=1) as server,
        SteerClient(server.target, timeout=120) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        with pytest.raises(InvalidRequestError, match=r"memory|more than") as caught:
            client.generate(chat("huge"), sampling=SHORT)
        assert caught.value.field == "prompt.chat"
        stuck = [pool.submit(client.generate, chat("endless"), sampling=SHORT) for _ in range(2)]
        time.sleep(0.3)
        # While both renderers compute, texts are read.
        assert client.generate("the bay", sampling=SHORT).usage.completion_tokens == 2
        assert not any(each.done() for each in stuck)
        for each in stuck:
            with pytest.raises(InvalidRequestError, match="does not end within") as caught:
                each.result()
            assert caught.value.field == "prompt.chat"
        assert client.generate(chat("user"), sampling=SHORT).usage.prompt_tokens > 0
        last = [pool.submit(client.generate, chat("endless"), sampling=SHORT) for _ in range(2)]
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        assert server.exit_code(20) == 0
        assert all(each.exception(20) for each in last)
