"""Files written by earlier versions are read as they were written.

Those of version 0.1.0 were written by its ``build_operator`` and ``to_bytes``, on two models of ``tests/conftest.py``:
``exact``, of "golden bridge" at layer 2 of ``tiny("llama", dtype="float32")``, with every default but ``rank="full"``;
and ``low-rank``, of that text and "a golden dress, naïve 橋" at layer 3 of ``tiny("gpt2")``, with the profile golden,
rank 4, the word "golden", and the recommendation strength -0.4, substitute, blend 0.5.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.artifact import read_artifact, to_bytes
from operators.core.file_format import read_file_header
from operators.core.header import Recommended
from operators.core.store import Store
from operators.model.earlier_fingerprint import earlier_fingerprint

DATA = Path(__file__).parents[2] / "data"
DIGESTS = {
    "exact-0.1.0": "sha256:b4b288075232a09facfc678f649b58335812b0f7c53b77e451db3b7f17c33a59",
    "low-rank-0.1.0": "sha256:487d54a77a1ee997b5daa51ce66799fcc39df025ae20774fa97bc343416a9d51",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_file_of_an_earlier_version_has_the_digest_that_it_was_written_with(name):
    artifact = read_artifact(DATA / f"{name}.safetensors")
    assert artifact.digest == DIGESTS[name]
    assert artifact.header.builder_version == "0.1.0"


@pytest.mark.parametrize("name", DIGESTS)
def test_writing_it_again_gives_the_same_bytes(name):
    path = DATA / f"{name}.safetensors"
    assert to_bytes(read_artifact(path)) == path.read_bytes()


@pytest.mark.parametrize("name", DIGESTS)
def test_its_header_is_read_without_torch(name):
    found, artifact = read_file_header(DATA / f"{name}.safetensors"), read_artifact(DATA / f"{name}.safetensors")
    assert (found.header, found.header_json, found.digest) == (artifact.header, artifact.header_json, artifact.digest)
    assert found.affine == (artifact.offset is not None) == (name == "low-rank-0.1.0")
    program = (
        "import sys\nfrom operators.core.store import Store\n"
        "print(Store(sys.argv[1]).read_header(sys.argv[2]).digest, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, DATA, name], capture_output=True, text=True, env=os.environ)
    assert done.stdout == f"{DIGESTS[name]} False\n"


def test_they_are_listed_like_a_store():
    assert set(Store(DATA)) == set(DIGESTS)


@pytest.mark.parametrize("name", DIGESTS)
def test_building_it_again_gives_the_same_map(tiny, name):
    old = read_artifact(DATA / f"{name}.safetensors")
    if name == "exact-0.1.0":
        loaded = tiny("llama", dtype="float32")
        new = build_operator(BuildSpec((concept_from_text("golden bridge", loaded),), layer=2, rank="full"), loaded)
    else:
        loaded = tiny("gpt2")
        texts = tuple(concept_from_text(text, loaded) for text in ("golden bridge", "a golden dress, naïve 橋"))
        recommended = Recommended(strength=-0.4, rule="substitute", blend=0.5)
        new = build_operator(
            BuildSpec(texts, "golden", layer=3, rank=4, words=("golden",), recommended=recommended), loaded
        )
    assert earlier_fingerprint(loaded.model) == old.header.model_fingerprint
    measured = {
        "model_fingerprint",
        "created",
        "reconstruction_error",
        "low_rank",
        "builder_version",
        "attention",
        "neutral",
        "concept_tokens",
        "recommended",
    }
    assert new.header.model_dump(exclude=measured) == old.header.model_dump(exclude=measured)
    for found, expected in ((new.jacobian(), old.jacobian()), (new.anchor, old.anchor)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.substitute_base, old.substitute_base, rtol=1e-4, atol=1e-4)
