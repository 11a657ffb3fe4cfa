"""Writes a lock file of the images: the very wheels that pip chooses, each with its hash, one a line.

    python3.11 deploy/image/lock.py server     what the CPU image holds
    python3.11 deploy/image/lock.py gpu        what the CUDA image holds
    python3.11 deploy/image/lock.py build      what makes the project's own wheel

Run on x86-64 Linux by Python 3.11, which the images have: a hash is that of one file, for one platform.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The one pin of vLLM's CPU build that its CUDA build contradicts.
LEFT_OUT = {"gpu": "apache-tvm-ffi=="}


def wanted(lock: str) -> tuple[list[str], str]:
    """The requirements of a lock file, and the lines that hold versions down."""
    pins = (ROOT / ("constraints-vllm.txt" if lock == "gpu" else "constraints.txt")).read_text(encoding="utf-8")
    [torch] = [line for line in pins.splitlines() if line.startswith("torch==")]
    requirements = {
        "server": [f"{ROOT}[server,otel]", f"{torch}+cpu"],
        "gpu": [f"{ROOT}[vllm,otel]"],
        "build": ["hatchling>=1.27"],
    }
    kept = [line for line in pins.splitlines() if not line.startswith(LEFT_OUT.get(lock, "#"))]
    return requirements[lock], "\n".join(kept) + "\n"


def resolve(requirements: list[str], pins: str) -> dict[str, str]:
    """Asks pip which files it would install: a line of the lock file for each package, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text(pins, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--report", str(report), "-c", str(constraints), *requirements]
        subprocess.run(command, check=True)
        chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = {}
    for package in chosen:
        if "archive_info" in package["download_info"]:  # not the project itself
            metadata = package["metadata"]
            name = metadata["name"].lower().replace("_", "-").replace(".", "-")
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            lines[name] = f"{name}=={metadata['version']} --hash=sha256:{digest}"
    return lines


def main() -> None:
    """Writes the lock file that the command line names."""
    if sys.version_info[:2] != (3, 11) or sys.argv[1:] not in (["server"], ["gpu"], ["build"]):
        sys.exit("usage: python3.11 deploy/image/lock.py server|gpu|build")
    lock = sys.argv[1]
    lines = resolve(*wanted(lock))
    if lock == "gpu" and "+cpu" in lines["torch"]:
        sys.exit("pip chose torch's CPU build; hide it from pip, for example with PIP_CONFIG_FILE=/dev/null")
    head = f"# Wheels for Python 3.11 on x86-64 Linux. Written by deploy/image/lock.py {lock}.\n"
    text = head + "".join(f"{lines[name]}\n" for name in sorted(lines))
    (HERE / f"{lock}.lock").write_text(text, encoding="utf-8")
    print(f"{lock}.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
