"""A number that is read from a text is in decimal digits, wherever it stands: an option, a setting, a body of JSON."""

import inspect
from typing import get_args

import pytest
from steer_client import _numbers as of_the_client
from steer_client._cli.app import app as steer
from steer_client._cli.expectations import read_expectation
from steering.v1 import generation_pb2 as pb
from typer.testing import CliRunner

from operators.__main__ import app as steer_operators
from operators.commands.build import _rank
from operators.core import numbers as of_the_builder
from steer_server.command import app as steer_server
from steer_server.configuration.read import SettingsError, read_settings
from steer_server.engine.vllm.options import read_engine_args
from steer_server.errors import InvalidRequestError, StartupError
from steer_server.http.messages import read_message

_OTHER = ["0_4", "٤", "0x1", "nan", "inf", "1e400", "-1e999"]
_WRONG = 2


def _commands(app):
    yield from (each.callback for each in app.registered_commands)
    for group in app.registered_groups:
        yield from _commands(group.typer_instance)


@pytest.mark.parametrize(
    "app", [steer, steer_operators, steer_server], ids=["steer", "steer-operators", "steer-server"]
)
def test_no_option_reads_numbers_by_itself(app):
    found = 0
    for command in _commands(app):
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            hint, *metadata = get_args(parameter.annotation) or (parameter.annotation,)
            if {int, float} & {hint, *get_args(hint)}:
                found += 1
                assert any(getattr(each, "parser", None) for each in metadata), (command, parameter.name)
    assert found


@pytest.mark.parametrize("text", _OTHER)
def test_an_option_is_in_decimal_digits_or_refused(text):
    for app, arguments, option in (
        (steer, ["generate", "x"], "--temperature"),
        (steer, ["generate", "x"], "--max-tokens"),
        (steer, ["admin", "build", "x", "--text", "x"], "--layer"),
        (steer_operators, ["build", "x", "--text", "x"], "--strength"),
        (steer_operators, ["build", "x", "--text", "x"], "--layer"),
        (steer_operators, ["build", "x", "--text", "x"], "--blend"),
        (steer_operators, ["build", "x", "--text", "x"], "--tol"),
        (steer_server, ["token", "x"], "--tokens-per-minute"),
    ):
        result = CliRunner().invoke(app, [*arguments, f"{option}={text}"])
        assert result.exit_code == _WRONG, (arguments, option)
        assert option in result.output
        assert text in result.output


def test_a_range_of_an_option_holds():
    result = CliRunner().invoke(steer_operators, ["eval", "x.toml", "--batch-rows=0"])
    assert result.exit_code == _WRONG


@pytest.mark.parametrize("text", _OTHER)
def test_a_setting_is_in_decimal_digits_or_refused(text, monkeypatch, tmp_path):
    (tmp_path / "file.toml").write_text(f'max_arms = "{text}"\n', encoding="utf-8")
    monkeypatch.setenv("STEER_MAX_QUEUE", text)
    with pytest.raises(SettingsError) as caught:
        read_settings({"max_dose": text}, tmp_path / "file.toml")
    problems = " ".join(caught.value.problems)
    assert all(f"{name}: is {text!r}" in problems for name in ("max_arms", "max_queue", "max_dose"))


def test_settings_in_decimal_digits_are_read(monkeypatch):
    monkeypatch.setenv("STEER_MAX_QUEUE", "7")
    config = read_settings({"max_dose": "1e-1", "operator_memory": "4GiB", "listen": "[::1]:0"}).config
    assert (config.max_queue, config.max_dose, config.operator_memory) == (7, 0.1, 4 << 30)


@pytest.mark.parametrize("text", ["0_4", "010", "0x10", "1:30", "+0_1", ".inf", ".nan", "0b1"])
def test_an_option_of_vllm_is_the_number_that_is_written(text):
    with pytest.raises(StartupError, match="decimal digits"):
        read_engine_args([f"max_model_len={text}"])


