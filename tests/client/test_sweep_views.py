"""What a sweep and its texts look like: page, plot, table of pandas, notebook, word diff."""

import io
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console
from steer_client import (
    ABResult,
    ArmResult,
    FinishReason,
    Generation,
    SweepResult,
    SweepRow,
    Timings,
    Usage,
    word_diff,
)
from steer_client._sweep.chart import curves, svg

HOSTILE = '<script>alert(1)</script> & "sea" </td>\x00\u202e<img src=x onerror=alert(1)>'


def row(prompt, operator, strength, text, ids=(1, 2, 3), kl=(0.5, 1.5)):
    plain = strength is None
    values = (prompt, f"prompt {prompt}", 0, operator, strength, text, tuple(ids), FinishReason.MAX_TOKENS)
    found = ("sea",) if "sea" in text else ()
    return SweepRow(*values, () if plain else kl, 3.0 if plain else 6.0, (), found)


@pytest.fixture
def result():
    rows = []
    for prompt in ("a", "b", "c", "d"):
        rows += [
            row(prompt, "normal", None, "the land"),
            row(prompt, "ocean", 0.0, "the land"),
            row(prompt, "ocean", 0.4, "the sea" if prompt < "d" else "the land"),
            row(prompt, "<b>tea", 0.3, HOSTILE, ids=[1, 2, 3, 4, 1, 2, 3, 4]),
        ]
    return SweepResult(tuple(rows), ("sea",), "tiny", "sha256:model", {"ocean": "sha256:ocean"})


def generation(text, sample=0):
    usage, timings = Usage(1, 2), Timings(0.0, None, 0.1)
    return Generation("r", text, (1, 2), FinishReason.EOS, None, usage, timings, (), (), 7, sample)


class Tags(HTMLParser):
    """Every element and attribute of a page; refuses those left open."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag


def test_the_summary_counts_hits_and_those_without_repetition(result):
    plain, control, ocean, tea = result.summaries
    assert (plain.hits.value, control.hits.value, ocean.hits.value, tea.hits.value) == (0, 0, 0.75, 1)
    # Of a text that loops, the word does not count as useful.
    assert (ocean.useful_hits.value, tea.useful_hits.value) == (0.75, 0)
    assert (ocean.kl_mean.value, ocean.kl_p95.value, plain.kl_mean) == (1.0, 1.5, None)
    assert ocean.perplexity_ratio.value == pytest.approx(2.0)
    assert ocean.n == ocean.num_prompts == 4
    assert ocean.hits.low < 0.75 < ocean.hits.high


def test_the_page_is_whole_loads_nothing_and_escapes_what_others_wrote(result, tmp_path):
    page = result.html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    tags = Tags(page).found
    names = {name for name, _ in tags}
    assert not {"script", "img", "link", "iframe", "b", "a"} & names
    attributes = {name for _, each in tags for name, _ in each}
    assert not {"src", "href", "onerror"} & attributes
    assert "<mark>sea</mark>" in page
    assert not re.search("[\x00\u202e]", page)
    assert page.count("<svg") == 5


def test_the_chart_is_xml_with_a_point_and_an_interval_for_each_strength(result):
    drawn = ElementTree.fromstring(svg(curves(result.summaries, "hits")))
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f".//{space}circle")) == 3
    said = [title.text for title in drawn.findall(f".//{space}g/{space}title")]
    assert said[1].startswith("ocean at λ = 0.4: 0.75 (0.30–0.95)")


@pytest.mark.parametrize("metric", ["hits", "useful_hits", "kl_mean", "kl_p95", "perplexity_ratio", None])
def test_every_metric_has_a_plot(result, metric, tmp_path):
    axes = result.plot(metric)
    axes.figure.savefig(tmp_path / "plot.png")
    _, labels = axes.get_legend_handles_labels()
    assert [label.lstrip("\u200b") for label in labels if label != "plain"] == ["ocean", "<b>tea"]


def test_a_metric_that_is_none_or_was_not_measured_is_refused(result):
    with pytest.raises(ValueError, match="metric 'hit' is none of hits, useful_hits"):
        result.plot("hit")
    from dataclasses import replace

    with pytest.raises(ValueError, match="hits need `words`"):
        replace(result, words=()).plot("hits")


def test_pandas_gets_a_line_for_each_text(result):
    frame = result.to_pandas()
    assert list(frame[frame.operator == "ocean"].hit) == [False, True] * 3 + [False, False]
    assert frame.groupby("arm").kl_mean.mean()["ocean=0.4"] == 1.0


@pytest.mark.parametrize(("module", "extra"), [("pandas", "tables"), ("matplotlib.pyplot", "plots")])
def test_a_missing_package_is_named_with_its_extra(result, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module.partition('.')[0]} is needed.*steering-operators\[{extra}\]"):
        result.to_pandas() if extra == "tables" else result.plot()


def test_a_notebook_shows_sweeps_comparisons_and_texts_escaped(result):
    steered = ArmResult(generation("the deep " + HOSTILE), 1, None, None, None)
    comparison = ABResult(generation("the dry land"), {"<i>": steered})
    for shown in (result, comparison, generation(HOSTILE)):
        names = {name for name, _ in Tags(shown._repr_html_()).found}
        assert not {"script", "img", "i"} & names
    assert "<del> dry land</del>" in comparison._repr_html_()
    # Without a plain text there is nothing to hold it against.
    assert "<ins>" not in ABResult(None, {"x": steered})._repr_html_().split("</style>")[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", ""),
        ("", "the sea"),
        ("I went to the shop", "I went to the deep sea shop "),
        ("ทะเลไทย", "ทะเลลึก"),
        (" two\n\nlines ", "two\nlines"),
        ("東京に行く", "大阪に行く!"),
    ],
)
def test_a_word_diff_gives_both_texts_back(first, second):
    changes = word_diff(first, second)
    assert "".join(change.text for change in changes if change.kind != "removed").split() == second.split()
    assert "".join(change.text for change in changes if change.kind != "added") == first
    assert generation(first).diff(generation(second)) == changes


def test_a_word_diff_names_what_was_added():
    changes = word_diff("I went to the shop", "I went to the sea")
    assert [(change.kind, change.text) for change in changes] == [
        ("same", "I went to the"),
        ("removed", " shop"),
        ("added", " sea"),
    ]


def test_the_table_fits_into_80_columns_with_its_intervals(result):
    console = Console(width=80, file=io.StringIO())
    console.print(result.table())
    shown = console.file.getvalue()
    assert "0.75" in shown
    assert "(0.30–0.95)" in shown
    assert "…" not in shown
