"""Files that are not operators, and what the reader says about each."""

import io
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from operators.core import artifact as artifacts
from operators.core.artifact import from_bytes, make_artifact, read_artifact, to_bytes
from operators.core.errors import ArtifactError
from operators.core.file_format import parse_file_header, read_file_header


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def _parts(data):
    """The safetensors header and the tensors' bytes."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def _file(head, body):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _metadata(data, **changes):
    """The file with metadata values replaced; None removes one."""
    head, body = _parts(data)
    new = {**head["__metadata__"], **changes}
    head["__metadata__"] = {name: value for name, value in new.items() if value is not None}
    return _file(head, body)


def _tensors(data, change):
    """The file with its tensors changed, and everything else as it was."""
    head, _ = _parts(data)
    tensors = load(data)
    change(tensors)
    return save(tensors, metadata=head["__metadata__"])


def _signed(data, **changes):
    """The file with header fields changed, and signed again by somebody who knows how; None removes one."""
    head, body = _parts(data)
    header = {**json.loads(head["__metadata__"]["header"]), **changes}
    text = json.dumps({name: value for name, value in header.items() if value is not None})
    digest = artifacts._digest(text, load(data))
    return _metadata(_file(head, body), header=text, digest=digest)


def _header_of(data, *, source):
    return parse_file_header(io.BytesIO(data), len(data), source=source)


def _torch_save(_data):
    file = io.BytesIO()
    torch.save({"jacobian": torch.ones(3, 5, 5)}, file)
    return file.getvalue()


def _zip(_data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("jacobian", b"0" * 100)
    return file.getvalue()


def _set(name, value):
    def change(tensors):
        tensors[name] = value if isinstance(value, torch.Tensor) else value(tensors[name])

    return change


def _with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def _renamed_metadata(data):
    head, body = _parts(data)
    return _file({**head, "__metadata__": "no table"}, body)


def _no_metadata(data):
    return save(load(data))


def _overlapping(data):
    head, body = _parts(data)
    head["anchor"]["data_offsets"] = head["substitute_base"]["data_offsets"]
    return _file(head, body)


def _outside(data):
    head, body = _parts(data)
    head["jacobian"]["data_offsets"] = [0, 1 << 40]
    return _file(head, body)


def _tensor(data, name, **changes):
    """The file with the entry of one tensor changed; bytes are written as they are, and None removes a field."""
    head, body = _parts(data)
    fields = {**head[name], **changes}
    head[name] = {
        key: value if not isinstance(value, bytes) else "RAW" for key, value in fields.items() if value is not None
    }
    text = json.dumps(head).encode()
    for value in changes.values():
        if isinstance(value, bytes):
            text = text.replace(b'"RAW"', b"[" + value + b"]")
    return _file(text, body)


def _twice(data, entry):
    head, body = _parts(data)
    return _file(b"{" + entry + json.dumps(head).encode()[1:], body)


PICKLE = "pickle or zip archive"
BROKEN = "not a whole safetensors file"
DAMAGED = "it is damaged"
HEADER = "header field "

# attack -> (the file, made from the bytes of a valid one; words that the refusal must have)
ATTACKS = {
    "empty": (lambda data: b"", BROKEN),
    "one byte": (lambda data: b"\x00", BROKEN),
    "text": (lambda data: b"hello, this is no operator at all\n", BROKEN),
    "zeros": (lambda data: bytes(4096), BROKEN),
    "pickle, protocol 2": (lambda data: pickle.dumps(_Bomb(), protocol=2), PICKLE),
    "pickle, protocol 4": (lambda data: pickle.dumps(_Bomb(), protocol=4), PICKLE),
    "pickle, protocol 5": (lambda data: pickle.dumps(_Bomb(), protocol=5), PICKLE),
    "pickle, protocol 0": (lambda data: pickle.dumps(_Bomb(), protocol=0), BROKEN),
    "zip": (_zip, PICKLE),
    "torch.save": (_torch_save, PICKLE),
    "trailing byte": (lambda data: data + b"\x00", BROKEN),
    "trailing operator": (lambda data: data + data, BROKEN),
    "leading byte": (lambda data: b"\x00" + data, BROKEN),
    "huge header length": (lambda data: struct.pack("<Q", 1 << 62) + data[8:], BROKEN),
    "header length past the end": (lambda data: struct.pack("<Q", len(data)) + data[8:], BROKEN),
    "header length of 0": (lambda data: struct.pack("<Q", 0) + data[8:], BROKEN),
    "header is no JSON": (lambda data: _file(b"{" * 64, b""), BROKEN),
    "header is deep JSON": (lambda data: _file(b'{"a":' * 100_000, b""), BROKEN),
    "header is a list": (lambda data: _file([1, 2], b""), BROKEN),
    "metadata is text": (_renamed_metadata, BROKEN),
    "metadata is a list": (lambda data: _file({**_parts(data)[0], "__metadata__": [1]}, _parts(data)[1]), BROKEN),
    "metadata with a number": (lambda data: _metadata(data, extra=7), BROKEN),
    "half a character": (lambda data: _metadata(data, extra="\ud800"), BROKEN),
    "metadata twice": (lambda data: _twice(data, b'"__metadata__":{},'), BROKEN),
    "tensor twice": (lambda data: _twice(data, b'"anchor":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},'), BROKEN),
    "more entries than an operator has": (lambda data: _file({f"t{n}": {} for n in range(20_000)}, b""), BROKEN),
    "header is nested": (lambda data: _file(b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", b""), BROKEN),
    "a long number": (lambda data: _tensor(data, "anchor", shape=b"1" * 5000), BROKEN),
    "tensor without a shape": (lambda data: _tensor(data, "anchor", shape=None), BROKEN),
    "a shape that is text": (lambda data: _tensor(data, "anchor", shape="5"), BROKEN),
    "a shape that is a truth value": (lambda data: _tensor(data, "anchor", shape=[5, True]), BROKEN),
    "a negative shape": (lambda data: _tensor(data, "anchor", shape=[-5, -1]), BROKEN),
    "a shape of another size": (lambda data: _tensor(data, "anchor", shape=[6]), BROKEN),
    "a dtype that nobody knows": (lambda data: _tensor(data, "anchor", dtype="F7"), BROKEN),
    "three offsets": (lambda data: _tensor(data, "anchor", data_offsets=[0, 20, 40]), BROKEN),
    "a tensor that is a list": (lambda data: _file({**_parts(data)[0], "anchor": [1]}, _parts(data)[1]), BROKEN),
    "overlapping tensors": (_overlapping, BROKEN),
    "tensor outside of the file": (_outside, BROKEN),
    "no metadata": (_no_metadata, "metadata format is None; an operator says 'steering-operator'"),
    "another format": (lambda data: _metadata(data, format="lora"), "metadata format is 'lora'"),
    "version of the future": (
        lambda data: _metadata(data, version="2"),
        "format version '2' is unknown; this build reads '1'",
    ),
    "no version": (lambda data: _metadata(data, version=None), "format version None is unknown"),
    "no header": (lambda data: _metadata(data, header=None), HEADER),
    "empty header": (lambda data: _metadata(data, header="{}"), HEADER + "'concept': Field required"),
    "header that is a list": (lambda data: _metadata(data, header="[]"), HEADER),
    "no digest": (lambda data: _metadata(data, digest=None), DAMAGED),
    "another digest": (lambda data: _metadata(data, digest=f"sha256:{'0' * 64}"), DAMAGED),
    "another strength": (
        lambda data: _metadata(
            data, header=_parts(data)[0]["__metadata__"]["header"].replace('"strength":0.5', '"strength":0.9')
        ),
        DAMAGED,
    ),
    "one changed number": (lambda data: _tensors(data, _set("anchor", _with_value(1.5))), DAMAGED),
    "NaN": (
        lambda data: _tensors(data, _set("jacobian", _with_value(float("nan")))),
        "tensor 'jacobian' has values that are not finite",
    ),
    "infinity": (
        lambda data: _tensors(data, _set("anchor", _with_value(float("-inf")))),
        "tensor 'anchor' has values that are not finite",
    ),
    "too few tokens": (
        lambda data: _tensors(data, _set("jacobian", torch.ones(2, 5, 5))),
        "tensor 'jacobian' has shape (2, 5, 5); the header asks for (3, 5, 5)",
    ),
    "flat anchor": (
        lambda data: _tensors(data, _set("anchor", torch.ones(5, 1))),
        "tensor 'anchor' has shape (5, 1); the header asks for (5,)",
    ),
    "another dtype": (
        lambda data: _tensors(data, _set("jacobian", lambda tensor: tensor.to(torch.float16))),
        "tensor 'jacobian' is torch.float16; the header says float32",
    ),
    "missing tensor": (
        lambda data: _tensors(data, lambda tensors: tensors.pop("anchor")),
        "tensors missing: ['anchor'], unknown: []",
    ),
    "unknown tensor": (
        lambda data: _tensors(data, _set("extra", torch.ones(1))),
        "unknown: ['extra']",
    ),
    "unsigned offset": (lambda data: _tensors(data, _set("offset", torch.zeros(5))), DAMAGED),
    "layer as text": (lambda data: _signed(data, layer="2"), HEADER + "'layer'"),
    "layer as truth": (lambda data: _signed(data, layer=True), HEADER + "'layer'"),
    "layer of 0": (lambda data: _signed(data, layer=0), HEADER + "'layer'"),
    "layer past the model": (
        lambda data: _signed(data, layer=5, injection_layer=5),
        "layer 5 with injection layer 5 is not a 'residual' operator of a model with 4 layers",
    ),
    "last layer of a residual operator": (
        lambda data: _signed(data, layer=4, injection_layer=4),
        "injection layer 4 of 4 layers",
    ),
    "injected elsewhere": (
        lambda data: _signed(data, injection_layer=0),
        "layer 2 with injection layer 0 is not a 'residual' operator",
    ),
    "negative token": (lambda data: _signed(data, concept_ids=[0, -1, 2]), HEADER + "'concept_ids.1'"),
    "token as text": (lambda data: _signed(data, concept_ids=[0, "1", 2]), HEADER + "'concept_ids.1'"),
    "fewer tokens than blocks": (
        lambda data: _signed(data, concept_ids=[0, 1]),
        "has shape (3, 5, 5); the header asks for (2, 5, 5)",
    ),
    "missing header field": (lambda data: _signed(data, model=None), HEADER + "'model': Field required"),
    "extra header field": (lambda data: _signed(data, run="rm -rf"), HEADER + "'run': Extra inputs"),
    "header field of another type": (lambda data: _signed(data, model=["a"]), HEADER + "'model'"),
    "unknown profile": (lambda data: _signed(data, profile="silver"), HEADER + "'profile'"),
    "unknown dtype": (lambda data: _signed(data, dtype="int8"), HEADER + "'dtype'"),
    "huge width": (lambda data: _signed(data, hidden_size=10**30), HEADER + "'hidden_size'"),
    "width of a larger file": (
        lambda data: _signed(data, hidden_size=(1 << 31) - 1),
        f"the header asks for (3, {(1 << 31) - 1}, {(1 << 31) - 1})",
    ),
    "token past 31 bits": (lambda data: _signed(data, concept_ids=[0, 1, 1 << 31]), HEADER + "'concept_ids.2'"),
    "more tokens than are read": (
        lambda data: _signed(data, concept_ids=[0] * ((1 << 16) + 1)),
        HEADER + "'concept_ids'",
    ),
    "layer past 31 bits": (
        lambda data: _signed(data, layer=1 << 31, injection_layer=1 << 31, num_layers=1 << 32),
        HEADER + "'layer'",
    ),
    "depth past 31 bits": (lambda data: _signed(data, num_layers=1 << 31), HEADER + "'num_layers'"),
    "long concept": (lambda data: _signed(data, concept="x" * ((1 << 16) + 1)), HEADER + "'concept'"),
    "long model": (lambda data: _signed(data, model="x" * 1025), HEADER + "'model'"),
    "long architecture": (lambda data: _signed(data, architecture="x" * 1025), HEADER + "'architecture'"),
    "long rule set": (lambda data: _signed(data, rule_set="x" * 1025), HEADER + "'rule_set'"),
    "long builder version": (lambda data: _signed(data, builder_version="x" * 1025), HEADER + "'builder_version'"),
    "year 1": (lambda data: _signed(data, created="0001-01-01T00:00:00+14:00"), HEADER + "'created'"),
    "year 1969": (lambda data: _signed(data, created="1969-12-31T23:59:59Z"), HEADER + "'created'"),
    "year 9999": (lambda data: _signed(data, created="9999-12-31T23:59:59-12:00"), HEADER + "'created'"),
    "blend past 1": (
        lambda data: _signed(data, recommended={"strength": 1.0, "rule": "cumulative", "blend": 2.0}),
        HEADER + "'recommended.blend'",
    ),
    "infinite strength": (
        lambda data: _signed(data, recommended={"strength": 1e999, "rule": "cumulative", "blend": 0.0}),
        HEADER,
    ),
    "fingerprint of another kind": (
        lambda data: _signed(data, model_fingerprint="md5:00"),
        HEADER + "'model_fingerprint'",
    ),
    "time without a zone": (lambda data: _signed(data, created="2030-01-01T00:00:00"), HEADER + "'created'"),
}


# Attacks that only the bytes of the tensors tell.
IN_THE_TENSORS = {"another digest", "another strength", "one changed number", "NaN", "infinity", "unsigned offset"}


@pytest.fixture(scope="module")
def data(make_operator):
    return to_bytes(make_operator())


def test_the_tools_of_these_attacks_leave_a_valid_file_valid(data):
    assert from_bytes(_file(*_parts(data)), source="x")
    assert from_bytes(_metadata(data), source="x")
    assert from_bytes(_tensors(data, lambda tensors: None), source="x")
    assert from_bytes(_signed(data), source="x")
    assert from_bytes(_signed(data, concept="another"), source="x").header.concept == "another"


def test_the_largest_header_that_is_accepted_is_read(data):
    concept = "東" * (1 << 16)
    made = from_bytes(_signed(data, concept=concept, model="x" * 1024, concept_ids=[0, 1, (1 << 31) - 1]), source="x")
    assert made.header.concept == concept
    assert made.header.concept_ids[-1] == (1 << 31) - 1
    for year in (1971, 9998):
        assert from_bytes(_signed(data, created=f"{year}-01-01T00:00:00Z"), source="x").header.created.year == year


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_is_refused_with_its_name_and_its_problem(attack, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forge, words = ATTACKS[attack]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(forge(data))
    with pytest.raises(ArtifactError, match=re.escape(words)) as refusal:
        read_artifact(path)
    assert str(refusal.value).startswith("hostile.safetensors: ")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_its_header_alone_is_refused_in_the_same_words_wherever_that_can_be_seen(attack, data, tmp_path):
    forge, words = ATTACKS[attack]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(forge(data))
    if attack in IN_THE_TENSORS:
        assert read_file_header(path).digest.startswith("sha256:")
        return
    with pytest.raises(ArtifactError, match=re.escape(words)) as refusal:
        read_file_header(path)
    with pytest.raises(ArtifactError) as whole:
        read_artifact(path)
    assert str(refusal.value) == str(whole.value)


def test_a_header_is_read_without_the_tensors_behind_it(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data[:-4] + b"\xff\xff\xff\xff")
    assert read_file_header(path).digest == from_bytes(data, source="x").digest
    with pytest.raises(ArtifactError, match="not finite"):
        read_artifact(path)


def test_a_file_truncated_anywhere_is_refused(data):
    start = 8 + struct.unpack("<Q", data[:8])[0]
    lengths = {*range(64), *range(64, len(data), 37), start - 1, start, start + 1, len(data) - 1}
    for length in lengths:
        for read in (from_bytes, _header_of):
            with pytest.raises(ArtifactError):
                read(data[:length], source="x")


@settings(max_examples=400)
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
@example(position=0, bit=0)
@example(position=8, bit=5)
def test_a_single_flipped_bit_is_refused(data, position, bit):
    flipped = bytearray(data)
    flipped[position % len(data)] ^= 1 << bit
    with pytest.raises(ArtifactError):
        from_bytes(bytes(flipped), source="x")


def test_every_single_flipped_bit_of_the_header_is_refused(data):
    for position in range(8 + struct.unpack("<Q", data[:8])[0]):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError):
            from_bytes(bytes(flipped), source="x")


@settings(max_examples=200)
@given(junk=st.binary(max_size=300))
def test_noise_is_refused(junk):
    for read in (from_bytes, _header_of):
        with pytest.raises(ArtifactError):
            read(junk, source="x")


def test_values_that_are_not_finite_cannot_be_signed_either(make_operator):
    good = make_operator()
    with pytest.raises(ArtifactError, match="not finite"):
        make_artifact(good.header, good.factors, good.anchor, torch.full((5,), float("nan")))
