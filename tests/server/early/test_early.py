"""What answers on the ports of a server that loads its model."""

import http.client
import json
import socket
import subprocess
import sys
import time

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import ServerUnavailableError, SteerClient

from steer_server.config import ServerConfig
from steer_server.early.holding import answered, early_ports
from steer_server.errors import StartupError
from tests.authority import Authority

SERVICE = "steering.v1.GenerationService"
STATUS = health_pb2.HealthCheckResponse


def _free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _get(port, path, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Retry-After"), answer.read()


@pytest.fixture(scope="module")
def ports():
    grpc_port, metrics, http_port = _free_ports(3)
    config = ServerConfig(listen=f"127.0.0.1:{grpc_port}", metrics_port=metrics, http_port=http_port)
    with answered(early_ports(config, (SERVICE,))):
        yield grpc_port, metrics, http_port
    # They are the server's now.
    for port in (grpc_port, metrics, http_port):
        socket.create_server(("127.0.0.1", port)).close()


def test_the_health_is_known_and_only_live_is_passed(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        states = {
            name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            for name in ("", "live", "ready", "started", SERVICE)
        }
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == STATUS.NOT_SERVING
        watch.cancel()
    assert states.pop("live") == STATUS.SERVING
    assert set(states.values()) == {STATUS.NOT_SERVING}


def test_calls_are_told_to_come_again_by_name(ports):
    with SteerClient(f"127.0.0.1:{ports[0]}", timeout=10, retry=False) as client:
        assert not client.health()
        for ask in (lambda: client.generate("x" * 100_000), lambda: list(client.stream("x")), client.operators):
            with pytest.raises(ServerUnavailableError, match="loading its model; try again in 5 s") as caught:
                ask()
            assert caught.value.reason == "LOADING"


@pytest.mark.parametrize("place", [1, 2], ids=["metrics", "http"])
def test_the_probes_are_answered_and_other_paths_told_to_come_again(ports, place):
    port = ports[place]
    assert _get(port, "/livez") == (200, None, b"ok\n")
    for path in ("/readyz", "/startedz", "/healthz"):
        assert _get(port, path) == (503, "5", b"loading\n")
    status, again, body = _get(port, "/v1/models", "POST")
    assert (status, again) == (503, "5")
    assert json.loads(body)["error"]["code"] == "LOADING"


def test_a_person_is_shown_a_page_that_opens_by_itself(ports):
    status, again, body = _get(ports[2], "/")
    assert (status, again) == (503, "5")
    assert b'<meta http-equiv="refresh"' in body
    assert b"loading its model" in body


def test_a_port_that_is_taken_is_named(ports):
    for port, taken in {
        ports[0]: ServerConfig(listen=f"127.0.0.1:{ports[0]}"),
        ports[1]: ServerConfig(listen="127.0.0.1:0", metrics_port=ports[1]),
    }.items():
        with pytest.raises(StartupError, match=str(port)), answered(early_ports(taken, ())):
            pytest.fail("it began")


def test_it_speaks_tls_as_the_server_will(tmp_path):
    authority, (port, http_port) = Authority(), _free_ports(2)
    for name, data in zip(("cert", "key"), authority.issue(), strict=True):
        (tmp_path / name).write_bytes(data)
    files = {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key"}
    config = ServerConfig(listen=f"127.0.0.1:{port}", http_port=http_port, **files)
    credentials = grpc.ssl_channel_credentials(authority.pem)
    with (
        answered(early_ports(config, ())),
        grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel,
    ):
        request = health_pb2.HealthCheckRequest(service="live")
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status == STATUS.SERVING
        context = authority.context(None, tmp_path)
        connection = http.client.HTTPSConnection("127.0.0.1", http_port, timeout=10, context=context)
        connection.request("GET", "/livez")
        assert connection.getresponse().status == 200


def test_nothing_is_started_where_no_port_is_known():
    before = psutil.Process().children()
    with answered(early_ports(ServerConfig(listen="127.0.0.1:0"), ())):
        assert psutil.Process().children() == before


KILLED = """
import os, signal, sys
from steer_server.config import ServerConfig
from steer_server.early.holding import answered, early_ports
with answered(early_ports(ServerConfig(listen="127.0.0.1:0", metrics_port=int(sys.argv[1])), ())):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_a_server_that_is_killed():
    [port] = _free_ports(1)
    assert subprocess.run([sys.executable, "-c", KILLED, str(port)], timeout=60).returncode == -9
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the port is still held")
