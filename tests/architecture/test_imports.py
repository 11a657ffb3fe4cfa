"""Imports descend: no cycle anywhere, and every contract of pyproject.toml catches what it is there to catch."""

import os
import re
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


UNPLACED = '"""A module that is in no layer."""'


def violations() -> Iterator[tuple[str, str, str]]:
    """For each contract: its name, a module, and a line that the module must not hold."""
    for contract in CONTRACTS:
        if contract["type"] == "layers":
            for container in contract["containers"]:
                bottom, top = alternatives(contract["layers"][-1])[0], alternatives(contract["layers"][0])[0]
                yield contract["name"], f"{container}.{bottom}", f"import {container}.{top}"
                side_by_side = next((names for names in map(alternatives, contract["layers"]) if len(names) > 1), None)
                if side_by_side:
                    first, second = side_by_side[:2]
                    yield contract["name"], f"{container}.{first}", f"import {container}.{second}"
                yield contract["name"], f"{container}.unplaced", UNPLACED
        else:
            sources, forbidden = contract["source_modules"], contract["forbidden_modules"]
            # Each source and each forbidden module once, not every pair of them.
            for index in range(max(len(sources), len(forbidden))):
                line = f"import {forbidden[index % len(forbidden)]}"
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


def report(tree: Path) -> str:
    path = os.pathsep.join(str(tree / part) for part in ("", "clients/python", "protos"))
    result = subprocess.run(
        [LINT, "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "500"},
        capture_output=True,
        text=True,
    )
    return result.stdout


def test_each_violation_of_a_contract_is_reported(tree):
    assert " BROKEN" not in report(tree)
    for _, module, line in violations():
        path = path_of(tree, module)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(f"{before}\n{line}\n", encoding="utf-8")
    # All at once, because each run reads the whole tree: a contract's own part of the report names what breaks it.
    of_contract = dict(re.findall(r"^(.+)\n-+\n\n((?:(?!.+\n-+\n).*\n)*)", report(tree), re.MULTILINE))
    for name, module, line in violations():
        said = module if line == UNPLACED else f"{module} -> {line.removeprefix('import ')}"
        found = re.search(rf"^- +{re.escape(said)}( \(l\.|$)", of_contract.get(name, ""), re.MULTILINE)
        assert found, f"{name}: {module}: {line}"
