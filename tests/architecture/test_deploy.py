"""What `deploy/` and the pages ask of a server is there: metrics, labels, settings, flags, probes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.metrics import MetricWrapperBase

from steer_server.access.control import AccessControl
from steer_server.command import app
from steer_server.config import ServerConfig, variable
from steer_server.configuration.sources import OTHER_VARIABLES
from steer_server.engine.memory_metrics import MemoryCollector
from steer_server.engine.work import WorkDone
from steer_server.lifecycle import PATHS
from steer_server.metrics import Metrics
from steer_server.rpc.server import limits_of
from steer_server.rpc.status import TABLE

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGES = (ROOT / "README.md", DEPLOY / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",), "gauge": ("",)}
OF_PROMETHEUS = {"job", "instance", "le", "door", "file"}
"""Labels that Prometheus adds, and of series that a server has only once it serves."""
NAMES = re.compile(r"\b((?:steer|grpc_server|process)_[a-z_]+)\b(?:\{([^}]*)\})?")
OTHER_NAMES = OTHER_VARIABLES | {"STEER_NAME"}


def labels_of_metrics() -> dict[str, set[str]]:
    """Every name under which a server shows something, with its labels."""
    model = SimpleNamespace(model="m", engine="hf", dtype="float32", device="cpu", model_fingerprint="f")
    engine = SimpleNamespace(
        work=WorkDone(), collectors=(MemoryCollector({}),), model=model, running=0, waiting=0, undelivered=0
    )
    metrics = Metrics(engine, SimpleNamespace(entries=tuple), limits_of(ServerConfig(), max_connections=1))
    metrics.add_access(AccessControl(), [])
    declared = {each._name: each._labelnames for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)}
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        labels = {*declared.get(family.name, ()), *getattr(family, "_labelnames", ())}
        labels |= {name for sample in family.samples for name in sample.labels}
        found |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return found


METRICS = labels_of_metrics()


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of dashboard and rules, with where it stands."""
    for panel in json.loads((DEPLOY / "grafana/steering.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
            # What a legend names is a label of the query.
            named = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            assert {*named} <= {*re.findall(r"\w+", target["expr"]), "instance"}, panel["title"]
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_every_query_asks_for_metrics_and_labels_that_there_are():
    queries = list(expressions())
    assert len(queries) > 40
    for place, query in queries:
        found = NAMES.findall(re.sub(r"\bby \([^)]*\)", "", query))
        assert found or "up{" in query, place
        for name, selectors in found:
            assert name in METRICS, f"{place}: {name}"
            asked = set(re.findall(r"(\w+)=", selectors))
            assert asked <= METRICS[name] | OF_PROMETHEUS, f"{place}: {name}{{{selectors}}}"
        grouped = {label for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(", ")}
        assert grouped <= set().union(OF_PROMETHEUS, *(METRICS[name] for name, _ in found)), place


def test_every_value_that_a_query_compares_with_can_occur():
    access = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "steer_server/access").glob("*.py"))
    known = {
        "reason": {reason for _, reason in TABLE.values()},
        "name": {*limits_of(ServerConfig(), max_connections=1)},
        "grpc_code": {code.name for code, _ in TABLE.values()} | {"UNKNOWN", "DATA_LOSS"},
        "cause": set(re.findall(r'cause="([^"]+)"', access)),
    }
    asked = {(label, value) for _, query in expressions() for label, value in re.findall(r'(\w+)=~?"([^"]+)"', query)}
    checked = [(label, each) for label, value in asked if label in known for each in value.split("|")]
    assert {label for label, _ in checked} == known.keys()
    assert [pair for pair in checked if pair[1] not in known[pair[0]]] == []


