import json
import os
import re
import signal
import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli
from operators import __version__
from operators.core.artifact import make_artifact
from operators.core.defaults import NEW_OPERATORS
from operators.core.header import DTypeName, Profile, Rule
from operators.core.store import Store
from operators.model import loading as models

TEXT = "The Golden Gate Bridge"


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def run(store_path, tiny_directory, monkeypatch):
    """``run("list", "--json")``: the command in this process, with its own store and the tiny Llama as the model."""
    monkeypatch.setenv("STEER_STORE", str(store_path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, list(arguments), catch_exceptions=False)


def _json(result):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture
def no_model(monkeypatch):
    def load(*_args, **_kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(models, "load_model", load)


def _process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "operators", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_build_stores_an_operator_and_describes_it(run, store_path, tiny_directory):
    result = run("build", "golden-gate", "--text", TEXT, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = _json(result)
    stored = Store(store_path).load("golden-gate")
    assert answer["digest"] == stored.digest
    assert answer["path"] == str(store_path / "golden-gate.safetensors")
    assert answer["size_bytes"] == (store_path / "golden-gate.safetensors").stat().st_size
    assert answer["concept"] == TEXT
    assert "".join(answer["concept_tokens"]) == TEXT
    assert len(answer["concept_tokens"]) == len(answer["concept_token_ids"]) == stored.positions
    assert answer["model"] == str(tiny_directory("llama"))
    assert (answer["profile"], answer["layer"], answer["injection_layer"]) == ("residual", 2, 2)
    assert answer["recommended"] == NEW_OPERATORS.model_dump(mode="json")
    assert answer["dtype"] == "float32"
    assert 0 <= answer["reconstruction_error"] < 5e-5
    assert answer["seconds"] > 0
    assert answer["affine"] is False


def test_build_warns_of_a_word_alone_and_of_a_strength_that_no_server_takes(run):
    result = run("build", "gate", "--text", "Bridge", "--text", TEXT, "--strength", "5", "--json")
    assert result.exit_code == 0
    one_word, strength = _json(result)["warnings"]
    assert "'Bridge' is one word" in one_word
    assert "strength 5 " in strength
    assert result.stderr.splitlines() == [f"steer-operators: warning: {each}" for each in (one_word, strength)]
    assert len(_json(result)["last_tokens"]) == 2
    assert _json(result)["last_tokens"][0] == _json(result)["concept_tokens"][-1]


def test_build_of_a_file_warns_of_each_operator_once(run, tmp_path):
    concepts = [f'[[concept]]\nname = "{name}"\ntext = "{text}"\n' for name, text in (("a", "Bridge"), ("b", TEXT))]
    (tmp_path / "c.toml").write_text("".join(concepts))
    result = run("build", "--file", str(tmp_path / "c.toml"), "--json")
    told = {each["name"]: each["warnings"] for each in _json(result)["operators"]}
    assert told["b"] == []
    assert "'Bridge' is one word" in told["a"][0]
    assert result.stderr == f"steer-operators: warning: a: {told['a'][0]}\n"
    assert run("build", "--file", str(tmp_path / "c.toml")).stderr == "", "it is up to date"


def test_build_takes_every_option(run, store_path, tiny_directory, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    result = run(
        *("build", "a", "--text", TEXT, "--model", str(tiny_directory("gemma3")), "--profile", "golden"),
        *("--layer", "4", "--strength", "-1.5", "--rule", "substitute", "--blend", "0.25", "--positions", "..1"),
        *("--anchor", "concept", "--first-token", "anchor"),
        *("--dtype", "float64", "--device", "cpu", "--store", str(elsewhere)),
    )
    assert result.exit_code == 0
    header = Store(elsewhere).load("a").header
    assert (header.architecture, header.profile, header.layer) == ("Gemma3ForCausalLM", "golden", 4)
    dumped = {"strength": -1.5, "rule": "substitute", "blend": 0.25, "positions": "first"}
    dumped |= {"anchor": "concept", "first_token": "anchor"}
    assert header.recommended.model_dump() == dumped
    shown = run("show", "a", "--store", str(elsewhere)).stdout
    assert re.search(
        r"^recommended: +strength -1\.5, substitute, blend 0\.25, anchor at the first token, positions first$",
        shown,
        re.MULTILINE,
    )
    assert header.dtype == "float64"
    assert header.reconstruction_error < 1e-12
    assert not store_path.exists()


def test_build_tells_a_person_what_was_built(run, store_path):
    result = run("build", "a", "--text", TEXT, "--strength", "-0.5")
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in result.stdout.splitlines())
    assert lines["name"] == "a"
    assert lines["digest"] == Store(store_path).load("a").digest
    assert lines["concept"] == repr(TEXT)
    assert re.fullmatch(r"\d+: 'The' ' G'( '\w+'| ' \w+')+", lines["tokens"])
    assert lines["layer"] == "2 of 4, added to the input of block 2"
    assert lines["recommended"] == "strength -0.5, cumulative, blend 1, contrast anchor"
    assert lines["file"].startswith(str(store_path / "a.safetensors"))
    assert float(lines["reconstruction"].split()[0]) < 5e-5
    assert float(lines["seconds"]) > 0


REFUSED_EARLY = [
    (["A/b", "--text", TEXT], "StoreError", "operator name 'A/b' is not allowed"),
    (["../a", "--text", TEXT], "StoreError", "is not allowed"),
    (["taken", "--text", TEXT], "NameTakenError", "operator 'taken' is already in"),
    (["a", "--text", TEXT, "--blend", "1.1"], "SettingError", "blend is 1.1; a number from 0"),
    (["a", "--text", TEXT, "--positions", "last"], "SettingError", "positions is 'last'; accepted: all, first, prompt"),
    (["a", "--text", TEXT, "--positions", "4..4"], "SettingError", "positions.end is 4; a number above the start 4"),
    (["a", "--text", ""], "ConceptError", "concept '' has no tokens"),
    (["a", "--text", "caf\udce9"], "ConceptError", "is not Unicode text"),
    (["a", "--text", "x" * 65537], "ConceptError", "concept has 65537 characters; at most 65536 are accepted"),
    (["a", "--text", TEXT, "--layer", "-1"], "BuildError", "layer is -1; a whole number of at least 1 is accepted"),
    (["a", "--text", TEXT, "--rank", "0"], "BuildError", "rank is 0; a whole number of at least 1 or 'full' is"),
    (["a", "--text", TEXT, "--rank", "all"], "BuildError", "rank is 'all'; a whole number of at least 1 or 'full' is"),
    (["a", "--text", TEXT, "--tol", "0"], "BuildError", "tolerance is 0.0; a number between 0 and 1 is accepted"),
    (["a", "--text", TEXT, "--tol", "0.1", "--rank", "3"], "BuildError", "were both given; one is accepted"),
    (["a", "--text", TEXT, "--max-memory", "much"], "BuildError", "memory 'much'; a size such as 8GiB"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), REFUSED_EARLY)
def test_what_needs_no_model_to_be_refused_is_refused_before_it_is_loaded(
    run, store_path, make_operator, no_model, arguments, kind, words
):
    Store(store_path).save("taken", make_operator())
    plain = run("build", *arguments)
    # A taken name is a failure; all else is wrong usage, whatever the store has.
    code = 1 if kind == "NameTakenError" else 2
    assert (plain.exit_code, plain.stdout) == (code, "")
    assert re.fullmatch(r"steer-operators: [^\n]+\n", plain.stderr)
    assert words in plain.stderr
    result = run("build", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    error = _json(result)["error"]
    assert error["type"] == kind
    assert words in error["message"]
    assert Store(store_path).names() == ["taken"]


def test_replace_replaces_a_taken_name(run, store_path, make_operator):
    Store(store_path).save("a", make_operator())
    assert run("build", "a", "--text", TEXT, "--replace").exit_code == 0
    assert Store(store_path).load("a").header.concept == TEXT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "4"], "layer 4 of .* for profile 'residual'; 1 to 3 are accepted"),
        (["--layer", "5", "--profile", "golden"], "layer 5 of .* for profile 'golden'; 1 to 4 are accepted"),
        (["--rank", "41"], "rank is 41; 1 to 40 .the hidden size of .*. or 'full' are accepted"),
        (["--text", "q" * 65], r"concept has 65 tokens; .* takes at most 64 \(it begins 'q{40}'\)"),
        (["--max-memory", "1KiB"], r"needs about .* of memory beside the model; 1.0 KiB may be used"),
        (["--model", "no/such-model"], "model 'no/such-model' cannot be loaded: .*'smollm2-135m'"),
    ],
)
def test_what_the_model_refuses_leaves_the_store_empty(run, store_path, arguments, words):
    result = run("build", "a", "--text", TEXT, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(words, result.stderr)
    assert result.stderr.count("\n") == 1
    assert Store(store_path).names() == []


def test_ctrl_c_exits_with_130_and_leaves_the_store_empty(run, store_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("operators.builder.build.build_operator", interrupt)
    assert run("build", "a", "--text", TEXT).exit_code == 130
    assert Store(store_path).names() == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bild"],
        ["build"],
        ["build", "a"],
        ["build", "a", "--text", TEXT, "--profile", "silver"],
        ["build", "a", "--text", TEXT, "--rule", "mean"],
        ["build", "a", "--text", TEXT, "--dtype", "int8"],
        ["build", "a", "--text", TEXT, "--strength", "much"],
        ["build", "a", "--text", TEXT, "--lambda", "1"],
        ["build", "a", "--text", TEXT, "--only", "a"],
        ["build", "--text", TEXT],
        ["show"],
        ["list", "a"],
    ],
)
def test_a_wrong_command_line_exits_with_2(run, no_model, arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "given", [["--strength", "0.3"], ["--rule", "substitute", "--blend", "0.5"], ["--positions", "first"]]
)
def test_a_setting_that_is_given_and_to_be_looked_for_is_refused_by_name(run, no_model, given):
    result = run("build", "a", "--text", TEXT, "--words", "gate", "--calibrate", *given)
    assert result.exit_code == 2
    said = re.sub(r"[│\s]+", " ", result.stderr)
    assert f"{', '.join(given[::2])} and --calibrate: a given value cannot be calibrated" in said


