"""Imports descend: no cycle anywhere, and every contract of pyproject.toml catches what it is there to catch."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sys.executable).parent / "lint-imports"
PACKAGES = {
    "operators": "operators",
    "steer_server": "steer_server",
    "steer_client": "clients/python/steer_client",
    "steering": "protos/steering",
}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def test_no_module_imports_itself_by_any_way_round():
    # Imports for type checkers count: who reads one file of a cycle has to read all of them.
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    # Raises CycleError, which names the modules of the cycle.
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def alternatives(layer: str) -> list[str]:
    return [name.strip() for name in layer.split("|")]


def violations() -> Iterator[tuple[str, str, str]]:
    """For each contract: its name, a module, and what that module must not hold."""
    for contract in CONTRACTS:
        if contract["type"] == "layers":
            for container in contract["containers"]:
                bottom, top = alternatives(contract["layers"][-1])[0], alternatives(contract["layers"][0])[0]
                yield contract["name"], f"{container}.{bottom}", f"import {container}.{top}\n"
                side_by_side = next((names for names in map(alternatives, contract["layers"]) if len(names) > 1), None)
                if side_by_side:
                    first, second = side_by_side[:2]
                    yield contract["name"], f"{container}.{first}", f"import {container}.{second}\n"
                yield contract["name"], f"{container}.unplaced", '"""A module that is in no layer."""\n'
        else:
            sources, forbidden = contract["source_modules"], contract["forbidden_modules"]
            # Each source and each forbidden module once, not every pair of them.
            for index in range(max(len(sources), len(forbidden))):
                line = f"import {forbidden[index % len(forbidden)]}\n"
                yield contract["name"], sources[index % len(sources)], line


def path_of(tree: Path, module: str) -> Path:
    package, *parts = module.split(".")
    path = tree.joinpath(PACKAGES[package], *parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES.values():
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def broken_contracts(tree: Path) -> list[str]:
    path = os.pathsep.join(str(tree / part) for part in ("", "clients/python", "protos"))
    result = subprocess.run(
        [LINT, "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return [line.removesuffix(" BROKEN") for line in result.stdout.splitlines() if line.endswith(" BROKEN")]


def test_a_violation_of_each_contract_is_caught(tree):
    assert broken_contracts(tree) == []
    caught = set()
    for name, module, line in violations():
        path = path_of(tree, module)
        before = path.read_text(encoding="utf-8") if path.exists() else None
        path.write_text(f"{before or ''}\n{line}", encoding="utf-8")
        try:
            assert name in broken_contracts(tree), f"{module}: {line}"
            caught.add(name)
        finally:
            path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert caught == {contract["name"] for contract in CONTRACTS}
