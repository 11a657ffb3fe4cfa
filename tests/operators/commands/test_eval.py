"""``steer-operators eval``: rows, report and refusals, on a tiny model."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from operators.__main__ import app
from operators.evaluate.form import CONTRAST, all_forms
from operators.model import loading as models

CONCEPTS = """
[[concept]]
name = "bridge"
texts = ["The golden bridge", "A bridge in the bay"]
words = ["bridge", "bay"]
word = "bridge"
[[concept]]
name = "bride"
fresh = true
texts = ["The wedding dress of the bride"]
words = ["bride", "wedding"]
word = "bride"
"""


@pytest.fixture(scope="module")
def wide_context(tiny, tmp_path_factory):
    """A directory of a tiny model whose context takes prompts of these tests."""
    directory = tmp_path_factory.mktemp("wide")
    loaded = tiny("llama", dtype="float32", fresh=True)
    loaded.model.config.max_position_embeddings = 256
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run_eval(wide_context, load_once, monkeypatch, tmp_path):
    """``run_eval("--quick")``: the command in a folder with small files of concepts and prompts."""
    monkeypatch.setattr(models, "load_model", load_once)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concepts.toml").write_text(CONCEPTS)
    (tmp_path / "held.txt").write_text("Here is a painting\nMy golden dress\nIn San Francisco\n")
    (tmp_path / "development.txt").write_text("The bay is painted\nA wedding was\n")

    def invoke(*arguments):
        files = ["--concepts", "concepts.toml", "--prompts", "held.txt", "--development-prompts", "development.txt"]
        return CliRunner().invoke(
            app, ["eval", "--model", str(wide_context), *files, *arguments], catch_exceptions=False
        )

    return invoke


def test_a_run_that_is_stopped_goes_on_and_ends_as_one_that_was_not(run_eval, tmp_path):
    whole = run_eval("--quick", "--out", "whole", "--json")
    assert whole.exit_code == 0, whole.output
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines(keepends=True)
    # Killed in the middle of a line.
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "rows.jsonl").write_text("".join(lines[:20]) + lines[20][:30])
    again = run_eval("--quick", "--out", "part", "--json")
    assert again.exit_code == 0, again.output
    assert sorted((tmp_path / "part" / "rows.jsonl").read_text().splitlines()) == sorted(map(str.rstrip, lines))
    figures = [json.loads((tmp_path / name / "figures.json").read_text()) for name in ("whole", "part")]
    assert figures[0] == figures[1]
    forms = {one["form"] for one in figures[0]["figures"]}
    assert forms == {"plain", *(form.name for form in all_forms().values() if form.quick)}
    for one in figures[0]["figures"]:
        assert (one["difference"] is not None) == (one["budget"] is not None and one["form"] != CONTRAST)
    report = run_eval("--report", "whole")
    assert report.stdout.strip() == "whole/table.md"
    assert "**contrast-anchor**" in (tmp_path / "whole" / "table.md").read_text()


def test_a_run_out_of_time_says_so_and_keeps_its_rows(run_eval):
    stopped = run_eval("--quick", "--forms", CONTRAST, "--minutes", "1e-9", "--json")
    assert stopped.exit_code == 75
    assert json.loads(stopped.stdout)["finished"] is False
    assert run_eval("--quick", "--forms", CONTRAST, "--json").exit_code == 0


@pytest.mark.parametrize(
    ("code", "files", "arguments", "message"),
    [
        (2, {}, ["--forms", "nothing"], "form 'nothing' does not exist; there are: contrast-anchor,"),
        (1, {"held.txt": "# none\n"}, [], "there are none; one per line is accepted"),
        (2, {"held.txt": "A wedding was\n"}, [], "'A wedding was' is a development prompt and a held-out one"),
        (2, {"held.txt": "My dress\nMy dress\n"}, [], "held-out prompt 'My dress' is there twice"),
        (1, {"concepts.toml": "[[concept]]\nname = 'a'\n"}, [], "the keys name, texts, words, word"),
        (1, {"concepts.toml": CONCEPTS.replace('word = "bride"', 'word = "church"')}, [], "is not among its words"),
        (1, {"concepts.toml": CONCEPTS.replace('"bride", "wedding"', '" "')}, [], "' ' is no text"),
        (1, {"concepts.toml": "x" * 9}, [], "not TOML"),
        (2, {}, ["--minutes", "0"], "minutes is 0; a positive number is accepted"),
        (2, {}, ["--vector", "church=v.gguf"], "CONCEPT=FILE is accepted, once for each of the concepts"),
        (1, {"v.gguf": "nothing"}, ["--vector", "bride=v.gguf"], "v.gguf"),
        (1, {}, ["--layer", "9"], "layer 9"),
        (2, {}, ["--only", "church"], "concept 'church' does not exist; there are: bridge, bride"),
        (2, {}, ["--num-prompts", "4"], "4 held-out prompts; there are 3, and 1 to 3 are accepted"),
        (2, {}, ["--num-development-prompts", "0"], "0 development prompts; there are 2, and 1 to 2 are accepted"),
        (2, {}, ["--regimes", "hot"], "regime 'hot' does not exist; there are: greedy, penalised, sampled,"),
        (2, {}, ["--doses", "0.5,x"], "doses are '0.5,x'; numbers with commas are accepted"),
        (2, {}, ["--doses", "0"], "doses are 0; more than 0 and at most 100 nats are accepted"),
        (2, {}, ["--doses", "nan"], "doses are 'nan'; numbers with commas are accepted"),
        (2, {}, ["--tokens", "1_2"], "tokens are '1_2'; numbers with commas are accepted"),
        (2, {}, ["--tokens", "24,12"], "tokens are 24, 12; 2 to 4096, ascending, are accepted"),
        (2, {}, ["--strengths", "0.1,5"], "strengths are 0.1, 5; 0.003 to 4, ascending, are accepted"),
        (1, {}, ["--report", "nowhere"], "nowhere/run.json: cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(run_eval, tmp_path, code, files, arguments, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    refused = run_eval("--quick", *arguments)
    assert refused.exit_code == code
    assert message in refused.output


SMALL = ("--quick", "--forms", CONTRAST, "--out", "small", "--json", "--num-prompts", "2", "--tokens", "6")
SMALL += ("--num-development-prompts", "1", "--strengths", "0.1,0.4", "--doses", "0.2")


def test_a_smaller_run_is_stated_and_another_regime_joins_it(run_eval, tmp_path):
    assert run_eval(*SMALL, "--regimes", "greedy").exit_code == 0
    first = (tmp_path / "small" / "rows.jsonl").read_text()
    trials = [json.loads(line)["of"] for line in first.splitlines() if '"kind":"trial"' in line]
    for subject in ("bridge", "bride"):
        assert [of["strength"] for of in trials if of["subject"] == subject][:2] == [0.1, 0.4]
    arguments = (*SMALL, "--regimes", "sampled-penalised,greedy-away", "--forms", f"{CONTRAST},mean-anchor")
    assert run_eval(*arguments).exit_code == 0
    assert (tmp_path / "small" / "rows.jsonl").read_text().startswith(first)
    run = json.loads((tmp_path / "small" / "run.json").read_text())
    protocol = run["protocol"]
    assert [len(protocol[name]) for name in ("development_prompts", "held_out_prompts")] == [1, 2]
    assert protocol["lengths"] == [6]
    assert {one["name"]: one["budgets"] for one in protocol["regimes"]} == {
        name: ["p95 KL 0.2"] for name in ("greedy", "sampled-penalised", "greedy-away")
    }
    # The other form was not asked for where the texts are greedy.
    assert (
        "**Not whole.** Rows (a form, dose and concept each) that are not there: greedy 2 of 4."
        in (tmp_path / "small" / "table.md").read_text()
    )
    assert run_eval(*SMALL, "--forms", f"{CONTRAST},mean-anchor", "--regimes", "greedy").exit_code == 0
    assert "Not whole" not in (tmp_path / "small" / "table.md").read_text()


def test_one_concept_has_no_interval_over_concepts(run_eval, tmp_path):
    assert run_eval(*SMALL, "--only", "bride").exit_code == 0
    figures = json.loads((tmp_path / "small" / "figures.json").read_text())["figures"]
    assert {one["asked"] for one in figures} == {1}
    assert all(one["useful"]["both"] is None and len(one["useful"]["prompts"]) == 2 for one in figures)


def test_ctrl_c_keeps_what_was_done(run_eval, tmp_path, monkeypatch):
    from operators.evaluate import cells

    write, calls = cells.write_texts, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(cells, "write_texts", interrupted)
    arguments = ["--quick", "--forms", CONTRAST, "--rows", "6", "--out", "stopped", "--json"]
    assert run_eval(*arguments).exit_code == 130
    kept = (tmp_path / "stopped" / "rows.jsonl").read_text()
    # Six texts: three strengths on two prompts.
    assert kept.count("\n") == 3
    assert run_eval(*arguments).exit_code == 0
    assert (tmp_path / "stopped" / "rows.jsonl").read_text().startswith(kept)


def test_a_vector_of_another_width_is_refused_and_one_that_fits_is_an_arm(run_eval, tmp_path, tiny):
    for width, code in ((7, 1), (tiny("llama").hidden_size, 0)):
        save_file({"v": torch.ones(width)}, tmp_path / "v.safetensors")
        answer = run_eval("--quick", "--forms", "imported", "--vector", "bride=v.safetensors", "--json")
        assert answer.exit_code == code
        assert ("another model" in answer.output) == (code == 1)
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())["figures"]
    both = next(one for one in figures if one["form"] == "imported" and one["concepts_of"] == "All 2 concepts")
    assert (both["concepts"], both["asked"]) == (1, 2)


def test_a_prompt_with_nothing_behind_its_first_token_is_refused(run_eval, tmp_path):
    (tmp_path / "held.txt").write_text("b\n")
    refused = run_eval("--quick", "--forms", CONTRAST)
    assert refused.exit_code == 1
    assert "prompt 'b' has 1 tokens; two or more are needed" in refused.output


def test_forms_are_listed(run_eval):
    listed = json.loads(run_eval("--list-forms", "--json").stdout)["forms"]
    assert list(listed) == list(all_forms())
