import math

import pytest

from operators.core.errors import BuildError, ConceptFileError, OperatorError
from operators.core.header import MAX_CONCEPT, MAX_TEXTS, MAX_WORDS
from operators.core.vector_source import MAX_WORD
from operators.recipes.concept_entry import ConceptEntry, validate_value
from operators.recipes.concept_file import MAX_BYTES, parse_concepts, read_concept_file, select_entries

WHOLE = """\
[defaults]
profile = "golden"
layers = [15, 20]
rank = 32
strength = 1

[[concept]]
name = "ocean"
texts = ["The waves of the ocean", "A ship on the open sea"]
words = ["ocean", "sea"]
tolerance = 0.1

[[concept]]
name = "bridge"
text = "The Golden Gate Bridge"
layer = 3
rule = "substitute"
blend = 0.5
"""


def _problems(text):
    with pytest.raises(ConceptFileError) as found:
        parse_concepts(text, "c.toml")
    assert str(found.value) == "\n".join(found.value.problems)
    return list(found.value.problems)


def test_a_file_gives_an_entry_for_every_concept_and_layer():
    ocean = {"texts": ("The waves of the ocean", "A ship on the open sea"), "words": ("ocean", "sea")}
    common = {"profile": "golden", "strength": 1.0}
    assert [one.entry for one in parse_concepts(WHOLE, "c.toml")] == [
        ConceptEntry("ocean-layer15", **ocean, **common, tolerance=0.1, layer=15),
        ConceptEntry("ocean-layer20", **ocean, **common, tolerance=0.1, layer=20),
        ConceptEntry("bridge", ("The Golden Gate Bridge",), **common, rank=32, layer=3, rule="substitute", blend=0.5),
    ]


def test_an_entry_says_where_what_it_was_given_is():
    ocean, _, bridge = parse_concepts(WHOLE, "c.toml")
    assert ocean.at("text", "texts") == "c.toml: line 9: concept 'ocean'"
    assert ocean.at("layer", "layers") == "c.toml: line 3: concept 'ocean'"
    assert ocean.at("rank", "tolerance") == "c.toml: line 11: concept 'ocean'"
    assert bridge.at("layer", "layers") == "c.toml: line 16: concept 'bridge'"
    assert bridge.at("words") == "c.toml: line 13: concept 'bridge'"


def test_what_is_not_said_is_left_to_the_build():
    (one,) = parse_concepts('[[concept]]\nname = "a"\ntext = "x"\n', "c.toml")
    assert one.entry == ConceptEntry("a", ("x",))


def test_an_inline_table_is_a_concept_too():
    (one,) = parse_concepts('concept = [\n  {name = "a", text = "x"},\n]\n', "c.toml")
    assert one.at("name") == "c.toml: line 1: concept 'a'"


def _concept(line):
    return f'[[concept]]\nname = "a"\ntext = "x"\n{line}\n'


OF_A_KEY = [
    ("strenght = 1", "key 'strenght' is unknown; did you mean 'strength'?"),
    ("zzz = 1", "key 'zzz' is unknown; accepted: name, text, texts, words, profile, layer, layers, rank, tolerance, "
     "strength, rule, blend, positions, anchor, first_token"),
    ('"Layer" = 1', "key 'Layer' is unknown; did you mean 'layer'?"),
    ('profile = "resdual"', "profile is 'resdual'; 'golden' and 'residual' are accepted; did you mean 'residual'?"),
    ("profile = 1", "profile is 1; 'golden' and 'residual' are accepted"),
    ('rule = "mean"', "rule is 'mean'; 'cumulative' and 'substitute' are accepted"),
    ('layer = "15"', "layer is '15'; a whole number of at least 1 is accepted"),
    ("layer = 0", "layer is 0; a whole number of at least 1 is accepted"),
    ("layer = 1.0", "layer is 1.0; a whole number of at least 1 is accepted"),
    ("layer = true", "layer is true; a whole number of at least 1 is accepted"),
    ("layer = 2030-01-02", "layer is 2030-01-02; a whole number of at least 1 is accepted"),
    ("layers = 15", "layers is 15; a list of whole numbers is accepted"),
    ("layers = []", "layers is []; a list of whole numbers is accepted"),
    ('layers = [1, "2"]', "layers: one is '2'; a whole number of at least 1 is accepted"),
    ("layers = [1, 2, 1]", "layers has 1 twice; each layer once is accepted"),
    ("rank = 0", "rank is 0; a whole number of at least 1 or 'full' is accepted"),
    ('rank = "ful"', "rank is 'ful'; a whole number of at least 1 or 'full' is accepted"),
    ("tolerance = 0", "tolerance is 0; a number between 0 and 1 is accepted"),
    ("tolerance = 1.0", "tolerance is 1.0; a number between 0 and 1 is accepted"),
    ("tolerance = nan", "tolerance is nan; a number between 0 and 1 is accepted"),
    ('tolerance = "low"', "tolerance is 'low'; a number between 0 and 1 is accepted"),
    ("strength = inf", "strength is inf; a finite number is accepted"),
    ("strength = {}", "strength is a table; a number is accepted"),
    ("strength = false", "strength is false; a number is accepted"),
    ("blend = 1.5", "blend is 1.5; a number from 0 (operator) to 1 (anchor) is accepted"),
    ("blend = -0.1", "blend is -0.1; a number from 0 (operator) to 1 (anchor) is accepted"),
    ("positions = 4", "positions is 4; a text such as 'first' is accepted"),
    ('positions = "8..2"', "positions.end is 2; a number above the start 8 is accepted"),
    ('words = "sea"', "words is 'sea'; a list of words is accepted"),
    ("words = []", "words is []; a list of words is accepted"),
    ('words = ["sea", " "]', "words is ['sea', ' ']; a list of words is accepted"),
    ("x.y = 1", "key 'x' is unknown; accepted: name, text, texts, words, profile, layer, layers, rank, tolerance, "
     "strength, rule, blend, positions, anchor, first_token"),
    ('texts = ["y"]', "keys 'text' and 'texts' are both given; one is accepted"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "problem"), OF_A_KEY)
