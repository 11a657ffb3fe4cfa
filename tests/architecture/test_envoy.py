"""What Envoy is told of the servers is what they do: names, limits and flags."""

import re
from pathlib import Path

import pytest
import yaml

from steer_server.config import ServerConfig, flag
from steer_server.lifecycle import READY
from steer_server.rpc.transport import channel_options

FILE = Path(__file__).resolve().parents[2] / "deploy" / "envoy" / "envoy.yaml"
DEFAULTS = ServerConfig()


@pytest.fixture(scope="module")
def resources():
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["static_resources"]


@pytest.fixture(scope="module")
def cluster(resources):
    return resources["clusters"][0]


def _seconds(text):
    return float(text.removesuffix("s"))


def test_connections_to_a_server_keep_its_limits(cluster):
    [protocol] = cluster["typed_extension_protocol_options"].values()
    http2 = protocol["explicit_http_config"]["http2_protocol_options"]
    options = dict(channel_options(DEFAULTS, max_connections=1, max_message_bytes=1))
    least = options["grpc.http2.min_ping_interval_without_data_ms"] / 1000
    # Else the server would end the connection, with all calls on it.
    assert _seconds(http2["connection_keepalive"]["interval"]) >= least
    assert http2["max_concurrent_streams"] <= options["grpc.max_concurrent_streams"]
    assert _seconds(protocol["common_http_protocol_options"]["idle_timeout"]) < DEFAULTS.connection_idle


def test_a_server_that_is_not_ready_gets_no_calls(cluster):
    [check] = cluster["health_checks"]
    assert check["grpc_health_check"]["service_name"] == READY
    assert cluster["common_lb_config"]["healthy_panic_threshold"]["value"] == 0
    # The delay that the file tells the servers is longer than Envoy needs.
    delay = float(re.search(r"--drain-delay (\d+)", FILE.read_text(encoding="utf-8"))[1])
    assert check["unhealthy_threshold"] * (_seconds(check["interval"]) + _seconds(check["timeout"])) < delay


def test_only_calls_that_nothing_was_answered_to_are_tried_again(resources):
    [chain] = resources["listeners"][0]["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    [host] = manager["route_config"]["virtual_hosts"]
    [route] = host["routes"]
    retried = set(route["route"]["retry_policy"]["retry_on"].split(","))
    assert retried == {"unavailable", "connect-failure", "refused-stream"}
    assert _seconds(route["route"]["timeout"]) == 0
    names = [each["name"].rpartition(".")[2] for each in manager["http_filters"]]
    assert names == ["grpc_web", "cors", "router"]


def test_the_flags_that_the_file_names_are_the_servers():
    named = set(re.findall(r"--[a-z-]+", FILE.read_text(encoding="utf-8")))
    assert named <= {flag(name) for name in ServerConfig.model_fields}
