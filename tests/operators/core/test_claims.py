"""Long work on a name of a store: one at a time, whatever becomes of the other."""

import re
import subprocess
import sys

import pytest

from operators.core.claims import claim
from operators.core.errors import StoreError
from operators.core.store import Store

HOLD = """
import sys, time
from operators.core.claims import claim
from operators.core.store import Store
with claim(Store(sys.argv[1]), "bay", "a calibration"):
    print("held", flush=True)
    time.sleep(60)
"""


def refused(store, name="bay"):
    """The message of a claim that is not granted."""
    with pytest.raises(StoreError) as error, claim(store, name, "a search for a lens"):
        pytest.fail("it was granted")
    return str(error.value)


def test_a_second_claim_on_a_name_is_refused_by_name_and_another_name_is_free(tmp_path):
    store = Store(tmp_path / "store")
    with claim(store, "bay", "a calibration"):
        assert re.search(
            r"operator 'bay' in \S+store is in use: a calibration by process \d+ is under way", refused(store)
        )
        with claim(store, "bridge", "a calibration"):
            assert store.names() == []
    assert list(store.path.iterdir()) == []
    assert "'A/b' is not allowed" in refused(store, "A/b")


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path):
    store = Store(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert f"a calibration by process {holder.pid} is under way" in refused(Store(tmp_path))
        holder.kill()
    # What it left behind is as good as none.
    assert [path.name for path in tmp_path.iterdir()] == [".bay.lock"]
    with claim(store, "bay", "a calibration"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / ".bay.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="cannot be written"), claim(Store(tmp_path), "bay", "a calibration"):
        pass
    assert (tmp_path / "precious").read_text() == "all of it"
