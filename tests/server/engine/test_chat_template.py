"""Chat templates in processes that can be ended, held against what transformers makes of the same templates."""

import asyncio
import json
import time

import psutil
import pytest

from steer_server.engine import chat_template
from steer_server.engine.chat_template import ChatTemplate
from steer_server.engine.render_chat import environment, left_out, render
from steer_server.errors import InvalidRequestError, ShuttingDownError
from steer_server.types import Chat, ChatMessage, TemplateOption

TURNS = (
    ChatMessage("system", "be b\u00e9\u6771"),
    ChatMessage("user", 'say "hi"\n  <b> & '),
    ChatMessage("assistant", ""),
)
ENDLESS = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
ON_REQUEST = "{% if messages[0].role == 'slow' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"


@pytest.fixture
def make(tiny_tokenizer, monkeypatch):
    made = []

    def of(template, **options):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        made.append(ChatTemplate(tiny_tokenizer, **{"max_characters": 10_000, **options}))
        return made[-1]

    yield of
    for each in made:
        each.close()


def rendering():
    return [child for child in psutil.Process().children() if "render_chat" in " ".join(child.cmdline())]


@pytest.fixture
def children():
    """The processes that came since the test began: engines of other tests may have theirs."""
    others = rendering()
    return lambda: [child for child in rendering() if child not in others]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {%- if not loop.first %}|{% endif %}{{ m.role }}: "
        "{{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}"
        "{% endfor %}{{ tools is none }}",
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}"
        "{{ x is defined }}",
        # As models do that show their last thoughts alone.
        "{% for m in messages %}{{ m.content.split('</think>')[-1] | upper }}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ documents }}"
        "{{ messages | map(attribute='role') | join(',') }}",
        "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "   {% if true %}   \n  {{ messages | map(attribute='content') | join }}\n   {% endif %}   \n",
    ],
)
async def test_a_conversation_reads_as_transformers_renders_it(make, tiny_tokenizer, template):
    chat = make(template)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert await chat.render(Chat(TURNS)) == expected


@pytest.mark.model
async def test_the_default_models_template_renders_as_in_transformers(smollm):
    tokenizer = smollm().tokenizer
    chat = ChatTemplate(tokenizer, max_characters=10_000)
    try:
        messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert await chat.render(Chat(TURNS)) == expected
    finally:
        chat.close()


async def test_no_text_is_in_the_json_that_the_server_makes_and_reads(make, monkeypatch):
    # The interpreter is held until JSON is done: a third of a second for 16 MiB.
    sizes = []

    class Counted:
        @staticmethod
        def dumps(value):
            sizes.append(len(json.dumps(value)))
            return json.dumps(value)

        @staticmethod
        def loads(text):
            sizes.append(len(text))
            return json.loads(text)

    long = "\u6771\r\n\x00\u2028" * 50_000
    chat = make("{% for m in messages %}{{ m.content }}{% endfor %}", max_characters=1_000_000)
    monkeypatch.setattr(chat_template, "json", Counted)
    assert await chat.render(Chat((ChatMessage("user", long), ChatMessage("user", "and")))) == f"{long}and"
    assert len(sizes) == 2
    assert max(sizes) < 500


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[9].content.x.y }}", "refuses it: "),
        ("{% for m in messages %}", "cannot be read: "),
        ("{{ messages.append(1) }}", "refuses it: "),
        ("{{ ''.__class__.__mro__ }}", "refuses it: "),
        ("{{ 'x' * 10001 }}", "makes more than 10000 characters"),
        ("{% for a in range(10001) %}x{% endfor %}", "makes more than 10000 characters"),
        ("{{ 'x' * 10 ** 10 }}", "needs more memory"),
        ("{{ '\\ud800' }}", "refuses it: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it: "),
    ],
)
async def test_a_template_that_fails_is_an_error_of_the_prompts_chat(make, template, words, children):
    chat = make(template)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        await chat.render(Chat(TURNS))
    assert caught.value.field == "prompt.chat"
    with pytest.raises(InvalidRequestError):
        await chat.render(Chat(TURNS))
    # An error is an answer: the process is kept.
    assert len(children()) == 1


