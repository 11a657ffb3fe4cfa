"""``build --file --jobs``: several processes, and the operators, answers and errors of one."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from operators.core.claims import claim
from operators.core.errors import BuildError, ModelError
from operators.core.store import Store
from operators.maps.sketch import embedding_root
from operators.model.shared import pack, shared_memory, unpack
from operators.recipes import run
from operators.recipes.concept_file import parse_concepts
from operators.recipes.run import run_tasks
from operators.recipes.tasks import prepare_tasks
from operators.recipes.workers import Prepared, prepare_apart, run_tasks_in_workers, share_of_memory

TEXTS = {"a": "golden gate", "b": "The bay", "c": "My dress", "d": "The Golden Gate Bridge"}
FILE = "".join(f'[[concept]]\nname = "{name}"\ntext = "{text}"\nrank = 5\n' for name, text in TEXTS.items())
UNTIMED = {"seconds", "path", "digest"}


def _told(result):
    return [{key: one[key] for key in one.keys() - UNTIMED} for one in json.loads(result.stdout)["operators"]]


@pytest.fixture(autouse=True)
def one_thread():
    """As many as a worker has: another number adds in another order. And a process with more of them is not forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_build_what_one_builds_and_tell_it_alike(build_file, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    joint = build_file(FILE, "--json", "--jobs", "2", "--max-memory", "2GiB")
    assert (joint.exit_code, joint.stderr) == (0, "")
    alone = build_file(FILE, "--json", "--store", str(tmp_path / "alone"))
    assert _told(joint) == _told(alone)
    assert sorted(os.listdir(shelf)) == [f"{name}.safetensors" for name in TEXTS]
    for name in TEXTS:
        file = f"{name}.safetensors"
        assert (shelf / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    # Nothing is left to do, and no process is started for it.
    assert [one["status"] for one in _told(build_file(FILE, "--json", "--jobs", "2"))] == ["up to date"] * 4


def test_a_worker_that_dies_is_named_and_the_others_are_built_and_ctrl_c_loses_nothing(tiny, shelf):
    loaded = tiny("llama", dtype="float32", fresh=True)
    store = Store(shelf)
    tasks = prepare_tasks(parse_concepts(FILE, "c.toml"), loaded, store)

    def progress(task, _what, _done, _total):
        (worker,) = set(multiprocessing.active_children()) - others
        if task.name == "b" and worker.pid not in killed:
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        if task.name == "d":
            raise KeyboardInterrupt

    # Engines that other tests share have processes too.
    others, killed, outcomes = set(multiprocessing.active_children()), [], {}
    root = embedding_root(loaded.model.get_input_embeddings().weight)
    prepared = Prepared(loaded, tasks, ("cpu",), 1 << 30, root)
    working = run_tasks_in_workers(prepared, store, jobs=1, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        outcomes.update((outcome.name, outcome) for outcome in working)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"a": "built", "b": "failed", "c": "built"}
    assert f"the worker process {killed[0]} was ended by SIGKILL" in str(outcomes["b"].problem)
    assert "at work on 'b'" in str(outcomes["b"].problem)
    assert set(multiprocessing.active_children()) <= others
    # What the killed one left of its claim is as good as none.
    left = prepare_tasks(parse_concepts(FILE, "c.toml"), loaded, store)
    assert [task.name for task in left if task.stored is None] in (["b", "d"], ["b"])
    assert {outcome.status for outcome in run_tasks(left, loaded, store)} == {"up to date", "built"}
    assert store.names() == list(TEXTS)


def test_what_another_process_builds_is_waited_for_and_not_built_again(tiny, shelf, monkeypatch):
    loaded, store = tiny("llama"), Store(shelf)
    monkeypatch.setattr(run, "WAIT", 0.01)
    tasks = prepare_tasks(parse_concepts(FILE, "c.toml")[:2], loaded, store)
    other = prepare_tasks(parse_concepts(FILE, "c.toml")[:1], loaded, Store(shelf / "other"))
    (done,) = run_tasks(other, loaded, Store(shelf / "other"))
    finished = threading.Event()

    def elsewhere():
        with claim(store, "a", run.BUILD):
            claimed.set()
            finished.wait()
            store.save("a", Store(shelf / "other").load("a"))

    claimed = threading.Event()
    holder = threading.Thread(target=elsewhere)
    holder.start()
    claimed.wait()
    outcomes = run_tasks(tasks, loaded, store)
    first = next(outcomes)
    finished.set()
    (second,) = outcomes
    holder.join()
    assert [(one.name, one.status) for one in (first, second)] == [("b", "built"), ("a", "up to date")]
    assert store.load("a").digest == done.stored.digest
    # Other work on the name is no build of this file: nobody knows what will come of it.
    store.delete("a")
    with claim(store, "a", "a calibration"):
        (refused,) = run_tasks(tasks[:1], loaded, store)
    assert "'a' in" in str(refused.problem)
    assert "in use: a calibration by process" in str(refused.problem)


def test_shared_weights_are_the_same_numbers_once_and_what_is_written_to_them_stays_here(tiny):
    loaded = tiny("gemma3", dtype="float32", fresh=True)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with shared_memory() as descriptor:
        packed = pack(loaded, loaded.model, descriptor)
        assert len(packed) < os.fstat(descriptor).st_size
        other = unpack(packed, descriptor)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    tied = other.model.get_input_embeddings().weight
    assert (tied is other.model.get_output_embeddings().weight) is (
        loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    )
    tied.zero_()
    assert torch.equal(loaded.model.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    ids = loaded.tokenizer("golden gate")["input_ids"]
    assert other.tokenizer("golden gate")["input_ids"] == ids


_WATCHED = """
import os, sys, threading
from operators.__main__ import main

def watch():
    imported = {"torch", "transformers.modeling_utils", "transformers.modeling_layers"} <= sys.modules.keys()
    print("fork", imported, threading.active_count(), len(os.listdir("/proc/self/task")), file=sys.stderr)

os.register_at_fork(before=watch)
main()
"""


def test_before_a_fork_all_is_imported_and_no_thread_was_started(tiny_directory, tmp_path):
    (tmp_path / "c.toml").write_text(FILE)
    command = [sys.executable, "-c", _WATCHED, "build", "--file", "c.toml", "--jobs", "2"]
    where = {"STEER_STORE": str(tmp_path / "store"), "STEER_MODEL": str(tiny_directory("llama"))}
    # torch has threads once it computes. Those that numpy's BLAS has from its import on end themselves at a fork.
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **where, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forks = [line for line in done.stderr.splitlines() if line.startswith("fork")]
    # One process that prepares, and two workers.
    assert forks == ["fork True 1 1"] * 3


def test_what_prevents_the_work_is_said_by_the_process_that_prepares_it():
    def refuse():
        raise ModelError("model 'x' is none")

    with pytest.raises(ModelError, match="model 'x' is none"):
        prepare_apart(refuse)
    with pytest.raises(BuildError, match="the process that loads the model was ended by SIGKILL"):
        prepare_apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_memory_is_shared_out_among_the_workers_of_a_device():
    assert share_of_memory(100, ["cpu"], 3) == 33
    free = share_of_memory(None, ["cpu"], 1)
    assert 0 < share_of_memory(None, ["cpu"], 2) < 0.7 * free
    assert share_of_memory(None, ["cpu", "cpu"], 2) > 0.7 * free


def test_one_operator_has_no_jobs(build_file):
    result = build_file(FILE, "--jobs", "0")
    assert result.exit_code == 2
    from typer.testing import CliRunner

    from operators.__main__ import app

    one = CliRunner().invoke(app, ["build", "a", "--text", "bay", "--jobs", "2"])
    assert (one.exit_code, "--jobs is of --file" in one.stderr) == (2, True)
