"""What is said about a prompt: tokens, numbers, JSON, and a page that needs nothing but itself."""

import dataclasses
import html.parser
import json
import re

import pytest
import torch
from pydantic import ValidationError

from operators.analyse import analysis, canvas, model_summary, page, plots, report, results
from operators.analyse.frozen_blocks import FrozenBlocks
from operators.analyse.summary_page import summary_page
from operators.analyse.tokens import VocabularyProjection, norm_direction, ranks, visible
from operators.core.errors import AnalysisError, ConceptError
from operators.model.loading import final_norm

TEXT = "The Golden <script>&\n$a$ 🌉"


@pytest.fixture(scope="module")
def found(tiny):
    return analysis.analyse_prompt(TEXT, tiny("llama"))


@pytest.fixture
def undrawn():
    """Empty images: drawing takes most of the time."""
    names = ("reconstruction", "spectra", "positions", "emergence", "dimensions", "stream", "stable-ranks")
    return dict.fromkeys(names, canvas.ThemedImage(b"light", b"dark"))


def test_vectors_that_are_rows_of_the_tables_decode_to_their_tokens(tiny):
    loaded = tiny("llama", fresh=True)
    model = loaded.model
    model.get_output_embeddings().weight.data = torch.eye(320, 40, dtype=torch.float64)
    vocabulary = VocabularyProjection(loaded)
    for k, token in enumerate((5, 17, 39)):
        logits = vocabulary.logits(torch.eye(40, dtype=torch.float64)[[5, 17, 39]], normed=True)
        assert [t.id for t in vocabulary.top(logits, 1)[k]] == [token]
        assert vocabulary.top(logits, 1)[k][0].score == 1.0
    table = model.get_input_embeddings().weight
    scores = vocabulary.similarities(3 * table[[7, 300]])
    assert [tokens[0].id for tokens in vocabulary.top(scores, 4)] == [7, 300]
    assert [tokens[0].score for tokens in vocabulary.top(scores, 4)] == [1.0, 1.0]
    assert ranks(scores, 7)[0] == 1
    assert ranks(scores, 7)[1] == int((scores[1] > scores[1, 7]).sum()) + 1


