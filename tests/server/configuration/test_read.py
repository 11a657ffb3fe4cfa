"""Settings of a file, the environment and flags: which beats which, and what is refused, by name and place."""

from pathlib import Path

import pytest

from steer_server.config import ServerConfig, flag, variable
from steer_server.configuration.read import SettingsError, read_settings


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steer.toml"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def _problems(flags=None, file=None):
    with pytest.raises(SettingsError) as caught:
        read_settings(flags, file)
    return caught.value.problems


def test_what_nobody_gives_is_the_default():
    settings = read_settings()
    assert (settings.config, settings.origins, settings.warnings) == (ServerConfig(), {}, ())


def test_flags_beat_the_environment_and_that_the_file(monkeypatch, file):
    path = file("# a comment\nmax_queue = 1\nmax_arms = 1\n\nmax_dose = 0.5\n")
    monkeypatch.setenv("STEER_MAX_QUEUE", "2")
    monkeypatch.setenv("STEER_MAX_ARMS", "2")
    settings = read_settings({"max_queue": "3"}, path)
    config = settings.config
    assert (config.max_queue, config.max_arms, config.max_dose) == (3, 2, 0.5)
    assert settings.origins == {
        "max_queue": "flag --max-queue",
        "max_arms": "env STEER_MAX_ARMS",
        "max_dose": f"{path}:5",
    }


def test_options_of_the_engine_stand_over_one_another_one_by_one(monkeypatch, file):
    path = file("[engine_args]\nmax_num_seqs = 1\nmax_model_len = 64\n")
    monkeypatch.setenv("STEER_ENGINE_ARGS", '{"enforce_eager": true, "max_model_len": 128}')
    settings = read_settings({"engine_args": {"enforce_eager": False}}, path)
    assert settings.config.engine_args == {"max_num_seqs": 1, "max_model_len": 128, "enforce_eager": False}
    assert settings.origins == {
        "engine_args.max_num_seqs": f"{path}:2",
        "engine_args.max_model_len": "env STEER_ENGINE_ARGS",
        "engine_args.enforce_eager": "flag --engine-args",
    }


def test_the_environment_names_the_file_unless_a_flag_does(monkeypatch, file, tmp_path):
    monkeypatch.setenv("STEER_CONFIG", str(file("max_queue = 5")))
    assert read_settings().config.max_queue == 5
    other = tmp_path / "other.toml"
    other.write_text("max_queue = 6")
    assert read_settings(file=other).config.max_queue == 6
    monkeypatch.setenv("STEER_CONFIG", "")
    assert read_settings().config.max_queue == 32


def test_an_empty_variable_counts_as_unset(monkeypatch):
    for name in ServerConfig.model_fields:
        monkeypatch.setenv(variable(name), "")
    assert read_settings().config == ServerConfig()
    monkeypatch.setenv("STEER_STORE", "somewhere")
    assert read_settings().config.store == Path("somewhere")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a = 1\n", 1, "unknown key 'a'"),
        ("max_arms = 2\nmax_qeue = 1\n", 2, "unknown key 'max_qeue'; did you mean 'max_queue'?"),
        ("max-queue = 1\n", 1, "unknown key 'max-queue'; did you mean 'max_queue'?"),
        ("\n[engine_arg]\na = 1\n", 2, "unknown key 'engine_arg'; did you mean 'engine_args'?"),
    ],
)
def test_a_key_that_is_none_is_refused_by_name_file_and_nearest_key(file, text, line, said):
    path = file(text)
    assert _problems(file=path) == (f"{path}:{line}: {said}",)


def test_a_file_that_cannot_be_read_is_named(file, tmp_path):
    path = file("max_queue = \n")
    (said,) = _problems(file=path)
    assert said.startswith(f"{path}: cannot be read: Invalid value (at line 1")
    (said,) = _problems(file=tmp_path / "none.toml")
    assert said.startswith(f"{tmp_path / 'none.toml'}: cannot be read: No such file")
    path.write_bytes(b"\xff")
    assert "cannot be read" in _problems(file=path)[0]


def test_a_variable_that_is_nearly_a_setting_is_refused(monkeypatch):
    monkeypatch.setenv("STEER_MAX_QEUE", "8")
    assert _problems() == ("STEER_MAX_QEUE in the environment is no setting; did you mean 'STEER_MAX_QUEUE'?",)


def test_variables_of_others_are_not_refused(monkeypatch):
    for name, value in {
        "STEER_TOKEN": "secret",
        "STEER_TARGET": "127.0.0.1:1",
        "STEER_SERVICE_HOST": "10.0.0.1",
        "STEER_SERVICE_PORT": "1",
        "STEER_PORT": "tcp://10.0.0.1:1",
        "STEER_PORT_1_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read_settings().warnings == ()
    monkeypatch.setenv("STEER_COLOUR", "red")
    assert read_settings().warnings == ("STEER_COLOUR in the environment is no setting",)


def test_everything_that_is_wrong_is_said_at_once_with_its_place(monkeypatch, file):
    path = file("max_arms = 0\nlisten = 'h'\n")
    monkeypatch.setenv("STEER_ENGINE_ARGS", "max_model_len=4")
    monkeypatch.setenv("STEER_GRACE", "soon")
    problems = _problems({"max_dose": "0"}, path)
    assert len(problems) == 5
    for begin, end in {
        "engine_args: STEER_ENGINE_ARGS is not JSON": "is accepted",
        "listen: is 'h'; HOST:PORT": f"({path}:2)",
        "max_arms: Input should be greater than or equal to 1, not '0'": f"({path}:1)",
        "grace: is 'soon'; a number in decimal digits": "is accepted (env STEER_GRACE)",
        "max_dose: Input should be greater than 0, not '0'": "(flag --max-dose)",
    }.items():
        assert any(each.startswith(begin) and each.endswith(end) for each in problems), (begin, problems)


def test_a_secret_is_not_said_again_where_it_is_refused(file):
    (said,) = _problems(file=file("[engine_args]\nx = 1\n[model]\nhf_token = 'geheim'\n"))
    assert said.startswith("model: ")
    assert "geheim" not in said


def test_names_of_flags_and_variables_follow_from_the_field():
    assert (flag("max_queue"), variable("max_queue"), flag("http_names")) == (
        "--max-queue",
        "STEER_MAX_QUEUE",
        "--http-name",
    )
