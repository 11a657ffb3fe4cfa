"""A control vector made by repeng itself: imported, applied, exported and read back by repeng.

    python -m venv /tmp/repeng && /tmp/repeng/bin/pip install repeng==0.4.0 'transformers==4.57.*' accelerate
    python tests/bench/bench_repeng.py --repeng /tmp/repeng/bin/python [--layer 15] [--coefficient 40]

repeng trains a vector on pairs of sentences, writes its GGUF file, and steers the output of one block with a
coefficient c. Here that file is imported, and every token steered with the strength 2 c |v| / |h| that its hidden
state's norm |h| makes of c, along the operator's own direction. Prints the largest differences of hidden states,
relative to the state's norm, over all blocks, prompts and positions: steered against steered, plain against plain (what
two versions of torch and transformers differ by) and steered against plain (what steering does).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from operators.core.apply import Direction, Setting, prepare
from operators.core.hooks import LayerPush, PushHooks
from operators.model.loading import DEFAULT_MODEL, LoadedModel, decoder_layers, load_model
from operators.model.obtain import obtain
from operators.vectors.export import export_gguf
from operators.vectors.gguf_file import parse_control_vector
from operators.vectors.imported import choose_tensors, import_vector
from operators.vectors.vector_file import read_vector_file

PROMPTS = ("I went to see the", "The best thing about today is that", "My neighbour told me")
WORDS = ("the sea", "a letter", "her work", "this town", "the film", "our dinner", "that song", "his garden")
REPENG = """
import json, sys
import numpy as np, torch
from repeng import ControlModel, ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(job["model"])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
if job["back"]:
    made, back = (ControlVector.import_gguf(job[name]) for name in ("file", "back"))
    equal = [layer for layer, direction in back.directions.items() if (direction == made.directions[layer]).all()]
    print(json.dumps({"layers": sorted(back.directions), "equal": sorted(equal)}))
    sys.exit()
pairs = [DatasetEntry(f"I am so happy about {word}", f"I am so sad about {word}") for word in job["words"]]
vector = ControlVector.train(model, tokenizer, pairs)
vector.export_gguf(job["file"])
states = {}
def run(kind):
    for index, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            found = model(input_ids=ids, output_hidden_states=True).hidden_states
        states[f"{kind}{index}"] = torch.cat(found).numpy()
run("plain")
control = ControlModel(model, [job["block"]])
control.set_control(vector, job["coefficient"])
run("steered")
np.savez(job["states"], **states)
"""


def main() -> None:
    """Prints the figures as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeng", required=True, help="interpreter of an environment with repeng")
    options.add_argument("--model", default=DEFAULT_MODEL)
    options.add_argument("--layer", type=int, default=15)
    options.add_argument("--coefficient", type=float, default=40.0)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_compare(arguments, Path(folder)), indent=2))


def _compare(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    source = folder / "model"
    shutil.copytree(obtain(arguments.model), source)
    # Earlier versions of transformers look for these elsewhere, or by another name.
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    files = {name: str(folder / name) for name in ("made.gguf", "exported.gguf", "states.npz")}
    job = {
        "model": str(source),
        "file": files["made.gguf"],
        "states": files["states.npz"],
        "back": "",
        "block": arguments.layer - 1,
        "coefficient": arguments.coefficient,
        "prompts": PROMPTS,
        "words": WORDS,
    }
    _run(arguments.repeng, job)
    loaded = load_model(str(source))
    made = read_vector_file(Path(files["made.gguf"]))
    chosen = choose_tensors(made, [], None, all_layers=True)
    # The output of the last block is no block's input, and has no operator.
    last = chosen.pop(loaded.num_layers)
    operators = {
        name: import_vector(made, name, loaded, layer=layer, about="happy, not sad") for layer, name in chosen.items()
    }
    export_gguf(operators, Path(files["exported.gguf"]))
    original, exported = (parse_control_vector(Path(files[name]).read_bytes(), source=name) for name in list(files)[:2])
    changed = [block for block, kept in exported.directions.items() if (kept != original.directions[block]).any()]
    if changed:
        raise AssertionError(f"directions {changed} changed on their way through the store")
    one = choose_tensors(made, [arguments.layer], None)[arguments.layer]
    with np.load(files["states.npz"], allow_pickle=False) as theirs:
        worst = _differences(theirs, loaded, operators[one], arguments)
    back = json.loads(_run(arguments.repeng, {**job, "back": files["exported.gguf"]}))
    return {
        "model": loaded.name if loaded.name == arguments.model else arguments.model,
        "layer": arguments.layer,
        "norm": operators[one].header.vector.norm,
        "coefficient": arguments.coefficient,
        **worst,
        "directions made": len(original.directions),
        "exported and read by repeng": len(back["layers"]),
        "of them equal in every bit": len(back["equal"]),
        "left out": last,
    }


def _differences(theirs: object, loaded: LoadedModel, operator: object, arguments: argparse.Namespace) -> dict:
    worst = {"steered": 0.0, "plain": 0.0, "effect": 0.0}
    setting = Setting(1.0, "cumulative", 1.0)
    norm = operator.header.vector.norm
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        plain = _states(loaded, ids)
        direction = Direction(prepare(operator, loaded.device), setting).advance(plain[0])
        half_strengths = arguments.coefficient * norm / plain[arguments.layer].norm(dim=-1, keepdim=True)
        push = (half_strengths * direction)[None]
        with PushHooks(decoder_layers(loaded.model), [arguments.layer]) as hooks:
            hooks.load({arguments.layer: LayerPush(torch.tensor([0]), push)})
            steered = _states(loaded, ids)
            hooks.take_doses()
        for kind, ours, other in (
            ("steered", steered, torch.from_numpy(theirs[f"steered{index}"])),
            ("plain", plain, torch.from_numpy(theirs[f"plain{index}"])),
            ("effect", steered, plain),
        ):
            # hidden_states[s] is the input of block s, here before the push and in repeng after it.
            kept = [s for s in range(len(ours)) if s != arguments.layer]
            error = (ours[kept] - other[kept]).norm(dim=-1) / other[kept].norm(dim=-1)
            worst[kind] = max(worst[kind], float(error.max()))
    return worst


def _states(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """(L + 1, T, d)."""
    with torch.no_grad():
        return torch.cat(loaded.model(input_ids=ids, output_hidden_states=True).hidden_states)


def _run(python: str, job: dict) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", REPENG, json.dumps(job)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
