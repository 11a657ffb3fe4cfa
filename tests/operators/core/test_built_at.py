from datetime import UTC, datetime, timedelta

import pytest

from operators.core.built_at import built_at
from operators.core.errors import OperatorError


def test_it_is_now_to_the_second_unless_the_environment_says_when(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    now = built_at()
    assert timedelta(0) <= datetime.now(UTC) - now < timedelta(seconds=60)
    assert now.microsecond == 0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert built_at() == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


@pytest.mark.parametrize("given", ["yesterday", "-1", "1.5", "1_0", "\u0661", "9" * 30])
def test_another_time_is_refused_by_name(monkeypatch, given):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
    with pytest.raises(OperatorError, match="whole seconds since 1970 are accepted"):
        built_at()
