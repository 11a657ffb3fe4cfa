"""What ``steer-server config`` prints, and what it does not."""

import json
from pathlib import Path

import pytest

from steer_server.config import ServerConfig
from steer_server.configuration.read import read_settings
from steer_server.configuration.secrets import masked
from steer_server.configuration.show import as_json, as_toml

ARGS = {
    "max_model_len": 64,
    "note": 'a "quoted" ü\n',
    "sizes": [1, 2.5],
    "compilation_config": {"level": 3, "on": True},
}


def test_what_is_printed_is_a_file_that_gives_the_same_settings(tmp_path):
    given = {
        "engine_args": ARGS,
        "http_names": ["a", "b"],
        "max_time": "3.5",
        "store": "a path",
        "operator_memory": "2GiB",
    }
    settings = read_settings(given)
    path = tmp_path / "printed.toml"
    path.write_text(as_toml(settings), encoding="utf-8")
    assert read_settings(file=path).config == settings.config


def test_each_line_has_unit_and_origin(monkeypatch):
    monkeypatch.setenv("STEER_MAX_TIME", "7")
    lines = as_toml(read_settings({"max_queue": "9"})).splitlines()
    assert len(lines) == len(ServerConfig.model_fields)
    found = {line.split("  #")[0].rstrip(): line.split("  #")[1].strip() for line in lines}
    assert found["max_queue = 9"] == "requests · flag --max-queue"
    assert found["max_time = 7.0"] == "seconds · env STEER_MAX_TIME"
    assert found["max_running = 16"] == "requests · default"
    assert found["# device = cuda where there is one"] == "default"


def test_json_has_value_unit_and_origin():
    content = json.loads(as_json(read_settings({"engine_args": {"a": None}, "max_arms": "2"})))
    assert content["max_arms"] == {"value": 2, "unit": "arms", "origin": "flag --max-arms"}
    assert content["decode_memory"]["value"] is None
    assert content["decode_memory"]["default"] == "half of what is free"
    assert content["engine_args.a"]["origin"] == "flag --engine-args"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("hf_token", "abc", "***"),
        ("apiKey", "abc", "***"),
        ("AWS_SECRET_ACCESS_KEY", "abc", "***"),
        ("http.password", "abc", "***"),
        ("api_keys", ["abc", "def"], ["***", "***"]),
        ("config", {"deep": {"auth": "abc"}}, {"deep": {"auth": "***"}}),
        ("model", "s3://me:abc@host/x", "s3://me:***@host/x"),
        ("model", "https://h/x?sig=abc&y=1&access_token=abc", "https://h/x?sig=***&y=1&access_token=***"),
        # No secrets: how many, what makes them, and where they are kept.
        ("max_tokens", "4", "4"),
        ("tokenizer", "slow", "slow"),
        ("tls_key", Path("/etc/steer/key.pem"), Path("/etc/steer/key.pem")),
        ("use_auth", True, True),
        ("model", "https://host/a:b@c", "https://host/a:b@c"),
    ],
)
def test_secrets_are_masked_and_nothing_else(name, value, shown):
    assert masked(value, name) == shown


def test_no_secret_is_printed():
    settings = read_settings(
        {"engine_args": {"hf_token": "geheim", "a": {"password": "geheim"}}, "model": "x://u:geheim@h"}
    )
    for printed in (as_toml(settings), as_json(settings)):
        assert "geheim" not in printed
        assert printed.count("***") == 3


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [
        (5, "engine_args.api_key", "***"),
        (5, "engine_args.max_model_len", 5),
        (["hf_token=hunter2", "a=b"], "engine_args", ["hf_token=***", "a=b"]),
        ("['hf_token: hunter2', 'a: b']", "engine_args", "['hf_token: ***', 'a: b']"),
        ("https://models.example/a:b", "model", "https://models.example/a:b"),
    ],
)
def test_secrets_within_texts_and_numbers_that_are_secrets_are_masked(value, name, shown):
    assert masked(value, name) == shown
