"""The reason for which one of vLLM's processes did not start, in the process that waits for it."""

import multiprocessing

import pytest

from steer_server.engine.vllm.start_problem import problem_file, read_problem, report_problem, reports_problems


@reports_problems
def fail(error):
    raise error


def fail_here_and_there():
    """As vLLM does: the engine core fails because its worker has failed."""
    for error in (ValueError("no room:\n 3 GiB"), RuntimeError("see above")):
        with pytest.raises(type(error)):
            fail(error)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_first_reason_is_told_on_one_line(method):
    with problem_file() as path:
        process = multiprocessing.get_context(method).Process(target=fail_here_and_there)
        process.start()
        process.join(60)
        assert read_problem(path) == "no room: 3 GiB"
    assert process.exitcode == 0
    assert not path.parent.exists()


def test_without_a_problem_nothing_is_told():
    with problem_file() as path:
        assert read_problem(path) == ""


def test_nobody_waits_for_the_reason_of_a_server_that_is_gone():
    report_problem(ValueError("lost"))
    with problem_file() as path:
        path.parent.rmdir()
        report_problem(ValueError("lost"))
        path.parent.mkdir()
