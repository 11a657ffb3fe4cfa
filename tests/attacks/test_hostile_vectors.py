"""Files of vectors that are none: refused by name, quickly, and without a pickle being read."""

import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from operators.core.errors import VectorError
from operators.vectors import array_files
from operators.vectors.array_files import parse_npz
from operators.vectors.gguf_file import parse_control_vector
from operators.vectors.vector_file import read_vector_file


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def _text(value):
    return struct.pack("<Q", len(value)) + value


def _entry(key, value=b"controlvector", kind=8):
    return _text(key) + struct.pack("<I", kind) + (_text(value) if kind == 8 else value)


_HEAD = [_entry(b"general.architecture"), _entry(b"controlvector.model_hint", b"llama")]


def _tensor(name=b"direction.1", dimensions=(4,), kind=0, offset=0):
    shape = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return _text(name) + struct.pack("<I", len(dimensions)) + shape + struct.pack("<IQ", kind, offset)


def _gguf(entries=_HEAD, tensors=None, *, version=3, counts=None, numbers=b"\0\0\x80\x3f" * 8):
    tensors = [_tensor()] if tensors is None else tensors
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join([*entries, *tensors])
    return head + b"\0" * (-len(head) % 32) + numbers


def _zip(*members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def _npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy(shape, descr="<f4", content=b"", version=b"\x01\x00"):
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(head)) + head + content


def _torch_save():
    file = io.BytesIO()
    torch.save({"v": torch.ones(4)}, file)
    return file.getvalue()


_HUGE = 1 << 62
_GOOD = _gguf()

HOSTILE = {
    "an object array": (_npz(v=np.array([_Bomb()], dtype=object)), "of objects, which are pickles"),
    "a pickle beside an array": (_zip(("v.npy", _npy((1,), content=b"\0" * 4)), ("data.pkl", b"x")), "no .npy array"),
    "what torch.save writes": (_torch_save(), "as torch.save writes them to hold pickles"),
    "a pickle": (pickle.dumps(_Bomb(), protocol=4), "a pickle, which is never read"),
    "an old pickle": (pickle.dumps(_Bomb(), protocol=0), "not a whole safetensors file"),
    "a member that is a pickle": (_zip(("v.npy", pickle.dumps(_Bomb()))), "not a whole npz file"),
    "a huge shape": (_zip(("v.npy", _npy((_HUGE,)))), "at most"),
    "a product of shapes": (_zip(("v.npy", _npy((1 << 40, 1 << 40)))), "at most"),
    "a negative shape": (_zip(("v.npy", _npy((-1,)))), "not a whole npz file|damaged"),
    "a member that is too short": (_zip(("v.npy", _npy((3,), content=b"\0" * 4 + b" " * 2))), "at most|damaged"),
    "a member that is too long": (_zip(("v.npy", _npy((1,), content=b"\0" * 9))), "damaged"),
    "whole numbers": (_npz(v=np.arange(4)), "int64; float16, float32 and float64"),
    "a structure": (_npz(v=np.zeros(2, dtype=[("a", "<f4"), ("b", "<f4")])), "float16, float32 and float64"),
    "complex numbers": (_npz(v=np.zeros(2, dtype=np.complex64)), "complex64; float16"),
    "code as a header": (_zip(("v.npy", _npy("__import__('os').system('touch exploded')"))), "not a whole npz file"),
    "a truncated npz": (_npz(v=np.zeros(9))[:-30], "truncated|not a whole npz"),
    "a list of many members": (_npz(v=np.zeros(9))[:-10] + struct.pack("<I", 1 << 30) + b"\0" * 6, "at most"),
    "nothing": (b"", "not a whole safetensors file"),
    "text": (b"hello, these are no numbers at all", "not a whole safetensors file"),
    "a truncated safetensors file": (save({"v": torch.ones(9)})[:-3], "not a whole safetensors file"),
    "a huge safetensors header": (struct.pack("<Q", _HUGE) + b"{}", "not a whole safetensors file"),
    "GGUF alone": (b"GGUF", "truncated"),
    "another version": (_gguf(version=1), "GGUF version 1"),
    "big endian": (_gguf(version=3 << 24), "little endian"),
    "many tensors": (_gguf(counts=(_HUGE, 2)), f"{_HUGE} tensors; at most"),
    "many metadata entries": (_gguf(counts=(1, _HUGE)), f"{_HUGE} metadata entries; at most"),
    "more entries than there are": (_gguf(counts=(1, 9)), "truncated|which is none|not UTF-8|twice"),
    "a long text": (_gguf([b"\xff" * 7 + b"\x7f"]), "truncated"),
    "a long array": (_gguf([*_HEAD, _entry(b"a", struct.pack("<IQ", 4, _HUGE), 9)]), "truncated"),
    "a long array of texts": (_gguf([*_HEAD, _entry(b"a", struct.pack("<IQ", 8, _HUGE), 9)]), "at most"),
    "arrays in an array": (_gguf([*_HEAD, _entry(b"a", struct.pack("<IQ", 9, 1), 9)]), "an array of GGUF type 9"),
    "an unknown type": (_gguf([*_HEAD, _entry(b"a", b"", 77)]), "type 77, which is none"),
    "metadata twice": (_gguf([*_HEAD, _HEAD[0]]), "is there twice"),
    "another architecture": (_gguf([_entry(b"general.architecture", b"llama")]), "'llama'; 'controlvector'"),
    "no model": (_gguf(_HEAD[:1]), "model_hint is None"),
    "a long model": (
        _gguf([_HEAD[0], _entry(b"controlvector.model_hint", b"x" * 5000)]),
        "the kind of model is needed",
    ),
    "no alignment": (
        _gguf([*_HEAD, _entry(b"general.alignment", struct.pack("<I", 0), 4)]),
        "general.alignment is 0",
    ),
    "no tensors": (_gguf(tensors=[]), "no tensor direction.N"),
    "another tensor": (_gguf(tensors=[_tensor(b"token_embd.weight")]), "'token_embd.weight'; a control vector"),
    "a negative block": (_gguf(tensors=[_tensor(b"direction.-1")]), "'direction.-1'; a control vector"),
    "a long number": (_gguf(tensors=[_tensor(b"direction." + b"9" * 5000)]), "a control vector has tensors"),
    "a matrix": (_gguf(tensors=[_tensor(dimensions=(2, 2))]), "2 dimensions"),
    "no dimension": (_gguf(tensors=[_tensor(dimensions=())]), "0 dimensions"),
    "half precision": (_gguf(tensors=[_tensor(kind=1)]), r"GGUF type 1; 0 \(float32\)"),
    "a huge vector": (_gguf(tensors=[_tensor(dimensions=(_HUGE,))]), "truncated"),
    "an empty vector": (_gguf(tensors=[_tensor(dimensions=(0,))]), "has no numbers"),
    "an offset behind the file": (_gguf(tensors=[_tensor(offset=_HUGE)]), "truncated"),
    "one block twice": (_gguf(tensors=[_tensor(), _tensor()]), "twice"),
    "a truncated GGUF file": (_GOOD[:-20], "truncated"),
}


