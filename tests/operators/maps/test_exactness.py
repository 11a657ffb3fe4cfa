"""Every architecture that has a table: its map is exact, and docs/ARCHITECTURES.md says so of no other."""

import pytest

from operators.maps.detach import families
from tests.odd_models import ODD, odd_model
from tests.operators.maps.exactness import BOUND, PAGE, attentions_of, cells, measure, rows_of

ROWS = rows_of(PAGE.read_text(encoding="utf-8"))
_MEASURED = slice(3, 6)
"""The page's columns of errors, which are of one run on one machine."""


@pytest.mark.parametrize("name", ODD)
def test_the_map_is_exact_at_every_layer_in_both_profiles_and_the_page_says_so(name):
    found = measure(odd_model(name), attentions_of(name))
    assert found.worst <= BOUND, found
    expected, row = cells(name, found), ROWS[name]
    assert [row[at] for at in (0, 1, 2, 6)] == [expected[at] for at in (0, 1, 2, 6)]
    assert all(0 <= float(error) <= BOUND for error in row[_MEASURED])


def test_every_table_is_measured_and_published():
    assert list(ROWS) == list(ODD)
    assert sorted(ODD) == sorted(family.name for family in families() if family.name not in ("cohere", "own"))
