"""The images: Dockerfile, lock files, .dockerignore and pyproject.toml say the same."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "deploy/image"
LOCKS = ("server", "gpu", "build")
LINE = re.compile(r"([a-z0-9-]+)==([\w.!+]+) --hash=sha256:[0-9a-f]{64}")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def locked(name: str) -> dict[str, Version]:
    found = [LINE.fullmatch(line) for line in lines(IMAGE / f"{name}.lock")]
    return {match[1]: Version(match[2]) for match in found if match}


def dependencies(*extras: str) -> list[Requirement]:
    """What the project asks for with these extras, and with those that they name."""
    named = PROJECT["project"]["optional-dependencies"]
    found = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for extra in extras:
        for text in named[extra]:
            requirement = Requirement(text)
            own = requirement.name == PROJECT["project"]["name"]
            found += dependencies(*requirement.extras) if own else [requirement]
    return found


ASKED = {
    "server": dependencies("server", "otel"),
    "gpu": dependencies("vllm", "otel"),
    "build": [Requirement(text) for text in PROJECT["build-system"]["requires"]],
}


@pytest.mark.parametrize("name", LOCKS)
def test_each_line_of_a_lock_is_a_version_and_its_hash(name):
    found = lines(IMAGE / f"{name}.lock")
    assert found
    assert [line for line in found if not LINE.fullmatch(line)] == []
    assert found == sorted(found, key=lambda line: line.split("==")[0])


@pytest.mark.parametrize("name", LOCKS)
def test_what_pyproject_asks_for_is_locked_within_its_range(name):
    pins = locked(name)
    outside = [
        f"{requirement}, locked: {version}"
        for requirement in ASKED[name]
        if not ((version := pins.get(canonicalize_name(requirement.name))) and version in requirement.specifier)
    ]
    assert outside == [], f"python3.11 deploy/image/lock.py {name} writes it anew"


@pytest.mark.parametrize(("name", "constraints"), [("server", "constraints.txt"), ("gpu", "constraints-vllm.txt")])
def test_what_is_locked_is_what_the_tests_ran_with(name, constraints):
    pins = locked(name)
    ran = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines(ROOT / constraints)}
    # vLLM's build for CUDA contradicts the one for the CPU there.
    apart = {"apache-tvm-ffi"} if name == "gpu" else set()
    others = {
        package: (str(version), str(ran[package]))
        for package, version in pins.items()
        if package in ran and package not in apart and version.public != ran[package].public
    }
    assert others == {}
    # torch asks for it; pip does not list it.
    assert set(pins) - set(ran) == {"setuptools"} or name == "gpu"


def test_the_cpu_image_has_the_cpu_build_of_torch():
    assert locked("server")["torch"].local == "cpu"
    assert locked("gpu")["torch"].local is None


def stages() -> dict[str, tuple[str, list[str]]]:
    """Of the Dockerfile, by name: what each is made from, and its instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        begins = re.fullmatch(r"FROM (\S+) AS ([a-z-]+)", line)
        if begins:
            instructions: list[str] = []
            found[begins[2]] = (begins[1], instructions)
        elif found and re.match(r"[A-Z]+ ", line):
            instructions.append(line)
    return found


def test_both_images_come_from_one_base_and_run_as_its_user():
    found = stages()
    # What is built where no target is named.
    assert list(found)[-1] == "runtime"
    [user] = [line for line in found["base"][1] if line.startswith("USER ")]
    assert user == "USER 10001:10001"
    for name in ("runtime", "gpu"):
        base, instructions = found[name]
        assert base == "base"
        assert [line for line in [user, *instructions] if line.startswith("USER ")][-1] == user
        assert not any(line.startswith(("ENTRYPOINT", "CMD", "VOLUME")) for line in instructions)


def test_every_stage_that_the_dockerfile_or_make_names_exists():
    found = stages()
    named = {part for _, lines in found.values() for line in lines for part in re.findall(r"--from=(\S+)", line)}
    named |= set(re.findall(r"--target (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert named == {"dependencies", "gpu-dependencies", "project", "gpu"}
    assert named <= set(found)
    assert {base for base, _ in found.values()} - set(found) == {"${BASE}"}


def test_what_the_images_are_built_from_is_let_in():
    let_in = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = {
        name
        for _, instructions in stages().values()
        for line in instructions
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == let_in
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_pip_installs_nothing_without_a_hash():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    commands = re.split(r"&&|\n(?=[A-Z])", dockerfile.replace("\\\n", ""))
    installs = [" ".join(found[1].split()) for text in commands if (found := re.search(r"/pip\b.* install (.*)", text))]
    # The project's own wheel has been made a line above.
    assert sorted(installs) == sorted(
        [
            *(f"--no-compile --require-hashes -r {name}.lock" for name in ("server", "gpu")),
            "--require-hashes -r build.lock",
            "--no-compile --no-deps --no-warn-script-location --root /staged /wheel/*.whl",
        ]
    )


def test_the_bill_of_materials_names_each_package_with_the_hash_it_is_locked_by(tmp_path):
    site = tmp_path / "opt/steer/lib/python3.11/site-packages"
    (site / "Typing_Extensions-4.16.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.4\nName: Typing_Extensions\nVersion: 4.16.0\nLicense-Expression: PSF-2.0\n"
    (site / "Typing_Extensions-4.16.0.dist-info/METADATA").write_text(metadata)
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    packages = "Package: {}\nStatus: {}\nArchitecture: amd64\nVersion: 1:2+3\n"
    states = packages.format("here", "install ok installed"), packages.format("gone", "deinstall ok config-files")
    (tmp_path / "var/lib/dpkg/status").write_text("\n".join(states))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    lock = tmp_path / "x.lock"
    lock.write_text(f"typing-extensions==4.16.0 --hash=sha256:{'a' * 64}\n")
    command = [sys.executable, IMAGE / "sbom.py", tmp_path, "an-image:1", lock]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    purls = {part.get("purl", part["name"]): part for part in bill["components"]}
    assert set(purls) == {"debian", "pkg:deb/debian/here@1%3A2%2B3?arch=amd64", "pkg:pypi/typing-extensions@4.16.0"}
    python = purls["pkg:pypi/typing-extensions@4.16.0"]
    assert python["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert python["licenses"] == [{"expression": "PSF-2.0"}]