async def test_a_template_without_an_end_is_ended_and_the_next_conversation_rendered(make, monkeypatch, children):
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 1)
    chat = make(ON_REQUEST)
    before = set(children())
    began = time.process_time()
    with pytest.raises(InvalidRequestError, match="does not end within 1 s") as caught:
        await chat.render(Chat((ChatMessage("slow", "x"),)))
    assert caught.value.field == "prompt.chat"
    # All of its computing was elsewhere.
    assert time.process_time() - began < 1
    assert await chat.render(Chat((ChatMessage("user", "fine"),))) == "fine"
    assert not before & set(children())


async def test_closing_ends_what_has_no_end(make, children):
    chat = make(ON_REQUEST)
    tasks = [asyncio.ensure_future(chat.render(Chat((ChatMessage("slow", "x"),)))) for _ in range(4)]
    await asyncio.sleep(0.2)
    assert children()
    chat.close()
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(error) for error in found] == [ShuttingDownError] * 4
    assert children() == []
    with pytest.raises(ShuttingDownError):
        await chat.render(Chat((ChatMessage("user", "fine"),)))


async def test_a_process_that_was_killed_is_replaced(make, children):
    chat = make("{{ messages[0].content }}")
    assert await chat.render(Chat(TURNS[1:])) == TURNS[1].content
    [child] = children()
    child.kill()
    child.wait()
    assert await chat.render(Chat(TURNS[1:])) == TURNS[1].content
    assert [each.pid for each in children()] != [child.pid]


async def test_a_process_that_answers_as_it_is_given_up_is_not_asked_again(make, monkeypatch):
    chat = make("{{ messages[0].content }}")
    exchange = chat_template._Process._exchange

    def late(process, lines):
        answer = exchange(process, lines)
        process._give_up()
        return answer

    monkeypatch.setattr(chat_template._Process, "_exchange", late)
    assert await chat.render(Chat(TURNS[1:])) == TURNS[1].content
    assert await chat.render(Chat(TURNS[1:])) == TURNS[1].content


# Roles by name, as many models have them; the words of the system in front of the first turn of a user, as Gemma does.
BY_ROLE = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[U]{{ first if loop.first }}{{ m.content | trim }}"
    "{% elif m.role == 'assistant' %}[A]{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("roles", "lost"),
    [
        (["system", "user", "assistant", "user"], None),
        (["user", "developer"], 1),
        (["developer", "user"], 0),
        (["user", "system", "user"], 1),
        (["system"], 0),
        (["user", "assistant", "User"], 2),
    ],
)
async def test_a_turn_that_the_template_leaves_out_is_refused_by_its_place(make, roles, lost):
    chat = make(BY_ROLE)
    # All say the same: one turn's words are not taken for another's.
    asked = Chat(tuple(ChatMessage(role, "<think>so</think> yes ") for role in roles))
    if lost is None:
        said = "<think>so</think> yes"
        assert await chat.render(asked) == f"[U]{said} {said}[A] yes [U]{said}"
        return
    with pytest.raises(InvalidRequestError, match=f"is left out by the chat template.*'{roles[lost]}'") as caught:
        await chat.render(asked)
    assert caught.value.field == f"prompt.chat.messages[{lost}]"


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("{{ raise_exception('too long') }}", "refuses it: too long"),
        ("{{ ('x' * 1000000).split('x') | map('string') | join('yy') * 900 }}", "needs more memory|makes more than"),
    ],
)
async def test_what_cannot_be_held_to_its_turns_is_refused(make, fails, why):
    """The template fails on the same conversation with digits behind its turns, and not on the conversation."""
    chat = make("{% for m in messages %}{% if m.content | length > 8 %}" + fails + "{% endif %}{% endfor %}yes")
    with pytest.raises(InvalidRequestError, match=f"with digits behind each turn, .*({why})"):
        await chat.render(Chat((ChatMessage("user", "hi"), ChatMessage("user", "there"))))


