import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from operators.core.artifact import to_bytes
from operators.core.errors import ArtifactError, StoreError
from operators.core.store import Store


def _snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["a", "0", "golden-gate", "a.b_c-d", "v1.2", "x" * 64, "a..b"])
def test_a_plain_name_is_allowed_and_stays_in_the_store(name, make_operator, tmp_path):
    path = Store(tmp_path).save(name, make_operator())
    assert path.parent == tmp_path
    assert Store(tmp_path).names() == [name]
    assert Store(tmp_path).load(name).digest == make_operator().digest


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "A",
        "-a",
        ".a",
        "_a",
        "a b",
        "a\n",
        "a\0",
        "é",
        "x" * 65,
        "~root",
        "a:b",
        "%2e%2e",
    ],
)
@pytest.mark.parametrize("method", ["path_of", "load", "read_header", "delete", "check_free"])
def test_a_name_that_could_leave_the_store_is_refused(method, name, tmp_path):
    with pytest.raises(StoreError, match="is not allowed; 1 to 64 of a-z 0-9"):
        getattr(Store(tmp_path), method)(name)


def test_a_refused_name_is_not_written(make_operator, tmp_path):
    inner = tmp_path / "store"
    with pytest.raises(StoreError, match="is not allowed"):
        Store(inner).save("../escaped", make_operator())
    assert not list(tmp_path.iterdir())


def test_a_store_is_made_when_the_first_operator_is_saved(make_operator, tmp_path):
    directory = tmp_path / "not" / "yet"
    assert Store(directory).names() == []
    Store(directory).save("a", make_operator())
    assert Store(directory).names() == ["a"]


def test_a_saved_operator_is_the_bytes_of_the_artifact_readable_by_everybody(make_operator, tmp_path):
    path = Store(tmp_path).save("a", make_operator())
    assert path.read_bytes() == to_bytes(make_operator())
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_names_are_sorted_and_are_those_of_operators_only(make_operator, tmp_path):
    for name in ("b", "a"):
        Store(tmp_path).save(name, make_operator())
    for other in ("notes.txt", ".c.123.tmp", "Upper.safetensors", ".safetensors", "x.safetensors.bak"):
        (tmp_path / other).touch()
    assert Store(tmp_path).names() == ["a", "b"]


def test_a_store_iterates_over_its_names_and_knows_them(make_operator, tmp_path):
    store = Store(str(tmp_path))
    assert store
    assert list(store) == []
    for name in ("b", "a"):
        store.save(name, make_operator())
    (tmp_path / "broken.safetensors").write_text("no operator")
    assert list(store) == store.names() == ["a", "b", "broken"]
    assert all(name in store for name in store)
    assert not any(name in store for name in ("c", "../a", "", 7, None))


def test_stores_of_one_directory_are_equal(tmp_path):
    assert Store(tmp_path) == Store(str(tmp_path)) != Store(tmp_path / "other")
    assert len({Store(tmp_path), Store(str(tmp_path))}) == 1
    assert Store(tmp_path) != tmp_path
    assert eval(repr(Store(tmp_path))) == Store(tmp_path)


def test_a_header_is_read_without_the_tensors(make_operator, tmp_path):
    store, operator = Store(tmp_path), make_operator(affine=True)
    path = store.save("a", operator)
    found = store.read_header("a")
    assert (found.header, found.header_json, found.digest) == (operator.header, operator.header_json, operator.digest)
    assert found.affine
    assert found.num_bytes == path.stat().st_size
    store.save("b", make_operator())
    assert not store.read_header("b").affine
    with pytest.raises(StoreError, match=r"no operator 'c' in .*; there are: a, b"):
        store.read_header("c")


def test_a_missing_operator_is_named_with_those_there_are(make_operator, tmp_path):
    for use in (Store(tmp_path).load, Store(tmp_path).delete):
        with pytest.raises(StoreError, match=r"no operator 'c' in .*; there are: none"):
            use("c")
    Store(tmp_path).save("a", make_operator())
    Store(tmp_path).save("b", make_operator())
    for use in (Store(tmp_path).load, Store(tmp_path).delete):
        with pytest.raises(StoreError, match=r"no operator 'c' in .*; there are: a, b"):
            use("c")