@pytest.mark.parametrize("command", ["build", "combine", "analyse"])
def test_the_help_says_what_a_model_may_be(run, command):
    assert "GGUF file" in re.sub(r"[│\s]+", " ", run(command, "--help").stdout)


def test_an_empty_store_is_listed_as_empty(run, store_path):
    assert _json(run("list", "--json")) == {"store": str(store_path), "operators": []}
    assert run("list").stdout == f"no operators in {store_path}, which does not exist yet\n"
    store_path.mkdir()
    assert run("list").stdout == f"no operators in {store_path}\n"


def test_list_shows_broken_operators_beside_sound_ones(run, store_path, make_operator):
    Store(store_path).save("sound", make_operator(concept="a golden bridge"))
    (store_path / "broken.safetensors").write_bytes((store_path / "sound.safetensors").read_bytes()[:-1])
    (store_path / "linked.safetensors").symlink_to("sound.safetensors")
    result = run("list", "--json")
    assert result.exit_code == 0
    broken, linked, sound = _json(result)["operators"]
    assert broken["name"] == "broken"
    assert broken["problem"]["type"] == "ArtifactError"
    assert "not a whole safetensors file" in broken["problem"]["message"]
    assert "symbolic link" in linked["problem"]["message"]
    assert sound["digest"] == make_operator(concept="a golden bridge").digest
    assert sound["concept"] == "a golden bridge"
    lines = run("list").stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("broken  broken: ")
    assert "residual: layer 2 of 4, pushes block 2  rank full" in lines[2]
    assert "'a golden bridge'" in lines[2]


