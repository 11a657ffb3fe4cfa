"""Options that are handed through to vLLM: how they are read, and which are refused."""

import sys

import pytest

from steer_server.config import ServerConfig
from steer_server.engine.vllm.options import (
    LOAD_FORMATS,
    MODEL_OPTIONS,
    SERVER_OPTIONS,
    check_engine_args,
    read_engine_args,
)
from steer_server.engines import ENGINES
from steer_server.errors import StartupError

KNOWN = (
    "max_model_len",
    "max_num_seqs",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "additional_config",
    "load_format",
)
KNOWN += (*SERVER_OPTIONS, *MODEL_OPTIONS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("max_model_len=4096", {"max_model_len": 4096}),
        ("gpu_memory_utilization=0.85", {"gpu_memory_utilization": 0.85}),
        ("enforce_eager=true", {"enforce_eager": True}),
        ("quantization=fp8", {"quantization": "fp8"}),
        ("revision='1'", {"revision": "1"}),
        ("quantization=null", {"quantization": None}),
        ("allowed=[a, 2]", {"allowed": ["a", 2]}),
        ("compilation_config={level: 3, sizes: [1, 2]}", {"compilation_config": {"level": 3, "sizes": [1, 2]}}),
        ("max-model-len=1", {"max_model_len": 1}),
        (" max_model_len =1", {"max_model_len": 1}),
        ("served_model_name=a=b", {"served_model_name": "a=b"}),
    ],
)
def test_a_value_is_read_as_yaml(given, expected):
    assert read_engine_args([given]) == expected


def test_a_file_holds_as_many_as_one_likes(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 4096\nenforce_eager: true\ncompilation_config:\n  level: 3\n", encoding="utf-8")
    expected = {"max_model_len": 4096, "enforce_eager": True, "compilation_config": {"level": 3}}
    assert read_engine_args([str(file)]) == expected


def test_a_later_one_stands_over_an_earlier_one(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("max_model_len: 2\nmax_num_seqs: 2\n", encoding="utf-8")
    assert read_engine_args(["max_model_len=1", str(file)]) == {"max_model_len": 2, "max_num_seqs": 2}
    assert read_engine_args([str(file), "max-model-len=3"]) == {"max_model_len": 3, "max_num_seqs": 2}
    assert read_engine_args(["a=1", "a=2"]) == {"a": 2}
    assert read_engine_args([]) == {}


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"just words", b"", b"a: [1", b"\xff\xfe\xfa"],
    ids=["list", "text", "empty", "bad", "binary"],
)
def test_a_file_that_holds_no_options_is_refused_by_name_in_one_line(tmp_path, content):
    file = tmp_path / "vllm.yaml"
    file.write_bytes(content)
    with pytest.raises(StartupError, match=r"^engine_args: .*vllm\.yaml") as caught:
        read_engine_args([str(file)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", ["no/such/file.yaml", "max_model_len", "max_model_len=[1", "a={b: [}", "."])
def test_what_is_neither_an_option_nor_a_file_is_refused_in_one_line(item):
    with pytest.raises(StartupError, match="is neither KEY=VALUE nor a YAML file") as caught:
        read_engine_args([item])
    assert item.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", ["hf_token:hunter2", "hf_token=[hunter2", "hf_token={a: hunter2"])
def test_a_refused_option_is_named_without_its_value(item):
    with pytest.raises(StartupError, match="'hf_token=…' is neither") as caught:
        read_engine_args([item])
    assert "hunter2" not in str(caught.value)


def test_a_value_makes_no_objects(tmp_path):
    with pytest.raises(StartupError):
        read_engine_args([f"a=!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"])
    assert not (tmp_path / "made").exists()


def test_options_that_vllm_has_are_accepted():
    check_engine_args({"max_model_len": 1, "tensor_parallel_size": 2}, KNOWN)
    check_engine_args({}, ())


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("max_model_length", "did you mean max_model_len"),
        ("tensor_parallel", "did you mean tensor_parallel_size"),
        ("zzz", "is not an option of this vLLM$"),
    ],
)
def test_an_option_that_vllm_does_not_have_is_refused_with_what_is_near(key, told):
    with pytest.raises(StartupError, match=rf"^engine_args\.{key} is not an option of this vLLM") as caught:
        check_engine_args({"max_model_len": 1, key: 1}, KNOWN)
    caught.match(told)


@pytest.mark.parametrize("key", SERVER_OPTIONS)
def test_an_option_that_the_server_sets_is_refused_with_what_to_use(key):
    with pytest.raises(StartupError, match=rf"^engine_args\.{key} is set by this server; use ") as caught:
        check_engine_args({key: "x"}, KNOWN)
    assert SERVER_OPTIONS[key] in str(caught.value)


@pytest.mark.parametrize("key", MODEL_OPTIONS)
def test_an_option_that_replaces_the_model_that_operators_were_built_for_is_refused_by_name(key):
    with pytest.raises(
        StartupError, match=rf"^engine_args\.{key} is refused: it gives vLLM .* not built for; use --model"
    ):
        check_engine_args({key: "x"}, KNOWN)


@pytest.mark.parametrize("given", ["dummy", "sharded_state", "tensorizer", "mistral", None, 3])
def test_a_load_format_that_reads_other_weights_is_refused_with_those_that_do_not(given):
    with pytest.raises(StartupError, match=r"^engine_args\.load_format .* is refused") as caught:
        check_engine_args({"load_format": given}, KNOWN)
    assert ", ".join(LOAD_FORMATS) in str(caught.value)


@pytest.mark.parametrize("given", LOAD_FORMATS)
def test_a_load_format_that_reads_the_same_weights_is_accepted(given):
    check_engine_args({"load_format": given}, KNOWN)


@pytest.mark.parametrize("given", [5, "x", [1], False])
def test_an_additional_config_without_keys_is_refused(given):
    with pytest.raises(StartupError, match=r"^engine_args\.additional_config .* does not hold KEY: VALUE pairs"):
        check_engine_args({"additional_config": given}, KNOWN)
    for accepted in (None, {}, {"a": 1}):
        check_engine_args({"additional_config": accepted}, KNOWN)


async def test_options_of_vllm_are_refused_by_the_other_engine_before_a_model_is_loaded():
    config = ServerConfig(model="no-such-model", engine="hf", engine_args={"max_model_len": 1})
    with pytest.raises(StartupError, match="go with --engine vllm"):
        await ENGINES["hf"](config, "float32", "cpu")


async def test_a_machine_without_vllm_is_told_which_one_is_needed_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "steer_server.engine.vllm.engine", None)
    with pytest.raises(StartupError, match=r"engine 'vllm' needs vLLM 0\.32"):
        await ENGINES["vllm"](ServerConfig(model="no-such-model", engine="vllm"), "float32", "cpu")
