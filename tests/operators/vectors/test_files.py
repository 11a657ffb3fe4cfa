"""Vectors on their way from files into operators, and back."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import save_file

from operators.core.errors import BuildError, SettingError, VectorError
from operators.core.vector_source import ImportedVector
from operators.vectors.export import export_gguf, what_is_lost
from operators.vectors.gguf_file import ControlVector, parse_control_vector, write_control_vector
from operators.vectors.imported import check_model_hint, choose_tensors, import_vector
from operators.vectors.vector_file import read_vector_file

WIDTH = 40
"""Of the tiny Llama, which has 4 blocks."""


def _directions(*blocks, width=WIDTH, seed=0):
    numbers = np.random.default_rng(seed)
    return {block: numbers.standard_normal(width).astype(np.float32) for block in blocks}


def _as_repeng_writes(path, directions, hint="llama"):
    """What repeng 0.4.0 does in ControlVector.export_gguf."""
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf(tmp_path):
    # As repeng orders them: from the last block to the first.
    return _as_repeng_writes(tmp_path / "vector.gguf", _directions(3, 2, 1))


def test_a_file_as_repeng_writes_it_becomes_operators_and_the_same_file_again(tiny, gguf, tmp_path):
    loaded = tiny("llama", dtype="float32")
    file = read_vector_file(gguf)
    check_model_hint(file, loaded)
    assert (file.file_format, file.model_hint, file.layers) == (
        "gguf",
        "llama",
        {2: "direction.1", 3: "direction.2", 4: "direction.3"},
    )
    made = {
        name: import_vector(file, name, loaded, layer=layer, about="happy", strength=0.2)
        for layer, name in choose_tensors(file, [3, 2], None).items()
    }
    written = _directions(3, 2, 1)
    for name, artifact in made.items():
        block = int(name.removeprefix("direction."))
        assert np.array_equal(artifact.anchor.numpy(), written[block])
        # Added to the output of block N: to the input of block N + 1.
        assert artifact.header.injection_layer == block + 1
        assert artifact.header.vector == ImportedVector(
            norm=float(torch.tensor(written[block]).double().norm()),
            file_format="gguf",
            file_digest=file.digest,
            tensor=name,
            model_hint="llama",
        )
        assert (artifact.header.recommended.strength, artifact.header.concept) == (0.2, "happy")
    out = tmp_path / "out.gguf"
    assert export_gguf(made, out) == {name: name for name in made}
    back = parse_control_vector(out.read_bytes(), source="out")
    assert back.model_hint == "llama"
    assert list(back.directions) == [1, 2]
    assert all(np.array_equal(back.directions[block], written[block]) for block in (1, 2))
    # The reader that repeng uses.
    reader = GGUFReader(out)
    assert {tensor.name: tensor.data.tolist() for tensor in reader.tensors} == {
        f"direction.{block}": written[block].tolist() for block in (1, 2)
    }
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]) == b"llama"
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"


@pytest.mark.parametrize(
    ("layers", "tensor", "all_layers", "problem"),
    [
        ([], None, False, r"the layer is needed .*layer 2: 'direction\.1' of shape \(40,\), norm"),
        ([1], None, False, r"no vector for layer 1: .*layer 4: 'direction\.3'"),
        ([2, 2], None, False, "each once is accepted"),
        ([2], "direction.1", False, "a GGUF file is asked by --layer"),
    ],
)
def test_the_layer_of_a_control_vector_is_asked_for(gguf, layers, tensor, all_layers, problem):
    with pytest.raises(VectorError, match=problem):
        choose_tensors(read_vector_file(gguf), layers, tensor, all_layers=all_layers)


def test_all_layers_or_the_only_one_need_no_layer(gguf, tmp_path):
    assert list(choose_tensors(read_vector_file(gguf), [], None, all_layers=True)) == [2, 3, 4]
    one = _as_repeng_writes(tmp_path / "one.gguf", _directions(0))
    assert choose_tensors(read_vector_file(one), [], None) == {1: "direction.0"}


def test_a_vector_for_the_last_blocks_output_has_no_block_to_push(tiny, gguf):
    file = read_vector_file(gguf)
    with pytest.raises(BuildError, match=r"layer 4 .*1 to 3 are accepted"):
        import_vector(file, "direction.3", tiny("llama"), layer=4, about="x")


def test_another_kind_of_model_is_refused(tiny, tmp_path):
    file = read_vector_file(_as_repeng_writes(tmp_path / "v.gguf", _directions(1), hint="qwen2"))
    with pytest.raises(VectorError, match="of kind 'qwen2'; tiny-llama is 'llama'"):
        check_model_hint(file, tiny("llama"))


def test_another_width_is_another_model(tiny, tmp_path):
    file = read_vector_file(_as_repeng_writes(tmp_path / "v.gguf", _directions(1, width=39)))
    with pytest.raises(VectorError, match=r"'direction\.1' has 39 numbers; tiny-llama has hidden size 40"):
        import_vector(file, "direction.1", tiny("llama"), layer=2, about="x")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("safetensors", dtype) for dtype in ("float64", "float32", "float16", "bfloat16")),
        *(("npz", dtype) for dtype in ("float64", "float32", "float16")),
    ],
)
def test_a_tensor_of_an_array_file_keeps_its_numbers(tiny, tmp_path, kind, dtype):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    others = {"wide": torch.ones(2, WIDTH), "v": vector}
    path = tmp_path / f"vectors.{kind}"
    if kind == "safetensors":
        save_file(others, path)
    else:
        np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in others.items()})
    file = read_vector_file(path)
    with pytest.raises(VectorError, match="one --layer is needed"):
        choose_tensors(file, [], "v")
    with pytest.raises(VectorError, match="one --layer is needed"):
        choose_tensors(file, [1, 2], "v")
    with pytest.raises(VectorError, match=r"the tensor is needed \(--tensor\): .*'wide' of shape \(2, 40\)"):
        choose_tensors(file, [2], None)
    with pytest.raises(VectorError, match="there is no tensor 'u'"):
        choose_tensors(file, [2], "u")
    assert choose_tensors(file, [2], "v") == {2: "v"}
    made = import_vector(file, "v", tiny("llama"), layer=2, about="x")
    assert torch.equal(made.anchor.double(), vector.double())
    assert made.header.dtype == ("float32" if dtype == "float16" else dtype)
    assert (made.header.vector.file_format, made.header.vector.model_hint) == (kind, None)
    with pytest.raises(VectorError, match=r"'wide' is float32 of shape \(2, 40\); a vector"):
        import_vector(file, "wide", tiny("llama"), layer=2, about="x")


@pytest.mark.parametrize(
    ("value", "problem"),
    [(0.0, "norm 0 in float32"), (float("nan"), "not finite"), (float("inf"), "not finite"), (1e300, "norm inf")],
)
def test_a_vector_that_cannot_push_is_refused(tiny, tmp_path, value, problem):
    np.savez(tmp_path / "v.npz", v=np.full(WIDTH, value))
    with pytest.raises(VectorError, match=problem):
        import_vector(read_vector_file(tmp_path / "v.npz"), "v", tiny("llama"), layer=2, about="x")


def test_what_a_header_cannot_hold_is_refused(tiny, tmp_path):
    save_file({"v" * 2000: torch.ones(WIDTH), "v": torch.ones(WIDTH)}, tmp_path / "v.safetensors")
    file, loaded = read_vector_file(tmp_path / "v.safetensors"), tiny("llama")
    with pytest.raises(VectorError, match="a name of 2000 characters"):
        import_vector(file, "v" * 2000, loaded, layer=2, about="x")
    with pytest.raises(VectorError, match="not Unicode"):
        import_vector(file, "v", loaded, layer=2, about="x\udc80")
    with pytest.raises(SettingError, match="strength is nan"):
        import_vector(file, "v", loaded, layer=2, about="x", strength=float("nan"))


def test_the_anchor_of_any_operator_is_exported_and_what_is_lost_is_said(make_operator, tmp_path):
    operator = make_operator()
    path = tmp_path / "a.gguf"
    assert export_gguf({"a": operator}, path) == {"a": "direction.1"}
    found = parse_control_vector(path.read_bytes(), source="a")
    assert np.array_equal(found.directions[1], operator.anchor.numpy())
    assert found.model_hint == "llama"
    assert "its map (rank 5)" in what_is_lost(operator.header)[0]
    with pytest.raises(VectorError, match="is there already; --replace"):
        export_gguf({"a": operator}, path)
    export_gguf({"a": operator}, path, replace=True)


def test_what_has_no_place_in_a_control_vector_is_refused(make_operator, make_rank_0, tmp_path):
    path = tmp_path / "a.gguf"
    golden = make_operator(profile="golden", layer=1, injection_layer=0)
    for operators, problem in (
        ({"a": golden}, "pushes the first block's input"),
        ({"a": make_operator(), "b": make_rank_0()}, "pushes block 2, as another does"),
        ({"a": make_operator(), "b": make_operator(model_fingerprint=f"sha256:{'9' * 64}")}, "one is accepted"),
        ({"a": make_operator(architecture="Unheard")}, "--model-hint says it"),
    ):
        with pytest.raises(VectorError, match=problem):
            export_gguf(operators, path)
        assert not path.exists()


def test_an_interrupted_export_leaves_nothing(tmp_path):
    vector = ControlVector("llama", _directions(1))
    with pytest.raises(VectorError, match="cannot be written"):
        write_control_vector(tmp_path / "nowhere" / "a.gguf", vector)
    (tmp_path / "folder").mkdir()
    with pytest.raises(VectorError, match="cannot be written"):
        write_control_vector(tmp_path / "folder", vector)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
