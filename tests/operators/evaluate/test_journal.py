"""The journal of an evaluation: what was done stays done, and only one run writes."""

import pytest

from operators.core.errors import TrialError
from operators.evaluate.journal import ROWS, open_journal, read_journal


def test_a_row_is_in_the_file_when_it_was_added(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.add({"kind": "trial", "strength": 0.5}, {"kl_p95": 1.0})
        # As a run that is killed now leaves it.
        assert read_journal(tmp_path).get({"strength": 0.5, "kind": "trial"})["kl_p95"] == 1.0


def test_half_a_line_is_removed_and_the_rest_stays(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.add({"kind": "trial"}, {"kl_p95": 1.0})
    whole = (tmp_path / ROWS).read_bytes()
    (tmp_path / ROWS).write_bytes(whole + b'{"of":{"kind":')
    with open_journal(tmp_path) as journal:
        assert list(journal.rows.values()) == [{"of": {"kind": "trial"}, "kl_p95": 1.0}]
    assert (tmp_path / ROWS).read_bytes() == whole


def test_two_runs_do_not_write_one_journal(tmp_path):
    with open_journal(tmp_path), pytest.raises(TrialError, match="another evaluation"), open_journal(tmp_path):
        pass
