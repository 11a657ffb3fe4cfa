"""Writes what an image holds as CycloneDX JSON: every Python distribution and every Debian package.

    python3 deploy/image/sbom.py ROOT NAME [LOCK...] > sbom.cdx.json

ROOT is the image's file system, mounted or unpacked. The hash of a wheel is that of the lock file that names it. The
time is SOURCE_DATE_EPOCH, and nothing else differs between two runs on the same files.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

SITE_PACKAGES = "opt/steer/lib/python3.11/site-packages"
LOCKED = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python_component(distribution: Distribution, hashes: dict[tuple[str, str], str]) -> dict[str, Any]:
    """One distribution; its hash where a lock file names this version."""
    metadata = distribution.metadata
    name, version = canonical(metadata["Name"]), metadata["Version"]
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if "License-Expression" in metadata:
        component["licenses"] = [{"expression": metadata["License-Expression"]}]
    elif metadata.get("License") and "\n" not in metadata["License"]:
        component["licenses"] = [{"license": {"name": metadata["License"]}}]
    if (name, version) in hashes:
        component["hashes"] = [{"alg": "SHA-256", "content": hashes[name, version]}]
    return component


def debian_components(root: Path) -> list[dict[str, Any]]:
    """The packages that dpkg says are installed."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', (root / "etc/os-release").read_text(encoding="utf-8"), re.M))
    found = [
        {
            "type": "operating-system",
            "bom-ref": f"{release['ID']}-{release['VERSION_ID']}",
            "name": release["ID"],
            "version": release["VERSION_ID"],
        }
    ]
    for entry in (root / "var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", entry, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            version = fields["Version"].replace("+", "%2B").replace(":", "%3A")
            purl = f"pkg:deb/{release['ID']}/{fields['Package']}@{version}?arch={fields['Architecture']}"
            component = {"type": "library", "bom-ref": purl, "name": fields["Package"], "version": fields["Version"]}
            found.append(component | {"purl": purl})
    return found


def bill(root: Path, name: str, locks: list[Path]) -> dict[str, Any]:
    """The whole document."""
    locked = "\n".join(path.read_text(encoding="utf-8") for path in locks)
    hashes = {(package, version): digest for package, version, digest in LOCKED.findall(locked)}
    python = [python_component(found, hashes) for found in distributions(path=[str(root / SITE_PACKAGES)])]
    components = sorted(python + debian_components(root), key=lambda component: component["bom-ref"])
    made = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components)).urn,
        "version": 1,
        "metadata": {
            "timestamp": made.isoformat(),
            "component": {"type": "container", "bom-ref": name, "name": name},
        },
        "components": components,
    }


def main() -> None:
    """Prints the document for the image's files."""
    if len(sys.argv) < 3:
        sys.exit("usage: python3 deploy/image/sbom.py ROOT NAME [LOCK...] > sbom.cdx.json")
    root, name, *locks = sys.argv[1:]
    print(json.dumps(bill(Path(root), name, [Path(lock) for lock in locks]), indent=1))


if __name__ == "__main__":
    main()