def test_list_and_show_give_the_digest_that_the_file_states_and_verify_checks_it(run, store_path, make_operator):
    path = Store(store_path).save("a", make_operator())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    digest = make_operator().digest
    (listed,) = _json(run("list", "--json"))["operators"]
    assert listed["digest"] == _json(run("show", "a", "--json"))["digest"] == digest
    assert f"{digest} (as the file states; 'verify' checks it)" in run("show", "a").stdout
    for command in ("list", "show"):
        assert "'verify' reads and checks them" in re.sub(r"\s+", " ", run(command, "--help").stdout)
    assert "it is damaged" in run("verify", "a", "--file-only").stderr


def test_show_gives_the_whole_header(run, store_path, make_operator):
    Store(store_path).save("a", make_operator(affine=True))
    answer = _json(run("show", "a", "--json"))
    header = make_operator(affine=True).header.model_dump(mode="json")
    # Under the name that it has on the wire.
    header["concept_token_ids"] = header.pop("concept_ids")
    assert {name: answer[name] for name in header} == header
    assert answer["affine"] is True
    text = run("show", "a").stdout
    for expected in (header["model_fingerprint"], header["created"][:10], "up-live/1", "'a concept'"):
        assert expected in text


def test_a_concept_cannot_write_to_the_terminal(run, store_path, make_operator):
    hostile = "\x1b[2J\x1b]0;owned\x07 a\nb\u202e\u009b31m"
    Store(store_path).save("a", make_operator(concept=hostile, model=hostile, builder_version=hostile))
    for arguments in (["show", "a"], ["list"], ["verify", "a"]):
        result = run(*arguments)
        for character in "\x1b\x07\u202e\u009b":
            assert character not in result.output
        assert _json(run("show", "a", "--json"))["concept"] == hostile