def test_other_options_of_vllm_are_as_yaml_has_them():
    given = ["max_model_len=4096", "gpu_memory_utilization=0.5", "enforce_eager=true", "quantization=null", "x=-1"]
    assert list(read_engine_args(given).values()) == [4096, 0.5, True, None, -1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("top_k", text) for text in ("0_4", "٤", "1e400")),
        *(("temperature", text) for text in (*_OTHER[:2], "1e400", "inf", True)),
        ("stop_token_ids", [1, "1_0"]),
        ("seed", "1_0"),
        ("time_limit", "1_0s"),
        ("time_limit", "٤s"),
    ],
)
def test_a_number_in_json_is_in_decimal_digits_or_refused(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        read_message(pb.GenerateRequest, {"sampling": {field: value}})
    assert caught.value.field.startswith(f"sampling.{field}")


@pytest.mark.parametrize("value", ["1_0", "١", True, 1.5, 1.0])
def test_no_value_of_an_enum_is_another_number(value):
    with pytest.raises(InvalidRequestError) as caught:
        read_message(pb.GenerateRequest, {"operators": [{"rule": value}]})
    assert caught.value.field == "operators[0].rule"


@pytest.mark.parametrize(
    ("request_json", "said"),
    [
        *(
            ({"sampling": {"seed": value}}, f"sampling.seed: is {shown}; a whole number is accepted")
            for value, shown in (("abc", "'abc'"), ("1.5", "'1.5'"), (1.5, "1.5"), ([], "a list"), (True, "true"))
        ),
        ({"sampling": {"seed": 2**64}}, f"sampling.seed: is {2**64}; at most {2**64 - 1} is accepted"),
        (
            {"sampling": {"temperature": "hot"}},
            "sampling.temperature: is 'hot'; a number in decimal digits is accepted",
        ),
        ({"sampling": {"ignore_eos": "yes"}}, "is 'yes'; true or false, without quotes, is accepted"),
        ({"sampling": {"time_limit": "5"}}, "is '5'; a text of seconds, such as \"1.5s\", is accepted"),
        ({"sampling": {"stop_token_ids": [1, "a"]}}, "sampling.stop_token_ids[1]: is 'a'; a whole number is accepted"),
        ({"sampling": {"stop_strings": ["a", 1]}}, "sampling.stop_strings[1]: is 1; a text is accepted"),
        ({"prompt": {"token_ids": {"ids": ["a"]}}}, "prompt.token_ids.ids[0]: is 'a'; a whole number is accepted"),
        *(
            ({"operators": [{"rule": value}]}, f"is {shown}; RULE_CUMULATIVE or RULE_SUBSTITUTE is accepted")
            for value, shown in (("foo", "'foo'"), ({}, "an object"), (1.0, "1.0"))
        ),
    ],
)
def test_a_wrong_value_in_json_is_told_in_the_contracts_words(request_json, said):
    with pytest.raises(InvalidRequestError) as caught:
        read_message(pb.GenerateRequest, request_json)
    assert str(caught.value).endswith(said)


def test_numbers_in_json_are_read():
    sampling = {"top_k": "4", "temperature": "1e-1", "seed": "18446744073709551615", "time_limit": "1.5s", "min_p": 0}
    asked = read_message(pb.GenerateRequest, {"sampling": sampling, "operators": [{"rule": "RULE_CUMULATIVE"}]})
    found = asked.sampling
    assert (found.top_k, found.temperature, found.seed, found.time_limit.nanos) == (4, 0.1, 2**64 - 1, 500_000_000)
    assert read_message(pb.GenerateRequest, {"operators": [{"rule": 1}, {"rule": "1"}]}).operators[1].rule == 1
    assert read_message(pb.GenerateRequest, {"sampling": {"temperature": "NaN"}}).sampling.temperature != 0


def test_other_texts_with_numbers_have_the_same_rule():
    for read in (of_the_client.read_decimal, of_the_builder.read_decimal):
        with pytest.raises(ValueError, match="1e400"):
            read("1e400")
    for text in ("useful_hits>=0_4", "useful_hits>=inf", "useful_hits>=1e400"):
        with pytest.raises(ValueError, match="cannot read"):
            read_expectation(text)
    assert (_rank("64"), _rank("full"), _rank("٤"), _rank(None)) == (64, "full", "٤", None)