@pytest.mark.parametrize(("data", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, monkeypatch, data, problem):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(VectorError, match=problem) as caught:
        read_vector_file(path)
    assert "hostile" in str(caught.value)
    assert time.process_time() - start < 2
    assert not (tmp_path / "exploded").exists()


def test_a_link_a_folder_and_an_endless_file_are_refused(tmp_path):
    (tmp_path / "real").write_bytes(_GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 40)
    for path, problem in (("link", "symbolic link"), (".", "regular file"), ("endless", "at most")):
        with pytest.raises(VectorError, match=problem):
            read_vector_file(tmp_path / path)


def test_what_an_archive_unpacks_to_is_bounded_over_all_its_arrays(monkeypatch):
    data = _zip(*((f"v{number}.npy", _npy((1 << 16,), content=b"\0" * (4 << 16))) for number in range(4)))
    assert len(data) < 8 << 10
    assert len(parse_npz(data, source="n")) == 4
    monkeypatch.setattr(array_files, "_MAX_UNPACKED", 13 << 16)
    with pytest.raises(VectorError, match=r"array 'v3' of shape \(65536,\) takes 262144 bytes; at most"):
        parse_npz(data, source="n")


def test_one_name_twice_is_refused():
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = _zip(("v.npy", _npy((0,))), ("v.npy", _npy((0,))))
    with pytest.raises(VectorError, match="array 'v' is there twice"):
        parse_npz(data, source="n")


def test_the_good_file_is_read():
    assert parse_control_vector(_GOOD, source="g").directions[1].tolist() == [1.0] * 4


@settings(max_examples=300)
@given(place=st.integers(0, len(_GOOD) - 1), value=st.integers(0, 255), end=st.integers(0, len(_GOOD)))
@example(place=8, value=255, end=len(_GOOD))
def test_any_damage_is_an_error_or_another_valid_file(place, value, end):
    data = bytearray(_GOOD)
    data[place] = value
    try:
        found = parse_control_vector(bytes(data[:end]), source="g")
    except VectorError:
        return
    assert all(vector.ndim == 1 for vector in found.directions.values())


_NPZ = _npz(v=np.arange(4.0), w=np.ones(3, dtype=np.float32))


@settings(max_examples=300)
@given(place=st.integers(0, len(_NPZ) - 1), value=st.integers(0, 255), end=st.integers(0, len(_NPZ)))
def test_any_damage_of_an_npz_file_is_an_error_or_floats(place, value, end):
    data = bytearray(_NPZ)
    data[place] = value
    try:
        found = parse_npz(bytes(data[:end]), source="n")
    except VectorError:
        return
    assert all(tensor.is_floating_point() for tensor in found.values())
