"""What ``steer-server --check`` says before a start: everything that is wrong, with no weights read."""

import shutil
import socket

import pytest
from typer.testing import CliRunner

from operators.core.store import Store
from operators.model import loading, survey
from steer_server.checks.run import run_checks
from steer_server.command import app
from steer_server.config import ServerConfig


@pytest.fixture
def config(tiny_directory, tmp_path, monkeypatch):
    """A configuration that a start accepts, with no operator in its store."""
    monkeypatch.setattr(loading, "_from_files", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "store").mkdir()

    def make(**others):
        settings = {"model": str(tiny_directory("llama")), "store": tmp_path / "store", "listen": "127.0.0.1:0"}
        return ServerConfig(**{**settings, "device": "cpu", **others})

    return make


def _found(config):
    return [(each.kind, each.check, each.said) for each in run_checks(config)]


def _problems(config):
    return [(check, said) for kind, check, said in _found(config) if kind == "problem"]


def test_a_configuration_that_can_be_served_has_no_problem(config):
    found = _found(config())
    assert [(kind, check) for kind, check, _ in found] == [
        ("ok", check) for check in ("port", "engine", "model", "store")
    ]
    assert "LlamaForCausalLM" in found[2][2]


def test_all_problems_are_found_and_not_only_the_first(config, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        problems = _problems(
            config(
                listen=f"127.0.0.1:{port}",
                metrics_port=port,
                engine_args={"max_model_len": 8},
                model=str(tmp_path / "none"),
                store=tmp_path / "nowhere",
            )
        )
    assert [check for check, _ in problems] == ["port", "port", "engine", "model", "store"]
    assert f"127.0.0.1:{port}" in problems[0][1]
    assert "--listen has it (--metrics-port takes another)" in problems[1][1]
    assert "there is no such directory" in problems[3][1]


def test_a_file_of_tokens_is_read_and_what_a_start_would_warn_of_is_a_note(config, tmp_path):
    file = tmp_path / "tokens.toml"
    file.write_text(f"[tokens.me]\nsha256 = '{'0' * 64}'\nscopes = ['read']\n")
    file.chmod(0o644)
    lines = [(kind, said) for kind, check, said in _found(config(tokens=file)) if check == "tokens"]
    assert [kind for kind, _ in lines] == ["ok", "note"]
    assert "chmod 600" in lines[1][1]
    file.write_text("[tokens.me]\nscopes = ['all']\n")
    [(check, said)] = _problems(config(tokens=file))
    assert (check, str(file) in said) == ("tokens", True)


def test_weights_that_the_index_names_and_that_are_not_there_are_a_problem(config, tiny_directory, tmp_path):
    model = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    [(check, said)] = _problems(config(model=str(model)))
    assert check == "model"
    assert "model.safetensors" in said


def test_a_model_that_is_not_here_is_a_note_unless_nothing_can_be_downloaded(config, monkeypatch):
    [(check, said)] = _problems(config(model="smollm2-13m"))
    assert (check, "HF_HUB_OFFLINE" in said, "did you mean 'smollm2-135m'?" in said) == ("model", True, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: (_ for _ in ()).throw(OSError("not here")))
    assert ("note", "model") in [(kind, check) for kind, check, _ in _found(config(model="some/model"))]
    assert ("note", "model") in [(kind, check) for kind, check, _ in _found(config(model="some/smollm2-135m"))]
    [(check, said)] = _problems(config(model="smolm2-135m"))
    assert (check, "did you mean 'smollm2-135m'?" in said) == ("model", True)


def test_operators_that_cannot_be_used_are_named(config, artifact, remake, monkeypatch):
    settings = config()
    store = Store(settings.store)
    store.save("good", artifact)
    store.save("foreign", remake(artifact, tokenizer_fingerprint=f"sha256:{'0' * 64}"))
    store.path_of("damaged").write_bytes(b"no operator")
    # Whatever was loaded on this machine before.
    monkeypatch.setattr(survey, "cached_digest", lambda _: None)
    found = _found(settings)
    assert [said.split(" cannot")[0] for kind, _, said in found if kind == "problem"] == [
        "operator 'damaged'",
        "operator 'foreign'",
    ]
    assert "1 of 3 operators fit the model's sizes and tokenizer; its weights are compared" in found[-1][2]
    # Once the weights have been digested on this machine, they are compared too.
    monkeypatch.setattr(survey, "cached_digest", lambda _: "0" * 64)
    assert [said.split(" cannot")[0] for kind, _, said in _found(settings) if kind == "problem"] == [
        f"operator {name!r}" for name in ("damaged", "foreign", "good")
    ]


def test_the_command_prints_a_line_each_and_says_so_by_its_status(config, tmp_path):
    given = config()
    flags = ["--check", "--model", given.model, "--device", "cpu", "--listen", "127.0.0.1:0"]
    run = CliRunner().invoke(app, [*flags, "--store", str(given.store)])
    assert run.exit_code == 0, run.output
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["ok"] * 4
    run = CliRunner().invoke(app, [*flags, "--store", str(tmp_path / "none")])
    assert run.exit_code == 1
    assert run.stdout.splitlines()[-1].startswith("problem  store: store ")
    run = CliRunner().invoke(app, [*flags, "--max-queue", "0", "--max-arms", "0"])
    assert run.exit_code == 2
    assert [line.split(":")[1].strip() for line in run.stdout.splitlines()] == ["max_queue", "max_arms"]


def test_an_address_for_all_without_tls_and_certificates_that_cannot_be_used_are_problems(config, tmp_path):
    key = tmp_path / "key.pem"
    key.write_text("no key")
    problems = dict(_problems(config(listen="0.0.0.0:0", tls_cert=key, tls_key=key)))
    assert problems.keys() == {"access", "certificates"}
    assert "--tokens is missing" in problems["access"]
    assert f"{key} cannot be used" in problems["certificates"]


def test_addresses_that_cannot_be_listened_on_together_are_a_problem(config):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    [(check, said)] = _problems(config(listen=f"0.0.0.0:{port}", insecure=True, http_port=port))
    assert check == "port"
    assert f"cannot listen on 127.0.0.1:{port}" in said
