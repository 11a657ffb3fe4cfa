"""Directories in which builds work: of one server each, on file systems with locks and without."""

import errno
import fcntl

import pytest

from steer_server.admin.work_directory import remove_abandoned, work_directory


def failing(monkeypatch, *errors):
    """The next locks end in these errors, and then in the last of them."""
    left = list(errors)

    def flock(_descriptor, _operation):
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise OSError(error, "no lock")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_builds_work_and_nothing_is_taken_for_abandoned(tmp_path, monkeypatch, error):
    failing(monkeypatch, error)
    with work_directory(tmp_path) as work:
        (work / "concept.toml").touch()
        remove_abandoned(tmp_path)
        assert list(work.iterdir()) == [work / "concept.toml"]
    assert not list(tmp_path.iterdir())


def test_a_directory_that_another_server_was_faster_to_take_is_left_to_it(tmp_path, monkeypatch):
    failing(monkeypatch, errno.EWOULDBLOCK, errno.EWOULDBLOCK, None)
    with work_directory(tmp_path) as work:
        assert work.is_dir()
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_where_all_are_taken_there_is_an_error_in_the_end(tmp_path, monkeypatch):
    failing(monkeypatch, errno.EWOULDBLOCK)
    with pytest.raises(OSError, match="taken away"), work_directory(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_missing_in_the_work_is_an_error_of_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), work_directory(tmp_path):
        raise FileNotFoundError("mine")