@pytest.mark.parametrize("order", ["", "|reverse"])
def test_a_long_conversation_is_not_gone_through_once_for_each_turn(order):
    template = environment().from_string("{% for m in messages" + order + " %}{{ m.content }}\n{% endfor %}")
    given = {"messages": [{"role": "user", "content": "word " * 1600} for _ in range(1024)]}
    began = time.process_time()
    render(template, given, "", 1 << 26)
    rendered = time.process_time()
    assert left_out(template, given, 1 << 26) is None
    assert time.process_time() - rendered < 40 * (rendered - began)


async def test_what_says_nothing_may_be_left_out_and_what_is_cut_is_refused(make):
    chat = make(BY_ROLE)
    assert await chat.render(Chat((ChatMessage("developer", " \n"), ChatMessage("user", "hi")))) == "[U]hi"
    with pytest.raises(InvalidRequestError, match="left out by the chat template, wholly or its end"):
        await make("{% for m in messages %}{{ m.content[:2] }}{% endfor %}").render(Chat(OPEN))


THINKING = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% set effort = effort | default('low') %}{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{{ effort }}{{ budget }}"
)
OPEN = (ChatMessage("user", "hi"), ChatMessage("assistant", "  Well, the sea"))


async def test_a_turn_that_is_continued_reads_as_in_transformers(make, tiny_tokenizer):
    chat = make(THINKING)
    messages = [{"role": turn.role, "content": turn.content} for turn in OPEN]
    expected = tiny_tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert await chat.render(Chat(OPEN, True)) == expected
    assert expected.endswith("<assistant>Well, the sea")


@pytest.mark.parametrize("begun", ["", " ", "The ", "hi", "</>"])
async def test_a_turn_is_continued_after_its_last_character(make, begun):
    chat = make(THINKING)
    text = await chat.render(Chat((ChatMessage("user", "hi"), ChatMessage("assistant", begun)), True))
    assert text.endswith(f"<user>hi</><assistant>{begun.lstrip()}")


@pytest.mark.parametrize("content", ["m.content | upper", "m.content[:3]", "m.content ~ m.content", "m.role"])
async def test_a_turn_that_the_template_changes_is_not_continued(make, content):
    chat = make("{% for m in messages %}{{ " + content + " }}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="does not show the last turn as it is") as caught:
        await chat.render(Chat(OPEN, True))
    assert caught.value.field == "prompt.chat"


async def test_options_reach_the_template_as_in_transformers(make, tiny_tokenizer):
    chat = make(THINKING)
    given = {"enable_thinking": False, "effort": "high", "budget": 512}
    options = (
        TemplateOption("enable_thinking", boolean=False),
        TemplateOption("effort", text="high"),
        TemplateOption("budget", number=512.0),
    )
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
    assert await chat.render(Chat(TURNS, template_options=options)) == expected
    assert expected.endswith("<think></think>high512")


@pytest.mark.parametrize(
    "name",
    ["enable_thinkin", "messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "range", "m"],
)
async def test_an_option_that_the_template_does_not_have_is_refused_by_name(make, name):
    chat = make(THINKING)
    options = (TemplateOption("budget", number=1.0), TemplateOption(name, boolean=True))
    with pytest.raises(InvalidRequestError, match=f"is '{name}', which is no option") as caught:
        await chat.render(Chat(TURNS, template_options=options))
    assert caught.value.field == "prompt.chat.template_options[1].name"
    assert str(caught.value).endswith("accepted: budget, effort, enable_thinking")
    assert (await chat.render(Chat(TURNS, template_options=options[:1]))).endswith("low1")