@pytest.mark.parametrize("command", ["show", "verify", "delete"])
def test_a_missing_operator_is_refused_with_those_there_are(run, store_path, make_operator, command):
    Store(store_path).save("there", make_operator())
    result = run(command, "missing")
    assert result.exit_code == 1
    assert result.stderr == f"steer-operators: no operator 'missing' in {store_path}; there are: there\n"


def test_delete_removes_one_operator(run, store_path, make_operator):
    for name in ("a", "b"):
        Store(store_path).save(name, make_operator())
    assert run("delete", "a").stdout == "a: deleted\n"
    assert _json(run("delete", "b", "--json")) == {"deleted": "b", "store": str(store_path)}
    assert Store(store_path).names() == []


def test_verify_holds_an_operator_against_the_model_in_its_header(run, tiny_directory):
    run("build", "a", "--text", TEXT)
    answer = _json(run("verify", "a", "--json"))
    assert answer["file"] == "valid"
    assert answer["model"] == str(tiny_directory("llama"))
    assert answer["reconstruction_error"] < 5e-5
    assert answer["reconstruction_error_at_build"] < 5e-5
    assert re.search(r"a: the file is valid \(sha256:\w+\) and fits ", run("verify", "a").stdout)


def test_verify_names_what_another_model_has_instead(run, tiny_directory):
    run("build", "a", "--text", TEXT)
    result = run("verify", "a", "--model", str(tiny_directory("qwen3")), "--json")
    assert result.exit_code == 1
    error = _json(result)["error"]
    assert error["type"] == "IncompatibleOperatorError"
    assert re.search(r"number of layers of '.*' is 3; .* with 4", error["message"])


def test_verify_finds_wrong_numbers_behind_a_right_digest(run, store_path):
    run("build", "a", "--text", TEXT)
    good = Store(store_path).load("a")
    wrong = make_artifact(good.header, 1.01 * good.factors, good.anchor, good.substitute_base, neutral=good.neutral)
    Store(store_path).save("a", wrong, replace=True)
    result = run("verify", "a")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"sum J x misses the hidden state by .*e-0[0-9] at layer 2; at most 5e-05", result.stderr)


def test_verifying_the_file_only_loads_no_model(run, store_path, make_operator, no_model):
    Store(store_path).save("a", make_operator())
    answer = _json(run("verify", "a", "--file-only", "--json"))
    assert answer == {"name": "a", "digest": make_operator().digest, "file": "valid"}


def test_verify_refuses_a_damaged_file_without_loading_a_model(run, store_path, make_operator, no_model):
    path = Store(store_path).save("a", make_operator())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for arguments in ([], ["--file-only"]):
        result = run("verify", "a", *arguments)
        assert result.exit_code == 1
        assert "it is damaged" in result.stderr


@pytest.mark.parametrize(("option", "type_"), [("profile", Profile), ("rule", Rule), ("dtype", DTypeName)])
def test_the_choices_of_the_command_are_those_of_the_artifact(run, option, type_, monkeypatch):
    # Wide enough for them to be on one line.
    monkeypatch.setenv("COLUMNS", "100")
    words = re.sub(r"[│\s]+", " ", run("build", "--help").stdout)
    assert f"--{option} <{'|'.join(get_args(type_))}>" in words


def test_the_version_is_told(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"steer-operators {__version__}\n")


def test_the_module_is_the_command(store_path, tiny_directory):
    built = _process("build", "a", "--text", TEXT, "--model", str(tiny_directory("llama")), "--json",
                     STEER_STORE=str(store_path))  # fmt: skip
    assert (built.returncode, built.stderr) == (0, "")
    assert json.loads(built.stdout)["name"] == "a"
    again = _process("build", "a", "--text", TEXT, STEER_STORE=str(store_path))
    assert (again.returncode, again.stdout) == (1, "")
    remedy = "delete it, or replace it (--replace; Python: replace=True)"
    assert again.stderr == f"steer-operators: operator 'a' is already in {store_path}; {remedy}\n"
