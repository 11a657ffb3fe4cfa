import tomllib

import pytest

from operators.recipes.toml_lines import key_lines, line_of


def test_every_key_has_its_line():
    text = "\n".join(
        [
            '# [[concept]] name = "in a comment"',  # 1
            '[defaults] # a comment with "quotes',
            "layer = 1",
            '"quoted = key"\t= [ # a list ]',  # 4
            "  1,",
            '  2, # ] "',
            "]",
            "",
            "[[ concept ]]",  # 9
            '  name = "a # no comment \\" ["',
            'text = """several',  # 11
            'name = "inside"',
            '[[concept]] " ""',
            'quotes at the end""""" # and a comment',
            "rank = 3",  # 15
            "[[concept]]",
            "text = '''",  # 17
            "name = 'inside''''",
            "'name' = 'it\"'",  # 19
            "words = [ \"a = [\", 'b\"', '''",
            "x''' ]",
            'inline.key = {a = 1, b = "}"}',  # 22
            "[concept.table]",
            "deep = 2030-01-02 03:04:05",
            '[["concept"]]',  # 25
            'name="last"',
        ]
    )
    assert [one.get("name") for one in tomllib.loads(text)["concept"]] == ['a # no comment " [', 'it"', "last"]
    assert key_lines(text) == {
        ("defaults",): 2,
        ("defaults", "layer"): 3,
        ("defaults", "quoted = key"): 4,
        ("concept",): 9,
        ("concept", 0): 9,
        ("concept", 0, "name"): 10,
        ("concept", 0, "text"): 11,
        ("concept", 0, "rank"): 15,
        ("concept", 1): 16,
        ("concept", 1, "text"): 17,
        ("concept", 1, "name"): 19,
        ("concept", 1, "words"): 20,
        ("concept", 1, "inline"): 22,
        ("concept", 1, "inline", "key"): 22,
        ("concept", 1, "table"): 23,
        ("concept", 1, "table", "deep"): 24,
        ("concept", 2): 25,
        ("concept", 2, "name"): 26,
    }


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n# done"])
def test_lines_are_counted_whatever_ends_them(ending, end):
    assert key_lines(ending.join(["", "a = 1", "", "[b]", "c.d = 2"]) + end) == {
        ("a",): 2,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", "d"): 5,
    }


def test_a_place_without_a_line_of_its_own_is_where_what_holds_it_is():
    lines = key_lines('x = 1\nconcept = [\n  {name = "a"},\n]\n')
    assert line_of(lines, ("concept", 0, "name")) == 2
    assert line_of(lines, ("nowhere",)) == 1


def test_a_table_inside_others_gives_them_its_line():
    assert key_lines("[a.b]\n[[a.c]]\nd = 1\n[[a.c]]\n[a.c.e]\n") == {
        ("a",): 1,
        ("a", "b"): 1,
        ("a", "c"): 2,
        ("a", "c", 0): 2,
        ("a", "c", 0, "d"): 3,
        ("a", "c", 1): 4,
        ("a", "c", 1, "e"): 5,
    }


def test_an_empty_document_has_no_lines():
    assert key_lines("") == key_lines("# nothing\n\n") == {}
