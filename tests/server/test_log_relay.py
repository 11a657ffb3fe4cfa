"""Output that nobody takes holds nobody up."""

import os
import subprocess
import sys
import time

import pytest

RELAYED = """
import os, sys
from steer_server.log_relay import drain_output, relay_output
relays = relay_output()
"""
MUCH = (
    RELAYED
    + """
for number in range(30_000):
    sys.stderr.write(f"line {number:06} {'x' * 90}\\n")
os.write(1, b"written\\n")
drain_output(relays, float(sys.argv[1]))
os._exit(7)
"""
)


def _start(code, *arguments, **options):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, **{"stderr": subprocess.PIPE} | options)


def test_a_reader_that_does_not_read_costs_lines_and_no_time():
    began = time.monotonic()
    with _start(MUCH, "0.3") as process:
        assert process.stdout.readline() == b"written\n"
        assert process.wait(20) == 7
        assert time.monotonic() - began < 15


def test_a_reader_that_comes_late_is_told_how_many_lines_it_missed():
    with _start(MUCH, "20") as process:
        assert process.stdout.readline() == b"written\n"
        lines = process.stderr.read().decode().splitlines()
        assert process.wait(20) == 7
    told = [line for line in lines if line.startswith("steer-server: ")]
    lost = sum(int(line.split()[1]) for line in told)
    assert 10_000 < lost < 30_000
    # A line may be cut where lines before or behind it are gone.
    assert abs(len(lines) - len(told) + lost - 30_000) <= 2 * len(told)
    assert told[0].endswith("lines were dropped: nobody read them")


def test_all_that_is_written_arrives_where_somebody_reads():
    code = RELAYED + "print('a'); print('b', file=sys.stderr); drain_output(relays); os.write(2, b'after'); os._exit(0)"
    with _start(code) as process:
        out, err = process.communicate(timeout=20)
    assert (out, err) == (b"a\n", b"b\nafter")


@pytest.mark.parametrize("closed", [(2,), (1, 2)], ids=["stderr", "both"])
def test_a_descriptor_that_is_closed_from_the_start_is_no_reason_to_fail(closed):
    code = RELAYED + "print('x' * 100_000, file=sys.stderr); print('y'); drain_output(relays); os._exit(7)"
    with _start(code, preexec_fn=lambda: [os.close(each) for each in closed]) as process:
        assert process.wait(20) == 7


def test_a_reader_that_has_gone_is_no_reason_to_fail():
    code = RELAYED + "input(); print('x' * 500_000, file=sys.stderr); drain_output(relays); os._exit(7)"
    with _start(code, stdin=subprocess.PIPE) as process:
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(20) == 7


def test_a_pipe_that_was_made_not_to_wait_loses_nothing():
    # As whoever shares it may do: a terminal, a supervisor.
    code = (
        "import os; os.set_blocking(2, False)"
        + RELAYED
        + "os.write(2, b'x' * 400_000 + b'y'); drain_output(relays, 20); os._exit(7)"
    )
    with _start(code) as process:
        time.sleep(1.0)
        assert process.stderr.read() == b"x" * 400_000 + b"y"
        assert process.wait(20) == 7