def test_a_mistake_is_told_with_file_line_concept_and_key(line, problem):
    assert _problems(_concept(line)) == [f"c.toml: line 4: concept 'a': {problem}"]
    if not line.startswith(("zzz", "x.y", "words", "texts")):
        assert _problems(f"[defaults]\n{line}\n{_concept('')}") == [f"c.toml: line 2: [defaults]: {problem}"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("layer = 1", "layers = [1]"), ("rank = 1", "tolerance = 0.1"), ("tolerance = 0.1", 'rank = "full"')],
)
def test_of_two_keys_that_say_the_same_one_is_accepted(one, other):
    (problem,) = _problems(_concept(f"{one}\n{other}"))
    assert problem.startswith("c.toml: line ")
    assert problem.endswith(" are both given; one is accepted")


OF_A_TABLE = [
    ("", ["line 1: there is no [[concept]]; at least one is needed"]),
    ("# nothing\n", ["line 1: there is no [[concept]]; at least one is needed"]),
    ("concept = []", ["line 1: there is no [[concept]]; at least one is needed"]),
    ("\n[concept]\nname = 'a'", ["line 2: concept is a table; tables that begin with [[concept]] are accepted"]),
    ("concept = ['a']", ["line 1: concept is ['a']; tables that begin with [[concept]] are accepted"]),
    ("defaults = 3\n" + _concept(""), ["line 1: defaults is 3; a table is accepted"]),
    ("[[defaults]]\n" + _concept(""), ["line 1: defaults is [{}]; a table is accepted"]),
    (_concept("") + "[[concpt]]", ["line 5: key 'concpt' is unknown; did you mean 'concept'?"]),
    ("x = 1\n" + _concept(""), ["line 1: key 'x' is unknown; [defaults] and [[concept]] are accepted"]),
    ("[defaults]\nname = 'a'\n" + _concept(""),
     ["line 2: [defaults]: key 'name' is unknown; accepted: profile, layer, layers, rank, tolerance, strength, rule, "
      "blend, positions, anchor, first_token"]),
    ("\n[[concept]]\ntext = 'x'", ["line 2: concept 1: key 'name' is missing"]),
    ("[[concept]]\nname = 'a'", ["line 1: concept 'a': key 'text' or 'texts' is missing; one of them is needed"]),
    ("[[concept]]\nname = 3\ntext = 'x'", ["line 2: concept 1: name is 3; a text is accepted"]),
    ("[[concept]]\nname = 'A b'\ntext = 'x'",
     ["line 2: concept 'A b': name: operator name 'A b' is not allowed; 1 to 64 of a-z 0-9 _ . - are, beginning with a "
      "letter or digit"]),
    ("[[concept]]\nname = 'a'\ntext = ''",
     ["line 3: concept 'a': text: concept '' has no tokens; at least one is needed"]),
    ("[[concept]]\nname = 'a'\ntext = ['x']", ["line 3: concept 'a': text is ['x']; a text is accepted"]),
    ("[[concept]]\nname = 'a'\ntexts = 'x'", ["line 3: concept 'a': texts is 'x'; a list of texts is accepted"]),
    ("[[concept]]\nname = 'a'\ntexts = []", ["line 3: concept 'a': texts is []; a list of texts is accepted"]),
    ("[[concept]]\nname = 'a'\ntexts = ['x',\n '']",
     ["line 3: concept 'a': texts: concept '' has no tokens; at least one is needed"]),
    (_concept("") + _concept(""), ["line 6: concept 'a': name 'a' is already that of line 1"]),
    (_concept("layers = [2]") + "\n[[concept]]\ntext = 'y'\nname = 'a-layer2'",
     ["line 8: concept 'a-layer2': name 'a-layer2' is already that of line 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problems"), OF_A_TABLE)
def test_a_wrong_table_is_told_with_its_line(text, problems):
    assert _problems(text) == [f"c.toml: {problem}" for problem in problems]


def test_a_name_that_is_too_long_with_its_layer_is_refused():
    name = "x" * 58
    assert [one.entry.name for one in parse_concepts(_concept("").replace('"a"', f'"{name}"'), "c.toml")] == [name]
    (problem,) = _problems(_concept("layers = [1, 2]").replace('"a"', f'"{name}"'))
    assert problem.startswith(f"c.toml: line 2: concept '{name}': name: operator name '{name}-layer1' is not allowed")


def test_all_mistakes_are_told_at_once():
    problems = _problems(
        '[defaults]\nlayer = 0\n[[concept]]\nname = "a"\ntxt = "x"\nblend = 2\n[[concept]]\ntext = ""\n[more]\n'
    )
    assert [problem.split(": ")[1:3] for problem in problems] == [
        ["line 9", "key 'more' is unknown; [defaults] and [[concept]] are accepted"],
        ["line 2", "[defaults]"],
        ["line 5", "concept 'a'"],
        ["line 6", "concept 'a'"],
        ["line 3", "concept 'a'"],
        ["line 8", "concept 2"],
        ["line 7", "concept 2"],
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\nb = ", "c.toml: line 2: Invalid value"),
        ("a = 1\nb = [", "c.toml: line 2: Invalid value"),
        ("[[concept]]\nname 'a'\n", "c.toml: line 2, column 6: Expected '=' after a key in a key/value pair"),
        ("[[concept]]\nname = 'a'\nname = 'b'\n", "c.toml: line 3, column 11: Cannot overwrite a value"),
        ("a = 1\x00", "c.toml: line 1, column 6: "),
        ("a = " + "9" * 5000, "c.toml: "),
        ("a = " + "[" * 5000, "c.toml: "),
    ],
)
def test_what_is_not_toml_is_told_with_its_place(text, problem):
    assert _problems(text)[0].startswith(problem)


