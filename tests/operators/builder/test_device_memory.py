"""A streamed build takes two memories where it computes on an accelerator, and each has its bound.

There is no accelerator here: what would be in its memory is counted, tensor by tensor, on the CPU.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from operators.__main__ import app
from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.memory import estimate_streamed, host_bytes
from operators.builder.plan import plan_build
from operators.builder.spec import BuildSpec, resolve_spec
from operators.core.errors import BuildError, ModelError
from operators.core.header import NeutralTexts
from operators.maps.sketch import num_products
from operators.model.loading import load_model
from tests.odd_models import odd_model
from tests.operators.builder.test_plan import MACHINE
from tests.tiny_tokenizer import make_tokenizer

CUDA = torch.device("cuda")
WIDE = {"hidden_size": 160, "intermediate_size": 352, "head_dim": 40, "num_attention_heads": 4}
# As many positions as go through a block side by side.
NEUTRAL = NeutralTexts(digest=f"sha256:{'0' * 64}", ids=tuple(tuple(range(1 + text, 17 + text)) for text in range(63)))


def spec(tokens, rank):
    ids = tuple(1 + 7 * place % 90 for place in range(tokens))
    return BuildSpec((Concept("text", ids),), layer=3, rank=rank, neutral=NEUTRAL)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide")
    # Half as wide in the files as where they are computed with: so the two are told apart.
    model = odd_model("llama", **WIDE, max_position_embeddings=512, vocab_size=len(make_tokenizer()))
    model.to(torch.bfloat16).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def streamed(stored):
    return load_model(stored, dtype="float32", stream=True)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors of 4 bytes or more a number had at any moment."""

    def __init__(self):
        super().__init__()
        self._alive, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.itemsize >= 4 and tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, which, size):
        self._alive.discard(which)
        self.now -= size


@pytest.mark.parametrize(("tokens", "rank"), [(8, 32), (200, 8)])
def test_what_is_computed_with_stays_within_what_is_said_of_the_device(tokens, rank, streamed, monkeypatch):
    monkeypatch.setattr("operators.builder.memory._LIBRARIES", 0)
    monkeypatch.setattr("operators.builder.memory._ALLOCATOR", 1.0)
    asked = spec(tokens, rank)
    width = num_products(rank, streamed.hidden_size, power_iterations=0, probes=asked.num_probes)
    shape = (streamed, tokens, 3, width)
    said, everything = (estimate_streamed(*shape, on_accelerator=there) for there in (True, False))
    table = streamed.model.get_input_embeddings().weight.nbytes
    gc.collect()
    with _Peak() as peak:
        # Within the least that is accepted: one vector at a time.
        build_operator(asked, streamed, max_memory=everything.fixed + everything.per_row)
    found, bound = peak.most + table, said.fixed + said.per_row
    # It says something: it is not many times what is taken.
    assert bound * 0.4 < found <= bound < everything.fixed + everything.per_row


def test_each_of_two_memories_has_its_bound(streamed):
    asked = spec(8, 32)
    width = num_products(32, streamed.hidden_size, power_iterations=0, probes=asked.num_probes)
    said = estimate_streamed(streamed, 8, 3, width, on_accelerator=True)
    least, host = said.fixed + said.per_row, host_bytes(streamed, 8, 32)
    with torch.device("meta"):
        bare = replace(streamed, model=type(streamed.model)(streamed.model.config).eval(), meant_for=CUDA)
    fits = replace(bare, device_memory=least)
    assert resolve_spec(asked, fits, max_memory=host + 1, streamed=True).vectors_per_pass == 1
    plan = plan_build(
        asked, fits, MACHINE, streamed=True, stored_itemsize=2, digested=True, max_memory=host + 1, neutral_tokens=3
    )
    assert (plan.device_memory, plan.memory) == (least, host)
    with pytest.raises(BuildError, match=r"memory of cuda beside the program; .* may be used \(--device-memory; "):
        resolve_spec(asked, replace(bare, device_memory=least - 1), max_memory=host + 1, streamed=True)
    with pytest.raises(BuildError, match=r"memory of the host beside the program; .* may be used \(--max-memory; "):
        resolve_spec(asked, fits, max_memory=host, streamed=True)
    # Not streamed, the weights are there too.
    weights = sum(weight.nbytes for weight in bare.model.parameters())
    whole = plan_build(
        *(asked, replace(bare, device_memory=1 << 40), MACHINE),
        streamed=False,
        stored_itemsize=2,
        digested=True,
        max_memory=1 << 30,
        neutral_tokens=3,
    )
    assert whole.device_memory == whole.memory + weights
    assert resolve_spec(asked, replace(bare, device_memory=whole.device_memory), max_memory=1 << 30, streamed=False)
    with pytest.raises(BuildError, match=r"\(--device-memory; "):
        resolve_spec(asked, replace(bare, device_memory=weights + 1), max_memory=1 << 30, streamed=False)


def test_the_memory_of_a_device_that_has_none_is_refused(stored, tmp_path):
    with pytest.raises(ModelError, match=r"device memory 1\.0 GiB on device 'cpu', which has none of its own"):
        load_model(stored, device_memory=1 << 30)
    command = ["build", "one", "--text", "The bridge", "--model", stored, "--store", str(tmp_path), "--device", "cpu"]
    for plan in ([], ["--plan"]):
        refused = CliRunner().invoke(app, [*command, *plan, "--device-memory", "2GiB"])
        assert refused.exit_code == 1
        assert "device memory 2.0 GiB on device 'cpu'" in refused.output
    refused = CliRunner().invoke(app, [*command, "--device-memory", "much"])
    assert "memory 'much'; a size such as 8GiB" in refused.output
    assert not list(tmp_path.iterdir())


def test_a_streamed_build_that_does_not_fit_is_refused_before_the_weights_are_read(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("operators.model.stored_tensors.StoredTensor.read", lambda _: pytest.fail("a weight was read"))
    command = ["build", "one", "--text", "The bridge", "--model", stored, "--store", str(tmp_path), "--stream"]
    refused = CliRunner().invoke(app, [*command, "--device", "cpu", "--max-memory", "1MiB"])
    assert refused.exit_code == 1
    assert "beside the program; 1.0 MiB may be used (--max-memory" in refused.output
