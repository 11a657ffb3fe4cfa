"""The shape of the repository: what imports what, what is generated, what is written where."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PACKAGES = ("operators", "steer_server", "clients/python/steer_client")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
IGNORED = {"__pycache__", "build", "dist"}
# Directories of one person's machine.
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(?:work|root|home|Users)/")
NOT_CODE = {"LICENSE", "constraints.txt", "constraints-vllm.txt"}


def repository_files() -> list[Path]:
    """Every file of the checkout that can be committed, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        files = [path for path in files if not any(part[0] == "." or part in IGNORED for part in path.parts)]
    return sorted({path for path in files if (ROOT / path).is_file()})


def text_files() -> dict[Path, str]:
    texts = {}
    for path in repository_files():
        try:
            texts[path] = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def run(*command: str | Path) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "clients/python", "protos"))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)


def test_imports_keep_the_contracts_of_pyproject():
    result = run(BIN / "lint-imports", "--no-cache")
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()


def test_no_source_file_is_longer_than_400_lines():
    lengths = {
        str(path): text.count("\n")
        for path, text in text_files().items()
        if path.suffix in {".py", ".sh", ".proto", ""} and path.name not in NOT_CODE
        if not GENERATED.search(path.name)
    }
    assert lengths
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_every_public_module_says_what_it_is():
    silent = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = not path.name.startswith("_") or path.name in {"__init__.py", "__main__.py"}
        if public and tree.body and ast.get_docstring(tree) is None:
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_no_file_names_a_directory_of_one_machine():
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in text_files().items()
        if path.parts[0] != "tests"
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Drops what compilers may leave out: JSON names follow from the field names."""

    def strip(message: DescriptorProto) -> None:
        for field in (*message.field, *message.extension):
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    file.ClearField("source_code_info")
    for message in file.message_type:
        strip(message)
    return file


def test_the_generated_stubs_are_those_of_the_proto_files():
    command = ("build", "protos", "--as-file-descriptor-set", "--exclude-source-info", "-o", "-#format=binpb")
    built = run(BIN / "buf", *command)
    assert built.returncode == 0, built.stderr.decode()
    sources = sorted(path.relative_to(ROOT / "protos").as_posix() for path in (ROOT / "protos").rglob("*.proto"))
    files = {file.name: file for file in FileDescriptorSet.FromString(built.stdout).file}
    assert sources
    for name in sources:
        stub = import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        embedded = FileDescriptorProto.FromString(stub.DESCRIPTOR.serialized_pb)
        assert without_json_names(embedded) == without_json_names(files[name]), f"{name}: run 'make stubs'"


def test_every_stub_has_a_proto_file():
    for stub in (ROOT / "protos").rglob("*_pb2*"):
        if stub.suffix in {".py", ".pyi"}:
            assert stub.with_name(stub.name.split("_pb2")[0] + ".proto").exists(), stub


def requirement_name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0].lower().replace("_", "-")


@pytest.fixture
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {requirement_name(line): line for line in lines if line and not line.startswith("#")}


HEAVY = {"accelerate", "gguf", "matplotlib", "numpy", "safetensors", "torch", "transformers", "vllm"}


def test_the_base_install_has_no_numeric_library(project):
    assert HEAVY.isdisjoint(map(requirement_name, project["dependencies"]))


def test_the_client_imports_no_numeric_library():
    code = "import sys, steer_client; from steer_client import *; print(*{name.split('.')[0] for name in sys.modules})"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr.decode()
    loaded = set(result.stdout.decode().split())
    assert "steer_client" in loaded
    assert HEAVY & loaded == set()


def test_every_pin_is_exact_and_free_of_local_versions(pins):
    assert [pin for pin in pins.values() if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []


def test_every_dependency_of_server_and_dev_is_pinned(project, pins):
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["build"], *extras["server"], *extras["analyse"], *extras["dev"]}
    assert {requirement_name(name) for name in wanted} - {project["name"]} - set(pins) == set()


def test_every_make_target_that_a_page_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    pages = [text for path, text in text_files().items() if path.suffix == ".md"]
    called = re.compile(r"(?:`|^\s*(?:\$ )?)make ([a-z-]+)\b", re.MULTILINE)
    named = {name for text in pages for name in called.findall(text)}
    assert named
    assert named - targets == set()


def test_no_pattern_has_a_possessive_group():
    """Python 3.11.0 to 3.11.4, Debian's among them, match those wrongly where the group ends amid a repetition."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("operators", "steer_server", "clients", "protos")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"""\)(?:[*+?]|\{\d*,?\d*\})\+""", line) and "re.compile" in line
    ]
    assert found == []