def test_a_number_too_large_to_write_out_is_refused_in_words():
    for key, accepted in (
        ("tolerance", "a number between 0 and 1 is"),
        ("strength", "a number that a float can hold is"),
    ):
        assert _problems(_concept(f"{key} = 0x{'f' * 5000}")) == [
            f"c.toml: line 4: concept 'a': {key} is a very large number; {accepted} accepted"
        ]


def test_what_would_not_fit_a_header_is_refused_before_a_build():
    many = ", ".join(["'x'"] * (MAX_TEXTS + 1))
    for line, words in (
        (f"text = '{'x' * (MAX_CONCEPT + 1)}'", f"concept has {MAX_CONCEPT + 1} characters; at most {MAX_CONCEPT} are"),
        (f"texts = [{many}]", f"texts has {MAX_TEXTS + 1} texts; at most {MAX_TEXTS} are"),
        (f"text = 'x'\nwords = [{many}]", f"words has {MAX_TEXTS + 1} words; at most {MAX_WORDS} are"),
        (f"text = 'x'\nwords = ['{'x' * (MAX_WORD + 1)}']", f"of {MAX_WORD + 1} characters; at most {MAX_WORD} are"),
    ):
        (problem,) = _problems(f"[[concept]]\nname = 'a'\n{line}")
        assert words in problem
        assert len(problem) < 300


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'# one\nname = "caf\xe9"\n')
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_BYTES + 1))
    for name, problem in (
        ("missing.toml", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("latin.toml", "line 2: byte 0xe9 is not UTF-8; TOML files are"),
        ("large.toml", f"more than {MAX_BYTES} bytes; a file of concepts has at most that many"),
    ):
        with pytest.raises(ConceptFileError) as found:
            read_concept_file(tmp_path / name)
        assert str(found.value) == f"{tmp_path / name}: {problem}"


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_with_two_characters(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + _concept("layer = 2").replace("\n", "\r\n").encode())
    (one,) = read_concept_file(tmp_path / "c.toml")
    assert one.entry == ConceptEntry("a", ("x",), layer=2)
    assert one.at("layer") == f"{tmp_path / 'c.toml'}: line 4: concept 'a'"


def test_concepts_are_picked_by_their_name_or_by_that_of_one_operator():
    entries = parse_concepts(WHOLE, "c.toml")

    def picked(*names):
        return [one.entry.name for one in select_entries(entries, names)]

    assert picked("ocean") == ["ocean-layer15", "ocean-layer20"]
    assert picked("bridge", "ocean-layer20") == ["ocean-layer20", "bridge"]
    with pytest.raises(ConceptFileError) as found:
        picked("bridge", "oceans", "zzz")
    assert found.value.problems == (
        "c.toml: there is no concept 'oceans'; did you mean 'ocean'?",
        "c.toml: there is no concept 'zzz'; there are: ocean, ocean-layer15, ocean-layer20, bridge",
    )


def test_a_rank_and_a_tolerance_exclude_each_other():
    with pytest.raises(BuildError, match=r"rank 3 and tolerance 0.5 were both given; one is accepted"):
        ConceptEntry("a", ("x",), rank=3, tolerance=0.5)


def test_whole_numbers_are_numbers():
    assert isinstance(validate_value("strength", 2), float)
    assert validate_value("blend", 1) == 1.0
    with pytest.raises(OperatorError, match="blend is nan"):
        validate_value("blend", math.nan)