def test_a_taken_name_is_refused_and_replaced_only_when_asked(make_operator, tmp_path):
    old, new = make_operator(), make_operator(seed=1)
    Store(tmp_path).save("a", old)
    with pytest.raises(StoreError, match=r"'a' is already in .* \(--replace; Python: replace=True\)"):
        Store(tmp_path).save("a", new)
    assert Store(tmp_path).load("a").digest == old.digest
    Store(tmp_path).save("a", new, replace=True)
    assert Store(tmp_path).load("a").digest == new.digest
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_of_writers_of_one_name_at_once_exactly_one_saves(make_operator, tmp_path, monkeypatch):
    store, barrier = Store(tmp_path), threading.Barrier(4)
    check = Store.check_free

    def check_together(self, name, *, replace=False):
        path = check(self, name, replace=replace)
        barrier.wait(10)
        return path

    monkeypatch.setattr(Store, "check_free", check_together)

    def save(seed):
        try:
            store.save("mine", make_operator(seed=seed))
        except StoreError as error:
            return str(error)
        return "saved"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(save, range(4)))
    assert outcomes[3] == "saved"
    assert all("operator 'mine' is already in" in outcome for outcome in outcomes[:3])
    assert os.listdir(tmp_path) == ["mine.safetensors"]
    store.load("mine")


def test_a_file_system_without_links_is_written_to(make_operator, tmp_path, monkeypatch):
    monkeypatch.setattr("operators.core.store.os.link", _raising(OSError(errno.EPERM, "Operation not permitted")))
    Store(tmp_path).save("a", make_operator())
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_name_taken_by_a_dangling_link_is_taken(make_operator, tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="already"):
        Store(tmp_path).save("a", make_operator())
    with pytest.raises(ArtifactError, match="symbolic link"):
        Store(tmp_path).load("a")


def test_replacing_a_link_replaces_the_link_and_not_its_target(make_operator, tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "a.safetensors").symlink_to(target)
    Store(tmp_path).save("a", make_operator(), replace=True)
    assert target.read_text() == "mine"
    assert not (tmp_path / "a.safetensors").is_symlink()


def _raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["store.os.fsync", "store._put", "artifact.to_bytes"])
@pytest.mark.parametrize("replace", [False, True])
def test_an_interrupted_save_leaves_the_store_as_it_was(make_operator, tmp_path, monkeypatch, place, error, replace):
    Store(tmp_path).save("kept", make_operator())
    if replace:
        Store(tmp_path).save("a", make_operator())
    before = _snapshot(tmp_path)
    monkeypatch.setattr(f"operators.core.{place}", _raising(error))
    expected = StoreError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as found:
        Store(tmp_path).save("a", make_operator(seed=1), replace=replace)
    monkeypatch.undo()
    assert _snapshot(tmp_path) == before
    if isinstance(error, OSError):
        assert str(found.value) == f"operator 'a' cannot be written to {tmp_path}: No space left on device"


def test_a_failing_clean_up_does_not_hide_an_interrupt(make_operator, tmp_path, monkeypatch):
    monkeypatch.setattr("operators.core.store.os.fsync", _raising(KeyboardInterrupt()))
    monkeypatch.setattr("operators.core.store.os.unlink", _raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).save("a", make_operator())


@pytest.mark.parametrize(("replace", "naming"), [(True, "replace"), (False, "link")])
def test_the_file_is_on_the_disk_before_it_has_its_name(make_operator, tmp_path, monkeypatch, replace, naming):
    steps = []
    fsync, name = os.fsync, getattr(os, naming)
    monkeypatch.setattr("operators.core.store.os.fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(f"operators.core.store.os.{naming}", lambda a, b: (steps.append("name"), name(a, b)))
    Store(tmp_path).save("a", make_operator(), replace=replace)
    assert steps[:2] == ["fsync", "name"]


def test_deleting_removes_one_operator_and_works_once(make_operator, tmp_path):
    for name in ("a", "b"):
        Store(tmp_path).save(name, make_operator())
    Store(tmp_path).delete("a")
    assert Store(tmp_path).names() == ["b"]
    with pytest.raises(StoreError, match="no operator 'a'"):
        Store(tmp_path).delete("a")


def test_a_broken_operator_can_be_deleted(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    Store(tmp_path).delete("a")
    assert Store(tmp_path).names() == []


def test_a_directory_with_an_operators_name_is_refused_everywhere(make_operator, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        Store(tmp_path).load("a")
    with pytest.raises(StoreError, match="cannot be deleted"):
        Store(tmp_path).delete("a")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path).save("a", make_operator(), replace=True)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_store_that_is_a_file_is_refused(make_operator, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="is not a directory"):
        Store(file).names()
    with pytest.raises(StoreError, match="is not a directory"):
        Store(file).load("a")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(file).save("a", make_operator())
    with pytest.raises(StoreError, match="cannot be deleted"):
        Store(file).delete("a")


def test_a_store_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("operators.core.store.os.listdir", _raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(StoreError, match="cannot be read: Permission denied"):
        Store(tmp_path).names()


def test_the_default_store_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_STORE", str(tmp_path / "mine"))
    assert Store.default() == Store(tmp_path / "mine")


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_environment_the_default_store_is_in_the_users_data(monkeypatch, value):
    monkeypatch.delenv("STEER_STORE", raising=False)
    if value is not None:
        monkeypatch.setenv("STEER_STORE", value)
    assert Store.default().path.parts[-2:] == ("steering-operators", "store")
