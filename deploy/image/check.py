"""Runs the image as it is meant to be run, and holds it to what docs/IMAGE.md says of it.

    python deploy/image/check.py MODEL [IMAGE]

MODEL is a model's folder; IMAGE is localhost/steering-operators:latest where none is named. Needs root, podman and runc
as deploy/image/build.sh does, and the project's Python, whose SDK asks the server from outside the container. The root
is read-only, no capability is left, and only a volume can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from steer_client import OperatorUse, SamplingParams, SteerClient, SteerError

HERE = Path(__file__).resolve().parent
PORT = 50151
TEXT = "The golden light of the afternoon lay on the sea"
LOCKED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
COMPILERS = {"as", "c++", "cc", "clang", "g++", "gcc", "ld", "make", "nvcc", "rustc"}
SETTINGS = os.environ | {"CONTAINERS_CONF": os.environ.get("CONTAINERS_CONF", str(HERE / "containers.conf"))}


def podman(*arguments: str, check: bool = True) -> str:
    """What a podman command prints. Raises RuntimeError with its complaint where it fails."""
    done = subprocess.run(["podman", *arguments], env=SETTINGS, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip() or done.stderr.strip()


def require(truth: bool, claim: str, found: object = "") -> None:
    """Prints the claim, or ends the program."""
    if not truth:
        sys.exit(f"NOT SO: {claim}: {found}")
    print(f"ok  {claim}{f': {found}' if found else ''}")


def check_files(image: str) -> None:
    """What is in the image, and what is not."""
    root = Path(podman("image", "mount", image))
    try:
        files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    finally:
        podman("image", "unmount", image)
    parts = [path.relative_to(root) for path in files]
    compilers = [str(path) for path in parts if re.sub(r"^x86_64-linux-gnu-|-\d+$", "", path.name) in COMPILERS]
    require(not [path for path in compilers if "bin/" in path], "it has no compiler", compilers)
    packages = [path for path in parts if path.parts[:2] == ("opt", "steer")]
    require(not [path for path in packages if "tests" in path.parts], "it has no tests")
    require(not [path for path in packages if path.parts[5:6] == ("pip",)], "its environment has no pip")
    caches = [path for path in parts if path.parts[:3] in {("var", "cache", "apt"), ("var", "lib", "apt")}]
    caches += [path for path in parts if ".cache" in path.parts]
    require(not [path for path in caches if path.suffix in {".deb", ".whl", ".bin"}], "it has no caches")
    python = {path for path in packages if path.suffix == ".py" and "site-packages" in path.parts}
    compiled = {path.parent.parent / f"{path.name.split('.')[0]}.py" for path in packages if path.suffix == ".pyc"}
    require(len(python - compiled) < len(python) // 100, "its bytecode is made", f"{len(compiled)} of {len(python)}")


@contextlib.contextmanager
def running(image: str, *options: str, arguments: tuple[str, ...] = ()) -> Iterator[str]:
    """A container of the image under the lock, by its id; removed at the end."""
    name = podman("run", "--detach", *LOCKED, *options, image, *arguments)
    try:
        yield name
    except BaseException:
        print(podman("logs", name, check=False), file=sys.stderr)
        raise
    finally:
        podman("rm", "--force", "--time", "0", name)


def wait_until_serving(client: SteerClient, container: str, begin: float) -> float:
    """Seconds from `begin` until the server answers from outside."""
    while time.monotonic() - begin < 300:
        with contextlib.suppress(SteerError):
            if client.health(timeout=1):
                return time.monotonic() - begin
        if podman("inspect", "--format", "{{.State.Running}}", container) != "true":
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not come up: {podman('logs', container, check=False)}")


def stop(container: str, seconds: int) -> tuple[int, float]:
    """Stops a container as `docker stop` does. Returns its exit status and how long that took."""
    begin = time.monotonic()
    podman("stop", "--time", str(seconds), container)
    took = time.monotonic() - begin
    return int(podman("inspect", "--format", "{{.State.ExitCode}}", container)), took


def check_server(image: str, mounts: list[str], insecure: tuple[str, ...]) -> None:
    """One server: what it answers, who it is, and how it ends."""
    published = [*mounts, "--publish", f"127.0.0.1:{PORT}:50051", "--env", "STEER_MODEL=/models/model"]
    begin = time.monotonic()
    with running(image, *published, arguments=insecure) as container, SteerClient(f"127.0.0.1:{PORT}") as client:
        require(True, "it serves", f"{wait_until_serving(client, container, begin):.1f} s after it was started")
        steered = client.generate(
            TEXT, operators=[OperatorUse("light")], sampling=SamplingParams(max_tokens=16, temperature=0.0)
        )
        require(bool(steered.receipts), "a request from outside is steered", steered.receipts[0])
        podman("healthcheck", "run", container)
        require(True, "the HEALTHCHECK's command says that it is well")
        pid = podman("inspect", "--format", "{{.State.Pid}}", container)
        status = dict(re.findall(r"^(\w+):\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
        require(status["Uid"].split() == ["10001"] * 4, "process 1 is user 10001")
        require(int(status["CapEff"], 16) == 0 and status["NoNewPrivs"] == "1", "it has no capability")
        processes = podman("top", container, "pid", "args").splitlines()[1:]
        others = [line for line in processes if not line.startswith("1 ") and "render_chat" not in line]
        require(not others, "the server is process 1; another one renders chat templates, and no more run", others)
        require(True, "memory", f"{status['VmRSS']} resident, {status['VmHWM']} at most")
        for folder in ("/", "/opt/steer", "/etc"):
            refused = podman("exec", container, "touch", f"{folder}/written", check=False)
            require("Read-only" in refused or "denied" in refused, f"{folder} cannot be written")
        texts: list[str] = []

        def read() -> None:
            with client.stream(TEXT, sampling=SamplingParams(max_tokens=64)) as stream:
                texts.extend(delta.text for delta in stream)

        reader = threading.Thread(target=read)
        reader.start()
        while not texts:
            time.sleep(0.01)
        code, took = stop(container, 30)
        reader.join()
        require(code == 0, "SIGTERM in the middle of a stream: exit status 0", f"{took:.1f} s")
        require(len("".join(texts)) > 0, "and the stream was read to its end", f"{len(texts)} pieces")
    with running(image, *published, arguments=insecure) as container:
        time.sleep(1.5)
        code, took = stop(container, 60)
        require(took < 10, "SIGTERM while it loads ends it too", f"status {code} in {took:.1f} s")


def main() -> None:
    """Checks the image that the command line names."""
    if len(sys.argv) not in {2, 3} or not Path(sys.argv[1], "config.json").is_file():
        sys.exit("usage: python deploy/image/check.py MODEL [IMAGE], where MODEL is a folder with a config.json")
    image = sys.argv[2] if len(sys.argv) == 3 else "localhost/steering-operators:latest"
    settings = json.loads(podman("image", "inspect", image))[0]
    require(settings["User"] == "10001:10001", "it does not run as root", settings["User"])
    check_files(image)
    with tempfile.TemporaryDirectory(prefix="steer-image-") as folder:
        os.chmod(folder, 0o755)
        data = Path(folder, "data")
        data.mkdir()
        os.chown(data, 10001, 10001)
        mounts = ["--volume", f"{data}:/var/lib/steer", "--volume", f"{Path(sys.argv[1]).resolve()}:/models/model:ro"]
        command = ["build", "light", "--text", "golden light", "--model", "/models/model", "--rank", "8"]
        begin = time.monotonic()
        podman("run", "--rm", *LOCKED, "--network", "none", *mounts, "--entrypoint", "steer-operators", image, *command)
        require(True, "it builds an operator, without a network", f"{time.monotonic() - begin:.1f} s")
        with running(image, *mounts, "--env", "STEER_MODEL=/models/model") as container:
            code = int(podman("wait", container))
            said = podman("logs", container)
            require(code != 0 and "--insecure" in said, "without TLS, tokens or --insecure it does not start", said)
        check_server(image, mounts, ("--insecure",))


if __name__ == "__main__":
    main()