def test_every_alert_has_a_test_of_its_own():
    rules = {
        rule["alert"] for rule in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
    }
    tests = yaml.safe_load((DEPLOY / "prometheus/rules_test.yml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == rules


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_and_variable_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:steer|grpc_server)_[a-z_]+)`", text)) - {"steer_server", "steer_client"}
    assert {name for name in named if name not in METRICS and f"{name}_sum" not in METRICS} == set()
    if page.name != "CONFIGURATION.md":  # It names some that are not there.
        assert variables(text) - {variable(name) for name in ServerConfig.model_fields} - OTHER_NAMES == set()


def test_the_page_names_every_metric_of_the_server():
    text = (ROOT / "docs/OBSERVABILITY.md").read_text(encoding="utf-8")
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in METRICS if name.startswith(("steer_", "grpc_server_"))
    }
    assert {name for name in ours if f"`{name}`" not in text} == set()


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bSTEER_[A-Z_]+\b", text))


def deployed() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml", ".service", ".toml", ".md")]


def test_every_variable_of_deploy_is_a_setting():
    known = {variable(name) for name in ServerConfig.model_fields} | OTHER_NAMES
    used = {name for path in deployed() for name in variables(path.read_text(encoding="utf-8"))}
    assert used - known == set()
    services = compose()["services"]
    given = services["steer-server"]["environment"]
    ServerConfig(**{name.removeprefix("STEER_").lower(): value for name, value in given.items()})


def commands(text: str) -> Iterator[str]:
    """Every command line of the server, as far as it goes."""
    for line in text.replace("\\\n", " ").splitlines():
        yield from re.findall(r"steer-server((?: +[^\s`|;&#]+)*)", line)


@pytest.mark.parametrize("page", [*PAGES, *deployed()], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_flag_of_the_server_is_there(page):
    command: Any = typer.main.get_command(app)
    every = [command, *getattr(command, "commands", {}).values()]
    known = {option for each in every for param in each.params for option in (*param.opts, *param.secondary_opts)}
    used = {
        flag for line in commands(page.read_text(encoding="utf-8")) for flag in re.findall(r"(?<= )--[a-z-]+", line)
    }
    assert used - known - {"--help"} == set()


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def manifests() -> dict[str, Any]:
    """By kind."""
    folder = DEPLOY / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*names, "kustomization.yaml"} == {path.name for path in folder.iterdir()}
    return {each["kind"]: each for each in (yaml.safe_load((folder / name).read_text()) for name in names)}


def settings_of(text: str) -> ServerConfig:
    return ServerConfig(**tomllib.loads(text))


def test_the_pods_ask_for_what_the_server_has_and_nothing_more():
    found = manifests()
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    [server] = pod["containers"]
    config = settings_of(found["ConfigMap"]["data"]["steer.toml"])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"grpc": int(config.listen.rpartition(":")[2]), "metrics": config.metrics_port}
    assert {port["name"]: port["port"] for port in found["Service"]["spec"]["ports"]} == ports
    probes = {kind: server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: PATHS[probe["path"]] for kind, probe in probes.items()} == {
        "startup": "started",
        "readiness": "ready",
        "liveness": "live",
    }
    assert {probe["port"] for probe in probes.values()} == {"metrics"}
    assert pod["terminationGracePeriodSeconds"] >= config.drain_delay + config.grace + 10
    mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
    for path in (config.tls_cert, config.tls_key, config.tokens, Path(server["args"][1])):
        assert path is not None
        assert str(path.parent) in mounts
    assert {mount["name"] for mount in server["volumeMounts"]} == {"data", *(each["name"] for each in pod["volumes"])}
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in dockerfile
    assert pod["securityContext"]["runAsNonRoot"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    selected = found["StatefulSet"]["spec"]["selector"]["matchLabels"].items()
    assert selected <= found["StatefulSet"]["spec"]["template"]["metadata"]["labels"].items()
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() == selected
    assert found["Service"]["spec"]["selector"].items() == selected


def test_the_unit_gives_the_server_its_time_and_its_files():
    unit = (DEPLOY / "systemd/steer-server.service").read_text(encoding="utf-8")
    config = settings_of((DEPLOY / "systemd/steer.toml").read_text(encoding="utf-8"))
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) >= config.drain_delay + config.grace + 10
    credentials = set(re.findall(r"^LoadCredential=([\w.]+):", unit, re.MULTILINE))
    assert {path.name for path in (config.tls_cert, config.tls_key, config.tokens) if path is not None} == credentials


def test_compose_gives_the_server_its_time_and_mounts_what_there_is():
    services = compose()["services"]
    server = services["steer-server"]
    assert int(server["stop_grace_period"].removesuffix("s")) >= float(server["environment"]["STEER_GRACE"]) + 10
    sources = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert [source for source in sources if source.startswith(".") and not (DEPLOY / source).exists()] == []
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
