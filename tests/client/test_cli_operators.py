"""How the command shows operators, what they recommend, and a comparison that was cut."""

import json
from importlib.metadata import version
from itertools import islice

import pytest
from steer_client._cli import show_streams
from steer_client._cli.app import app
from steer_client._cli.side_by_side import SideBySide
from steer_client._results import ArmDelta, TextDelta
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp
from steering.v1 import text_pb2
from typer.testing import CliRunner

DIGEST = "sha256:" + "1a2b3c4d" * 8
ONE = {"prompt_tokens_steered": 1, "generated_tokens_steered": 0}


@pytest.fixture
def steer(fake, monkeypatch):
    """Runs the command against the scripted server; stdout and stderr are kept apart."""
    monkeypatch.setenv("STEER_TARGET", fake.target)
    monkeypatch.setenv("COLUMNS", "100")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, arguments)


def _operator(**fields):
    point = ops.CalibrationPoint(kl_p95=0.75, hit_rate=0.5, perplexity_ratio=1.5, distinct_2=0.875)
    calibration = ops.Calibration(
        recommended=point, plain_hit_rate=0.0625, kl_budget=1, max_perplexity_ratio=2, prompts=20, tokens=28
    )
    values = {
        "name": "golden-gate",
        "concept": "Golden Gate",
        "concept_token_ids": [1, 2],
        "concept_weight": 0.5,
        "num_texts": 3,
        "more_texts": [ops.ConceptText(text="the bridge", token_ids=[3], weight=0.25)],
        "members": [ops.Member(name="first", digest=DIGEST, weight=-1.5)],
        "injection_layer": 15,
        "hidden_size": 576,
        "positions": 2,
        "rank": 64,
        "low_rank": ops.LowRank(min_residual=0.0625, max_residual=0.125, weighting="embedding"),
        "recommended_strength": 0.4,
        "recommended_blend": 0.5,
        "recommended_rule": 1,
        "recommended_positions": sp.Positions(part=sp.Positions.PART_GENERATED, end=4),
        "calibration": calibration,
        "model_dtype": "bfloat16",
        "digest": DIGEST,
    }
    return ops.Operator(**(values | fields))


def test_the_list_says_rank_further_texts_and_whether_an_operator_is_calibrated(steer, fake):
    exact = _operator(name="exact", low_rank=None, calibration=None, num_texts=1, rank=576)
    fake.listed = ops.ListOperatorsResponse(operators=[_operator(), exact])
    head, *rows = steer("operators").stdout.splitlines()
    found = [dict(zip(head.split(), cells, strict=True)) for cells in map(_cells, rows)]
    assert [(row["name"], row["concept"], row["rank"], row["calibrated"]) for row in found] == [
        ("golden-gate", "Golden Gate (and 2 more)", "64", "yes"),
        ("exact", "Golden Gate", "exact", "no"),
    ]


def _cells(row):
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    # These scripted operators name no profile.
    return [*cells[:2], "", *cells[2:]]


def test_all_about_one_operator_is_shown(steer, fake):
    fake.operator = _operator()
    result = steer("operators", "golden-gate")
    assert result.exit_code == 0
    for line in (
        "concept         'Golden Gate', 2 tokens, weight 0.5",
        "further text    'the bridge', 1 token, weight 0.25",
        "                and 1 text that the server does not send",
        f"member          first, weight -1.5, {DIGEST}",
        "rank            64, 2 blocks at hidden size 576, residual 0.0625 to 0.125, embedding weighting",
        "recommended     strength 0.4, blend 0.5, cumulative, positions generated:..4, calibrated",
        "calibration     hit rate 0.5 (plain 0.0625), KL p95 0.75 nats of 1, perplexity × 1.5 of 2, "
        "distinct-2 0.875 (20 prompts, 28 tokens each)",
        "reconstruction  relative error 0, model in bfloat16",
    ):
        assert line in [shown.rstrip() for shown in result.stdout.splitlines()], line
    (value,) = json.loads(steer("operators", "golden-gate", "--json").stdout)["operators"]
    assert (value["rank"], value["low_rank"]["max_residual"]) == (64, 0.125)
    assert value["calibration"]["recommended"]["hit_rate"] == 0.5


def test_the_sampling_of_a_calibration_is_shown_as_options_of_a_request(steer, fake):
    sampling = text_pb2.SamplingParams(temperature=0.75, top_p=0.9375, repetition_penalty=1.25, seed=12345678901234567)
    held_out = ops.HeldOut(
        prompts=50, useful_rate=0.5, useful_low=0.375, useful_high=0.625, kl_p95=0.75, kl_mean=0.25, plain_useful_rate=0
    )
    calibration = ops.Calibration(kl_budget=1, prompts=20, tokens=28, sampling=sampling, held_out=held_out)
    fake.operator = _operator(calibration=calibration)
    shown = " ".join(steer("operators", "golden-gate").stdout.split())
    options = "--temperature 0.75 --top-p 0.9375 --repetition-penalty 1.25 --seed 12345678901234567"
    assert f"as calibrated: {options}" in shown
    assert "held out useful 0.5 [0.375, 0.625] (plain 0) on 50 prompts, KL p95 0.75, mean 0.25" in shown
    assert steer("generate", "hello", *options.split()).exit_code == 0
    assert fake.requests[-1].sampling.seed == 12345678901234567


def test_an_exact_operator_and_a_setting_chosen_by_hand_are_called_so(steer, fake):
    chosen = ops.Calibration(kl_budget=1, prompts=20, tokens=28)
    fake.operator = _operator(low_rank=None, calibration=chosen, more_texts=[], num_texts=1, members=[])
    shown = steer("operators", "golden-gate").stdout
    assert "exact, 2 blocks at hidden size 576" in shown
    assert "strength 0.4, blend 0.5, cumulative, positions generated:..4, not calibrated" in shown
    assert "the recommended setting is none of those measured (20 prompts, 28 tokens each)" in shown
    assert "further text" not in shown
    assert "member" not in shown


