"""Builds of a lens that were stopped go on where they were, and only they do."""

import pytest
import torch

from operators.core.store import Store
from operators.lens import matrices
from operators.lens.matrices import encode_texts, lens_matrices
from operators.lens.partial import PartialSums

TEXTS = ("The bridge is painted.", "Here is the bay.", "A wedding")


@pytest.fixture
def loaded(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture
def partial(loaded, tmp_path):
    def of(texts=TEXTS, layers=(2,), name="lens"):
        return PartialSums(Store(tmp_path), name, loaded, encode_texts(texts, loaded), layers)

    return of


@pytest.fixture
def stopped(loaded, partial, monkeypatch):
    """The sums of two texts, of a build that Ctrl-C stopped in its third."""
    real, calls = matrices.text_pulls, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(matrices, "text_pulls", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lens_matrices(TEXTS, [2], loaded, partial=partial())
    monkeypatch.setattr(matrices, "text_pulls", real)


def test_it_goes_on_where_it_was(loaded, partial, stopped):
    reports = []
    found = lens_matrices(TEXTS, [2], loaded, partial=partial(), progress=lambda *report: reports.append(report))
    assert reports[0][1] > 2 * loaded.hidden_size
    assert reports[-1] == ("rows", 3 * loaded.hidden_size, 3 * loaded.hidden_size)
    whole = lens_matrices(TEXTS, [2], loaded)
    assert torch.equal(found.first[2], whole.first[2])
    assert torch.equal(found.others[2], whole.others[2])


def test_another_build_begins_anew(partial, stopped):
    assert partial().load()[0] == 2
    assert partial(texts=TEXTS[::-1]).load() is None
    assert partial(layers=(1, 2)).load() is None


def test_a_damaged_file_and_a_link_are_as_good_as_none(partial, stopped, tmp_path):
    path = partial().path
    data = path.read_bytes()
    for damaged in (data[:-1], data[:40] + bytes([data[40] ^ 1]) + data[41:], data[:-1] + bytes([data[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert partial().load() is None
    other = tmp_path / "other"
    other.write_bytes(data)
    path.unlink()
    path.symlink_to(other)
    assert partial().load() is None


def test_it_is_no_operator_and_is_removed_with_those_of_other_builds_of_the_name(partial, stopped, tmp_path):
    store = Store(tmp_path)
    assert store.names() == []
    state = partial().load()
    partial(layers=(1,)).save(*state)
    partial(name="other").save(*state)
    partial().remove()
    assert [path.name.split(".")[1] for path in PartialSums.left_in(store)] == ["other"]
