"""In place of the builder, for what any process can do: what it does is the name of the concept."""

import json
import sys
import time
import tomllib
from pathlib import Path


def stage(what, done=0, total=0):
    print(json.dumps({"stage": what, "done": done, "total": total, "seconds_left": None}), file=sys.stderr, flush=True)


def main():
    given = sys.argv
    name = tomllib.loads(Path(given[given.index("--file") + 1]).read_text())["concept"][0]["name"]
    store = Path(given[given.index("--store") + 1])
    stage("counting", 1, 2)
    if name == "writes":
        store.mkdir()
        (store / "writes.safetensors").write_bytes(b"half of it")
        stage("writing")
    if name in ("counts", "writes"):
        time.sleep(60)
    elif name == "talks":
        print("a line\n" + "x" * 200_000 + "\nbeside \x1b[31mthe\x1b[0m progress", file=sys.stderr)
        stage("x" * 1000, "many", -3)
        print('[]\n{"stage"', file=sys.stderr)
        sys.exit(3)
    elif name == "answers":
        print(json.dumps({"operators": [{"problem": {"message": "no such layer"}}]}))
        sys.exit(1)
    elif name == "hogs":
        try:
            kept = []
            while True:
                kept.append(bytearray(16 << 20))
        except MemoryError:
            kept = None
            print(json.dumps({"error": {"message": "there is not enough memory"}}))
            sys.exit(1)
    elif name == "lies":
        store.mkdir()
        (store / "lies.safetensors").write_bytes(b"half of it")


main()