def test_an_unusable_operator_is_shown_with_its_problem_alone(steer, fake):
    fake.operator = ops.Operator(name="broken", problem="the file is cut short")
    assert [line.split() for line in steer("operators", "broken").stdout.splitlines()] == [
        ["name", "broken"],
        ["problem", "the", "file", "is", "cut", "short"],
    ]


@pytest.mark.parametrize(
    ("operator", "changes", "says"),
    [
        ("golden-gate", {"calibrated": True}, "strength 0.55, blend 0, cumulative (recommended, calibrated): "),
        ("golden-gate", {}, "strength 0.55, blend 0, cumulative (recommended): "),
        ("golden-gate=0.3", {}, "strength 0.3, blend 0, cumulative (recommended rule and blend): "),
        (
            "golden-gate=0.55",
            {"calibrated": True},
            "strength 0.55, blend 0, cumulative (recommended rule and blend, calibrated): ",
        ),
        (
            "golden-gate=0.3@0:first",
            ONE,
            "cumulative, positions first (recommended rule): 1 prompt + 0 generated tokens",
        ),
        (
            "golden-gate",
            ONE | {"positions": sp.Positions(end=1)},
            "strength 0.55, blend 0, cumulative, positions first (recommended): 1 prompt",
        ),
        (
            "golden-gate=0.3",
            ONE | {"positions": sp.Positions(end=1)},
            "positions first (recommended rule and blend and positions): 1 prompt",
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "ab"])
def test_what_was_recommended_is_said_and_whether_it_was_calibrated(
    steer, fake, make, command, operator, changes, says
):
    from steer_client import OperatorUse

    use = make.sent(OperatorUse.parse(operator))
    fake.steered = make.response("one more", receipts=[make.receipt(use, **changes)])
    result = steer(command, "hello", "--operator", operator)
    shown = result.stdout + result.stderr
    assert "✓ golden-gate sha256:1a2b3c4d… layer 20, strength 0." in shown
    assert says in shown
    value = json.loads(steer(command, "hello", "--operator", operator, "--json").stdout)
    (receipt,) = value.get("steered", value)["receipts"]
    assert receipt["calibrated"] is changes.get("calibrated", False)
    assert receipt["dose_bound"] == receipt["strength"] / 2


def test_a_setting_that_was_named_in_full_has_no_origin(steer, fake, make):
    fake.steered = make.response(
        receipts=[make.receipt(rule=1, defaulted=["positions", "anchor", "first_token"], calibrated=True)]
    )
    result = steer("generate", "hello", "--operator", "golden-gate=0.55@0", "--rule", "cumulative")
    assert "blend 0, cumulative: 6 prompt" in result.stderr


def test_the_version_is_that_of_the_package(steer, fake):
    result = steer("--version")
    assert (result.exit_code, result.stdout) == (0, f"steer {version('steering-operators')}\n")


@pytest.mark.parametrize("command", [("generate", "x"), ("health",), ("operators",)])
def test_a_target_without_a_port_is_wrong_usage(steer, fake, command):
    result = steer(*command, "--target", "localhost")
    assert result.exit_code == 2
    assert "HOST:PORT" in result.stderr
    assert "'--target'" in result.stderr
    assert fake.requests == []


def test_a_deadline_keeps_what_has_come_of_a_comparison(steer, fake):
    # Both arms have started, and each has sent its first word.
    fake.hang_after = 4
    result = steer("ab", "hello", "--operator", "golden-gate", "--timeout", "1.5")
    assert result.exit_code == 1
    # Down a pipe stdout is for results alone.
    assert result.stdout == ""
    *panels, last = result.stderr.splitlines()
    assert "normal – cut, without receipts" in panels[0]
    assert "steered – cut, without receipts" in panels[0]
    assert panels[1].count("one") == 2
    assert last.startswith("steer: ")
    assert "within 1.5 s" in last


def test_a_deadline_before_anything_came_shows_nothing_but_itself(steer, fake):
    fake.hang_after = 2
    result = steer("ab", "hello", "--operator", "golden-gate", "--timeout", "0.5")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


def test_an_unproven_comparison_is_never_shown(steer, fake, make):
    fake.steered = make.response("one more", receipts=[])
    result = steer("ab", "hello", "--operator", "golden-gate")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_keeps_what_has_come_of_a_comparison(steer, fake, monkeypatch, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    read = show_streams._read_pieces

    def interrupted(stream, shown):
        read(islice(stream, 2), shown)
        raise KeyboardInterrupt

    monkeypatch.setattr(show_streams, "_read_pieces", interrupted)
    result = steer("ab", "hello", "--operator", "golden-gate")
    assert result.exit_code == 130
    kept, other = (result.stdout, result.stderr) if terminal else (result.stderr, result.stdout)
    assert kept.count("cut, without receipts") == 2
    assert "one" in kept
    assert other == ""
    assert fake.left.wait(5)


def test_a_cut_text_that_is_merely_behind_does_not_differ():
    shown = SideBySide(("steered",))
    assert not shown.cut()
    for arm, token in (("normal", 1), ("normal", 2), ("steered", 1)):
        shown.add(ArmDelta(arm, TextDelta("a", (token,))))
    assert shown.cut()
    assert shown.divergence("steered") is None
    whole = SideBySide(("steered",))
    for arm, token in (("normal", 1), ("normal", 2), ("steered", 1)):
        whole.add(ArmDelta(arm, TextDelta("a", (token,))))
    whole.finish({})
    assert whole.divergence("steered") == 1
