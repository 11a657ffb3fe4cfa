"""The ``steer`` command as a process of its own against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEER = Path(sys.executable).parent / "steer"
GENERATION = {
    "text",
    "token_ids",
    "finish_reason",
    "usage",
    "receipts",
    "request_id",
    "sample",
    "seed",
    "stop_string",
    "timings",
}
RECEIPT = {
    "anchor",
    "first_token",
    "operator",
    "digest",
    "layer",
    "rule",
    "strength",
    "blend",
    "prompt_tokens_steered",
    "generated_tokens_steered",
    "prompt_tokens_cached",
    "mean_dose",
    "max_dose",
    "dose_bound",
    "defaulted",
    "calibrated",
    "positions",
    "words",
    "lens_digest",
    "kl",
    "positions_checked",
    "worst_cosine",
}
FEW = ("--max-tokens", "5", "--ignore-eos")


@pytest.fixture
def steer(server):
    def run(*arguments, target=server.target, said=""):
        return subprocess.run(
            [STEER, *arguments],
            env=os.environ | {"STEER_TARGET": target, "COLUMNS": "100"},
            capture_output=True,
            input=said,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def _json(done, code=0):
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def _is_generation(value, tokens=5):
    assert set(value) == GENERATION
    assert isinstance(value["text"], str)
    assert len(value["token_ids"]) == tokens
    assert all(isinstance(token, int) for token in value["token_ids"])
    assert value["finish_reason"] == "MAX_TOKENS"
    assert set(value["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert value["usage"]["completion_tokens"] == tokens
    assert set(value["timings"]) == {"queued", "time_to_first_token", "total"}
    assert all(set(receipt) == RECEIPT for receipt in value["receipts"])


def test_generate_answers_with_a_plain_text(steer):
    value = _json(steer("generate", "the golden gate", *FEW, "--json"))
    _is_generation(value)
    assert value["receipts"] == []


def test_generate_answers_with_a_steered_text_and_its_proof(steer):
    value = _json(steer("generate", "the golden gate", "-o", "golden=0.5@0.25", "-o", "dress", *FEW, "--json"))
    _is_generation(value)
    first, second = value["receipts"]
    assert (first["operator"], first["strength"], first["blend"], first["defaulted"]) == (
        *("golden", 0.5, 0.25),
        ["rule", "positions", "anchor", "first_token"],
    )
    assert (second["operator"], second["defaulted"]) == (
        "dress",
        ["strength", "rule", "blend", "positions", "anchor", "first_token"],
    )
    for receipt in (first, second):
        assert receipt["prompt_tokens_steered"] == value["usage"]["prompt_tokens"]
        assert receipt["generated_tokens_steered"] == 4
        assert receipt["prompt_tokens_cached"] == 0
    assert first["mean_dose"] == pytest.approx(0.25, abs=1e-4)


def test_positions_reach_the_operator_and_its_proof(steer):
    prompt = ("generate", "the golden gate", *FEW)
    value = _json(steer(*prompt, "-o", "golden=0.5:first", "-o", "dress=0.5:generated:1..", "--json"))
    first, second = value["receipts"]
    assert first["positions"] == {"part": "all", "start": 0, "end": 1}
    assert (first["prompt_tokens_steered"], first["generated_tokens_steered"]) == (1, 0)
    assert second["positions"] == {"part": "generated", "start": 1, "end": None}
    assert (second["prompt_tokens_steered"], second["generated_tokens_steered"]) == (0, 3)
    shown = " ".join(steer(*prompt, "-o", "golden=0.5:first").stderr.split())
    assert "cumulative, positions first (recommended rule and blend): 1 prompt + 0 generated tokens steered" in shown
    refused = _json(steer(*prompt, "-o", "golden:prompt:99..", "--json"), code=1)
    assert refused["error"]["field"] == "operators[0].positions"


def test_generate_repeats_itself_with_a_seed(steer):
    drawn = ("generate", "the bay", "--temperature", "1.5", "--seed", "11", *FEW, "--json")
    first, second = _json(steer(*drawn)), _json(steer(*drawn))
    assert first["token_ids"] == second["token_ids"]
    assert first["seed"] == 11


def test_generate_without_json_prints_the_text_and_sums_up_beside_it(steer):
    value = _json(steer("generate", "the bay", "-o", "golden", *FEW, "--json"))
    done = steer("generate", "the bay", "-o", "golden", *FEW)
    assert done.returncode == 0
    assert done.stdout == value["text"] + "\n"
    assert "golden" in done.stderr
    assert "MAX_TOKENS" in done.stderr


def test_ab_answers_with_both_texts_and_what_is_between_them(steer):
    value = _json(steer("ab", "the golden gate", "-o", "golden=1.5", *FEW, "--json"))
    assert set(value) == {"normal", "steered", "first_divergence", "kl", "perplexity"}
    _is_generation(value["normal"])
    _is_generation(value["steered"])
    assert value["normal"]["receipts"] == []
    assert [receipt["operator"] for receipt in value["steered"]["receipts"]] == ["golden"]
    pairs = enumerate(zip(value["normal"]["token_ids"], value["steered"]["token_ids"], strict=True))
    assert value["first_divergence"] == next((place for place, (a, b) in pairs if a != b), None)
    assert set(value["kl"]) == {"mean", "p95", "per_token"}
    assert len(value["kl"]["per_token"]) == 5
    assert value["kl"]["mean"] == pytest.approx(sum(value["kl"]["per_token"]) / 5)
    assert set(value["perplexity"]) == {"normal", "steered"}
    assert all(number >= 1 for number in value["perplexity"].values())


def test_ab_of_strength_zero_finds_no_difference(steer):
    value = _json(steer("ab", "the golden gate", "-o", "golden=0", *FEW, "--json"))
    assert value["first_divergence"] is None
    assert value["normal"]["token_ids"] == value["steered"]["token_ids"]
    assert value["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert value["perplexity"]["normal"] == pytest.approx(value["perplexity"]["steered"], rel=1e-5)


def test_ab_that_is_not_scored_measures_nothing(steer):
    value = _json(steer("ab", "the golden gate", "-o", "golden", "--no-score", *FEW, "--json"))
    assert value["kl"] is None
    assert value["perplexity"] is None
    _is_generation(value["steered"])


def test_ab_of_several_arms_gives_the_texts_of_each_alone(steer):
    arms = ("--arm", "mild: golden=0.5:first", "--arm", "both: golden=0.5 dress=0.25@0.5")
    done = steer("ab", "the golden gate", *arms, *FEW, "--jsonl")
    assert done.returncode == 0, done.stderr
    normal, mild, both = map(json.loads, done.stdout.splitlines())
    assert (normal["arm"], mild["arm"], both["arm"]) == ("normal", "mild", "both")
    assert [receipt["operator"] for receipt in both["receipts"]] == ["golden", "dress"]
    alone = _json(steer("ab", "the golden gate", "-o", "golden=0.5:first", *FEW, "--json"))
    assert normal["token_ids"] == alone["normal"]["token_ids"]
    assert mild["token_ids"] == alone["steered"]["token_ids"]
    assert mild["kl"]["mean"] == pytest.approx(alone["kl"]["mean"], abs=1e-5)


def test_score_reads_a_text_under_every_arm(steer):
    arms = ("--arm", "none: golden=0", "--arm", "much: golden=1.5")
    report = ("--prompt", "the bay", "--top", "3", "--words", "bridge", "--json")
    value = _json(steer("score", "the golden gate", *arms, *report))
    normal, none, much = value["arms"]
    assert value["token_ids"] == _json(steer("tokenize", "the golden gate", "--json"))["token_ids"]
    assert none["kl_mean"] == pytest.approx(0.0, abs=1e-6)
    assert none["perplexity"] == pytest.approx(normal["perplexity"], rel=1e-5)
    assert much["kl_mean"] > 0.01
    assert [len(token["words"]) for token in much["tokens"]] == [1] * len(value["token_ids"])
    assert [receipt["operator"] for receipt in much["receipts"]] == ["golden"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the golden gate\nthe bay\n")
    return path


def test_sweep_measures_every_strength_and_judges_it(steer, prompts, tmp_path):
    sweep = ("sweep", "--prompts", str(prompts), "-o", "golden=0,1.5", "-o", "dress=0.5:first", *FEW, "--json")
    files = ("--out", str(tmp_path / "run.jsonl"), "--html", str(tmp_path / "run.html"))
    met = ("--expect", "golden=1.5:kl_mean>0.001", "--expect", "golden=0:kl_p95<=1e-6")
    value = _json(steer(*sweep, *files, *met))
    assert value["controls"] == {"texts": 2, "changed": 0}
    arms = [("normal", None), ("golden", 0), ("golden", 1.5), ("dress:first", 0.5)]
    assert [(row["operator"], row["strength"]) for row in value["rows"]] == arms * 2
    assert [each["met"] for each in value["expectations"]] == [True, True]
    again = _json(steer(*sweep, *files, "--expect", "golden=1.5:kl_mean<0.001"), code=1)
    assert again["rows"] == value["rows"]
    assert "the golden gate" in (tmp_path / "run.html").read_text()


def test_vote_shows_two_texts_and_counts_the_answers(steer, prompts):
    vote = ("vote", "--prompts", str(prompts), "-o", "golden=1.5", *FEW, "--json")
    value = _json(steer(*vote, said="1\n2\n"))
    assert value["arms"] == ["steered", "normal"]
    assert sum(value["wins"].values()) + value["same"] == 2


def test_operators_lists_the_store_and_reloads_it(steer):
    value = _json(steer("operators", "--json"))
    assert [info["name"] for info in value["operators"]] == ["dress", "golden"]
    assert all(info["problem"] is None for info in value["operators"])
    assert all(info["digest"].startswith("sha256:") for info in value["operators"])
    value = _json(steer("operators", "--reload", "--json"))
    assert value["reload"] == {"added": [], "changed": [], "removed": [], "unusable": []}


def test_info_describes_the_model(steer, loaded, server):
    value = _json(steer("info", "--json"))
    assert value["model"] == loaded.name
    assert (value["num_layers"], value["hidden_size"]) == (4, 32)
    assert value["model_fingerprint"] == loaded.fingerprint
    assert value["tokenizer_fingerprint"] == loaded.tokenizer_fingerprint
    assert (value["engine"], value["dtype"], value["device"]) == ("hf", "float32", "cpu")
    assert value["attention"] == loaded.attention == "sdpa"
    assert value["max_queue"] == 8
    assert value["has_chat_template"] is True


def test_health_says_that_the_server_serves(steer):
    done = steer("health")
    assert (done.returncode, done.stdout) == (0, "serving\n")


def test_tokenize_shows_the_tokens_of_a_prompt(steer, loaded):
    value = _json(steer("tokenize", "the golden gate", "--json"))
    assert set(value) == {"token_ids", "tokens"}
    assert value["token_ids"] == loaded.tokenizer("the golden gate")["input_ids"]
    assert "".join(value["tokens"]) == "the golden gate"
    chat = _json(steer("tokenize", "hello", "--chat", "--json"))
    assert "".join(chat["tokens"]) == "user: hello\nassistant: "


def test_a_failed_request_ends_with_one_and_says_why(steer):
    done = steer("generate", "x", "-o", "nothing", "--json")
    value = _json(done, code=1)
    assert value["error"]["code"] == "NOT_FOUND"
    assert value["error"]["reason"] == "UNKNOWN_OPERATOR"
    assert "'nothing'" in value["error"]["message"]
    assert done.stderr.startswith("steer: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_invalid_value_names_its_field(steer):
    value = _json(steer("generate", "x", "--top-p", "7", "--json"), code=1)
    assert value["error"]["field"] == "sampling.top_p"


def test_a_wrong_option_ends_with_two(steer):
    assert steer("generate", "x", "--no-such-option").returncode == 2
    assert steer("ab", "x").returncode == 2
    assert steer("generate", "x", "-o", "golden=loud").returncode == 2
    assert steer("generate", "x", "-o", "golden:last").returncode == 2


@pytest.mark.parametrize("command", [("health",), ("generate", "x"), ("info", "--json")], ids=lambda words: words[0])
def test_no_server_ends_with_one_and_names_the_target(steer, command):
    done = steer(*command, "--timeout", "5", target="127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