def test_rows_that_no_token_has_are_never_read_out(tiny):
    loaded = tiny("llama", fresh=True)
    size = len(loaded.tokenizer)
    for layer in (loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()):
        layer.weight.data = torch.cat([layer.weight.data[:size], torch.full((9, 40), 1e3, dtype=torch.float64)])
    vocabulary = VocabularyProjection(loaded)
    ones = torch.ones(1, 40, dtype=torch.float64)
    assert vocabulary.logits(ones, normed=False).shape == (1, size)
    assert vocabulary.similarities(ones).shape == (1, size)


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt2"])
def test_the_norm_of_a_direction_is_what_the_norm_adds_along_it(tiny, family):
    model = tiny(family).model
    norm = final_norm(model)
    direction = torch.randn(
        1, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        expected = norm(direction) - norm(torch.zeros_like(direction))
    turned = norm_direction(model, direction)
    assert float(torch.cosine_similarity(turned, expected)) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(norm_direction(model, -2 * direction), -2 * turned)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a", "␣a"), ("\n\t", "⏎⇥"), ("\x1b[2J", r"\x1b[2J"), ("", "∅"), ("東京", "東京"), ("\u202eb", r"\u202eb")],
)
def test_tokens_are_shown_on_one_line(text, shown):
    assert visible(text) == shown


def test_part_of_a_character_is_shown_as_its_vocabulary_entry(tiny):
    loaded = tiny("llama")
    first = loaded.tokenizer("🌉")["input_ids"][0]
    assert loaded.tokenizer.decode([first]) == "�"
    assert VocabularyProjection(loaded).text(first) == loaded.tokenizer.convert_ids_to_tokens(first)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_analysis_is_consistent_with_the_model_and_with_itself(tiny, family):
    loaded = tiny(family)
    found = analysis.analyse_prompt("The Golden Gate", loaded)
    ids = loaded.tokenizer("The Golden Gate")["input_ids"]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert found.answer[0].id == int(logits.argmax())
    assert [position.token.id for position in found.positions] == ids
    assert found.reconstruction.detached_error < 1e-12
    assert found.reconstruction.ordinary_error > 0.05
    assert len(found.reconstruction.target) == loaded.hidden_size
    assert sum(p.share for p in found.positions) + found.offset_share == pytest.approx(1, abs=1e-4)
    for position in found.positions:
        squares = [value**2 for value in position.singular_values]
        assert position.stable_rank == pytest.approx(sum(squares) / squares[0], rel=1e-4)
    assert [layer.index for layer in found.layers] == list(range(1, loaded.num_layers + 1))
    # At the last layer, the logit lens is the model.
    assert found.layers[-1].lens_answer_rank == 1
    assert found.emergence.stream is not None
    final = found.layers[-1].map("cumulative", "block", "last").along_final
    assert final == pytest.approx((1, 0), abs=1e-5)
    assert found.layers[0].norm_first == pytest.approx(
        float(FrozenBlocks(loaded.model, tuple(ids)).stream(1)[0].norm()), rel=1e-5
    )


def test_the_map_of_a_position_out_of_reach_has_no_rank(tiny):
    # Block 1 of the tiny Gemma slides over three tokens, so the first of these is out of its sight.
    found = analysis.analyse_prompt("The Golden Gate Bridge", tiny("gemma3"))
    assert len(found.positions) > 3
    unseen = found.layers[0].map("single", "block", "first")
    assert (unseen.stable_rank, unseen.answer_rank, unseen.along_final, unseen.left) == (None, None, None, ())
    assert found.layers[1].map("cumulative", "block", "first").stable_rank is not None
    drawn = canvas.render(lambda figure, theme: plots._dimensions(figure, theme, found), size=(4, 3), footer="")
    assert drawn.light.startswith(b"\x89PNG")


def test_an_earlier_layer_can_be_the_target(tiny):
    found = analysis.analyse_prompt("The Golden Gate", tiny("llama"), layer=2)
    assert found.layer == 2
    assert found.reconstruction.detached_error < 1e-12


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_a_layer_that_is_not_there_is_refused(tiny, layer):
    with pytest.raises(AnalysisError, match=f"layer {layer} of tiny-llama; 1 to 4 are accepted"):
        analysis.analyse_prompt(TEXT, tiny("llama"), layer=layer)


def test_texts_that_cannot_be_analysed_are_refused(tiny, monkeypatch):
    loaded = tiny("llama")
    with pytest.raises(ConceptError, match="has no tokens"):
        analysis.analyse_prompt("", loaded)
    with pytest.raises(ConceptError, match="at most 64"):
        analysis.analyse_prompt("bridge " * 64, loaded)
    monkeypatch.setattr(analysis, "MAX_MAP_BYTES", 2 * 40 * 40 * 8)
    with pytest.raises(AnalysisError, match=r"take 0\.0128 MB each, and at most 2 are held"):
        analysis.analyse_prompt("The Golden Gate", loaded)


def test_the_size_of_maps_is_counted_in_their_own_dtype(tiny, monkeypatch):
    monkeypatch.setattr(analysis, "MAX_MAP_BYTES", 2 * 40 * 40 * 4)
    with pytest.raises(AnalysisError, match=r"in bfloat16 take 0\.0064 MB each, and at most 2 are held"):
        analysis.analyse_prompt("The Golden Gate", tiny("llama", dtype="bfloat16"))


def test_json_gives_the_analysis_back(found):
    document = results.to_json(found)
    assert results.analysis_from_json(document) == found
    data = json.loads(document, parse_constant=pytest.fail)
    assert data["schema"] == "steering-operators/analysis/1"
    data["layers"][0]["index"] = "first"
    with pytest.raises(ValidationError):
        results.analysis_from_json(json.dumps(data))


class Reader(html.parser.HTMLParser):
    """Checks that tags close, and collects what a page would load and what it says."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loaded, self.texts, self.problems = [], set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [v for k, v in attrs if k in {"src", "srcset", "href", "data", "action", "poster", "background"}]
        if tag not in {"meta", "img", "source", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def _read(document):
    reader = Reader()
    reader.feed(document)
    reader.close()
    assert reader.problems == []
    assert reader.open == []
    return reader


def _is_self_contained(document):
    reader = _read(document)
    assert reader.loaded
    assert all(address.startswith("data:image/png;base64,") for address in reader.loaded)
    assert reader.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not re.search(r"https?://|@import|url\(|\bon\w+=", re.sub(r"base64,[\w+/=]+", "", document))
    return reader


def test_the_page_is_self_contained_and_escapes_what_it_shows(found, undrawn):
    document = report.analysis_page(found, undrawn)
    reader = _is_self_contained(document)
    assert "<script" not in document
    text = "".join(reader.texts)
    assert "The Golden <script>&⏎$a$ 🌉" in text
    assert "Content-Security-Policy" in document
    assert "prefers-color-scheme: dark" in document


def test_a_token_that_is_markup_stays_a_token():
    said = page.chip(results.ScoredToken(1, ' <img src=x onerror="a()">&amp;', 0.0))
    assert "<img" not in said
    assert "".join(_read(said).texts) == '␣<img␣src=x␣onerror="a()">&amp;'


def test_labels_can_be_drawn_in_the_font():
    assert canvas.label(" a\n") == "␣a⏎"
    assert canvas.label("$x$") == r"\$x\$"
    assert canvas.label("東") == r"\u6771"
    assert canvas.label("🌉") == r"\U0001f309"
    assert len(canvas.label("a" * 40)) == 16


def test_the_dark_plot_has_the_layout_that_it_would_get_by_itself(found):
    def draw(figure, theme):
        plots._positions(figure, theme, found)

    both = canvas.render(draw, size=(6, 4), footer="x")
    alone, _ = canvas._render(draw, (6, 4), "x", canvas.DARK, None)
    assert both.dark == alone != both.light


def test_drawing_many_positions_leaves_matplotlib_as_it_was(found):
    import matplotlib

    many = dataclasses.replace(found, positions=found.positions * 2)
    before = dict(matplotlib.rcParams)
    drawn = canvas.render(lambda figure, theme: plots._spectra(figure, theme, many), size=(4, 3), footer="many")
    assert drawn.dark.startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_the_shipped_phrases_are_a_hundred_short_ones():
    phrases = model_summary.read_phrases(model_summary.DEFAULT_PHRASES)
    assert len(phrases) == len(set(phrases)) == 100
    assert all(2 <= len(phrase.split()) <= 10 for phrase in phrases)
    assert model_summary.read_phrases(model_summary.DEFAULT_PHRASES, limit=3) == phrases[:3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; one phrase per line"),
        (b"one\n\nthree\n", "line 2: is blank"),
        (b"one\ntwo\nthr\xff\n", "line 3: byte 4 is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_phrases_that_cannot_be_read_are_refused_by_line(tmp_path, content, words):
    path = tmp_path / "phrases.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnalysisError, match=words):
        model_summary.read_phrases(path)


def test_summaries_describe_every_phrase_under_every_model(tiny, undrawn):
    phrases = ("The Golden Gate", "a painting of <b>", "x")
    calls = []
    models = tuple(
        model_summary.summarise_model(phrases, tiny(family), progress=lambda *call: calls.append(call))
        for family in ("llama", "gpt2")
    )
    assert calls[2] == ("Phrases, tiny-llama", 3, 3)
    summaries = results.ModelSummaries(results.SUMMARIES_SCHEMA, phrases, models)
    whole = analysis.analyse_prompt("The Golden Gate", tiny("llama"))
    first = models[0].phrases[0]
    assert first.num_tokens == len(whole.positions)
    assert first.answer == whole.answer
    assert first.first == pytest.approx(whole.positions[0].stable_rank, rel=0.15)
    assert first.mean == pytest.approx(whole.mean_stable_rank, rel=0.15)
    assert first.last_left[0].id == whole.positions[-1].directions[0].left[0].id
    one = models[0].phrases[2]
    assert one.first == one.last == one.mean
    assert results.summaries_from_json(results.to_json(summaries)) == summaries
    document = summary_page(summaries, undrawn)
    assert "a painting of <b>" in "".join(_is_self_contained(document).texts)


def test_a_phrase_whose_output_embedding_is_not_finite_is_named(tiny):
    loaded = tiny("llama", fresh=True)
    loaded.model.get_input_embeddings().weight[loaded.tokenizer("bay")["input_ids"][-1]] = torch.inf
    with pytest.raises(AnalysisError, match=r"phrase 2: the output embedding of 'bay' under tiny-llama is not finite"):
        model_summary.summarise_model(("The Golden Gate", "bay"), loaded)


def test_a_phrase_that_is_too_long_is_named(tiny):
    with pytest.raises(AnalysisError, match=r"phrase 2: concept has .* at most 64"):
        model_summary.summarise_model(("a", "bridge " * 64), tiny("llama"))
