"""What the pages name exists: files, folders, modules and headings; and every page is linked from one other."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The changelog tells of files as they were.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})
PACKAGES = {
    "operators": ROOT,
    "steer_server": ROOT,
    "steer_client": ROOT / "clients/python",
    "steering": ROOT / "protos",
}
# Where the pages leave out the front of a module's name.
FRONTS = ("", "operators.", "steer_server.", "steer_server.engine.")
SUFFIXES = ("py", "pyi", "md", "toml", "txt", "proto", "sh", "svg", "png", "yaml", "yml")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@functools.cache
def files() -> frozenset[str]:
    """Every file of the checkout that can be committed, and every folder that holds one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        found = [PurePosixPath(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked archive
        found = [PurePosixPath(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*") if path.is_file()]
    return frozenset(str(part) for path in found for part in (path, *path.parents))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def links(page: Path) -> list[tuple[str, str]]:
    """The file, from the root, and the heading that each link to this repository names."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        found.append((path.relative_to(ROOT).as_posix(), heading))
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def paths(text: str) -> set[str]:
    """What reads as a file or folder of this repository, at its place or by its bare name."""
    top = {name for name in files() if "/" not in name and name != "."}
    found = {match.rstrip("/.") for match in re.findall(r"(?<![\w./:-])[\w.-]+/(?:[\w.-]+/?)*", text)}
    placed = {path for path in found if path.split("/")[0] in top}
    bare = set(re.findall(rf"(?<![\w./-])\w[\w.-]*\.(?:{'|'.join(SUFFIXES)})(?![\w/-])", text))
    return placed | bare


def modules(text: str) -> set[str]:
    """Dotted names that begin with a package of this repository."""
    return set(re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+", text))


@functools.cache
def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or a name that a module has."""
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return False
    place = PACKAGES[package] / package
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place /= rest.pop(0)
    if not rest:
        return True
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.is_file() or len(rest) > 1:
        return False
    # Read, so that modules which need vLLM are checked without it; a package may bring in its public names when asked.
    in_source = rest[0] in bound_names(ast.parse(source.read_text(encoding="utf-8")).body)
    return in_source or (place.is_dir() and hasattr(import_module(name.rpartition(".")[0]), rest[0]))


def bound_names(statements: list[ast.stmt]) -> set[str]:
    """Definitions, assignments and imports, those under a condition included."""
    names: set[str] = set()
    for statement in statements:
        for node in ast.walk(statement) if isinstance(statement, ast.If | ast.Try) else [statement]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pages
def test_every_path_that_a_page_names_exists(page):
    named = paths(text_of(page))
    known = {PurePosixPath(path).name for path in files()}
    missing = {path for path in named if path not in files() and ("/" in path or path not in known)}
    assert missing - {"tea.png", "ocean.png"} == set()


@pages
def test_every_module_that_a_page_names_can_be_found(page):
    text = text_of(page)
    named = modules(text)
    for module, names in re.findall(r"^from ([\w.]+) import (.*)$", text, flags=re.MULTILINE):
        if module.split(".")[0] in PACKAGES:
            named |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert {name for name in named if not is_defined(name)} == set()


def test_every_dotted_name_of_the_architecture_is_in_the_tree():
    text = text_of(ROOT / "ARCHITECTURE.md")
    named = set(re.findall(r"`([a-z_]\w*(?:\.[A-Za-z_]\w*)+)`", text))
    named = {name for name in named if name.rpartition(".")[2] not in SUFFIXES}
    assert len(named) > 20
    assert {name for name in named if not any(is_defined(front + name) for front in FRONTS)} == set()


def test_the_layers_of_the_architecture_are_those_of_pyproject():
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = {
        contract["containers"][0]: " → ".join(contract["layers"])
        for contract in contracts
        if contract["type"] == "layers" and len(contract["containers"]) == 1
    }
    [shown] = re.findall(r"^```text\n(.*?)^```", text_of(ROOT / "ARCHITECTURE.md"), flags=re.DOTALL | re.MULTILINE)
    written = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert written == {package: layers[package] for package in ("operators", "steer_server")}


@pages
def test_every_link_leads_to_a_file_and_a_heading(page):
    for path, heading in links(page):
        assert path in files(), path
        if heading:
            assert heading in headings(ROOT / path), f"{path}#{heading}"


def test_every_page_of_docs_is_linked_from_exactly_one_other_page():
    homes: dict[str, set[str]] = {path.relative_to(ROOT).as_posix(): set() for path in ROOT.glob("docs/*.md")}
    for page in PAGES:
        for path, _ in links(page):
            if path in homes and path != page.relative_to(ROOT).as_posix():
                homes[path].add(page.name)
    assert homes
    assert {path: sorted(found) for path, found in homes.items() if len(found) != 1} == {}


def test_the_layout_has_a_row_for_every_room():
    layout = text_of(ROOT / "CONTRIBUTING.md").split("## Layout")[1].split("\n## ")[0]
    rooms = {
        file.parent for package in ("operators", "steer_server") for file in (ROOT / package).glob("*/__init__.py")
    }
    named = set(re.findall(r"^\| `(\w+/\w+)/` \|", layout, flags=re.MULTILINE))
    assert named == {room.relative_to(ROOT).as_posix() for room in rooms}


def test_the_readme_has_at_most_160_lines():
    assert text_of(ROOT / "README.md").count("\n") <= 160


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `operators/maps/gone.py`", {"operators/maps/gone.py"}),
        ("in [this](../steer_server/engine/)", set()),
        ("the folder `steer_server/engine/` and `gone.py`", {"steer_server/engine", "gone.py"}),
        ("http://127.0.0.1:50051/steering.v1.GenerationService/Generate, tokens/s, 1/RMS", set()),
    ],
)
def test_paths_are_told_from_other_text(text, found):
    assert paths(text) == found


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("operators.core", True),
        ("operators.core.store", True),
        ("operators.core.store.Store", True),
        ("operators.core.gone", False),
        ("operators.core.store.Gone", False),
        ("steer_client.SteerClient", True),
        ("steer_client.Gone", False),
        ("elsewhere.core", False),
    ],
)
def test_modules_and_what_they_define_are_found(name, is_there):
    assert is_defined(name) == is_there
