"""A server whose operators clients change, and clients in processes of their own."""

import json
import signal
import subprocess

import psutil
import pytest
from steer_client import SamplingParams, SteerClient

from operators.core.artifact import to_bytes
from operators.core.store import Store
from steer_server.admin.work_directory import remove_abandoned
from tests.e2e.conftest import BIN

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def store(tmp_path, golden):
    made = Store(tmp_path / "store")
    made.save("golden", golden)
    return made


def steer(target, *arguments):
    """The answer of `steer admin`, as JSON."""
    command = [BIN / "steer", "admin", *arguments, "--target", target, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_concept_is_built_over_the_wire_and_used_and_a_killed_server_leaves_nothing(
    start_server, tiny_model, store, golden, tmp_path
):
    options = ("--store", str(store.path), "--operator-admin")
    with start_server(*options, model=tiny_model, threads=1) as server:
        with SteerClient(server.target, timeout=120) as client:
            plain = client.generate("the bay", sampling=SHORT).token_ids
            build = steer(server.target, "build", "bay", "--text", "the bay", "--layer", "2", "--rank", "3")
            assert (build["state"], build["operator"]["name"]) == ("succeeded", "bay")
            text = client.generate("the bay", operators=["bay=0.5"], sampling=SHORT)
            assert text.receipts[0].digest == build["operator"]["digest"]
            command = [BIN / "steer", "admin", "builds", "--target", server.target]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
            assert listed == f"{build['id']}  succeeded  bay\n"
            (tmp_path / "more.safetensors").write_bytes(to_bytes(golden))
            assert steer(server.target, "upload", str(tmp_path / "more.safetensors"))["digest"] == golden.digest
            assert steer(server.target, "delete", "more", golden.digest) == {"deleted": "more"}
            assert {each.name for each in client.operators()} == {"bay", "golden"}
            job = client.build_operator("tea", ["a cup of tea"], words=["tea"], calibrate=True)
            for report in client.watch_build(job):
                if report.stage:
                    break
            assert client.generate("the bay", sampling=SHORT).token_ids == plain
        children = psutil.Process(server.process.pid).children(recursive=True)
        [child] = [each for each in children if "build" in each.cmdline()]
        assert list(store.path.glob(".build-*"))
        server.signal(signal.SIGKILL)
        server.exit_code(10)
        child.wait(10)
    # As the next server does at its start.
    remove_abandoned(store.path)
    assert sorted(path.name for path in store.path.iterdir()) == ["bay.safetensors", "golden.safetensors"]
