"""Differences of mean hidden states, held against the hidden states that operators are built from."""

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.builder.verify import check_compatible
from operators.core.artifact import make_vector
from operators.core.errors import BuildError, IncompatibleOperatorError, ReconstructionError, VectorError
from operators.model.steered import steered
from operators.vectors.contrast import check_contrast, contrast_operator, mean_difference, read_texts

POSITIVE = ("golden bridge", "a golden dress", "the bay is golden")
NEGATIVE = ("a painting", "here is the wedding")


def _file(folder, name, texts):
    path = folder / name
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return read_texts(path)


@pytest.fixture
def sides(tmp_path):
    return _file(tmp_path, "positive.txt", POSITIVE), _file(tmp_path, "negative.txt", NEGATIVE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_vector_is_the_difference_of_the_means_of_the_texts_hidden_states(tiny, sides, name):
    loaded = tiny(name)

    def state(text):
        # The anchor of an operator is h of the layer at the text's last token, by another path through the model.
        return build_operator(BuildSpec((concept_from_text(text, loaded),), layer=2, rank=1), loaded).anchor.double()

    expected = torch.stack([state(text) for text in POSITIVE]).mean(0) - torch.stack(
        [state(text) for text in NEGATIVE]
    ).mean(0)
    artifact = contrast_operator(*sides, loaded, layer=2)
    torch.testing.assert_close(artifact.anchor.double(), expected, rtol=1e-6, atol=1e-6)
    header = artifact.header
    assert header.vector.norm == pytest.approx(float(expected.norm()), rel=1e-6)
    assert (header.layer, header.injection_layer, header.recommended.blend) == (2, 2, 1.0)
    assert (header.vector.positive.texts, header.vector.negative.texts) == (3, 2)
    assert header.concept == "mean of positive.txt minus mean of negative.txt"


def test_the_model_keeps_no_hook(tiny, sides):
    loaded = tiny("llama", fresh=True)
    mean_difference(*sides, loaded, layer=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_exchanged_sides_give_the_opposite_vector(tiny, sides):
    loaded = tiny("llama")
    one, other = mean_difference(*sides, loaded, layer=1), mean_difference(*sides[::-1], loaded, layer=1)
    assert torch.equal(one.vector, -other.vector)


def test_it_steers_transformers_without_a_server(tiny, sides):
    # A model of its own: what transformers captures hidden states with stays on the modules.
    loaded = tiny("llama", dtype="float32", fresh=True)
    artifact = contrast_operator(*sides, loaded, layer=2, strength=1.5)
    ids = torch.tensor([loaded.tokenizer("the bay")["input_ids"]])
    plain = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
    with steered(loaded, artifact):
        pushed = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(pushed[1], plain[1])
    assert not torch.allclose(pushed[3], plain[3], rtol=1e-2)


def test_a_stored_contrast_is_computed_anew_from_its_files(tiny, sides):
    loaded = tiny("llama", dtype="float32")
    artifact = contrast_operator(*sides, loaded, layer=3)
    assert check_contrast(artifact, *sides, loaded) < 1e-6
    moved = make_vector(artifact.header, artifact.anchor + 0.01 * artifact.anchor.norm())
    with pytest.raises(ReconstructionError, match="off by"):
        check_contrast(moved, *sides, loaded)
    with pytest.raises(VectorError, match=r"positive file negative\.txt has sha256:"):
        check_contrast(artifact, *sides[::-1], loaded)
    with pytest.raises(IncompatibleOperatorError):
        check_compatible(artifact.header, tiny("mistral", dtype="float32"))


def test_texts_of_both_sides_are_refused_by_name(tiny, tmp_path):
    sides = _file(tmp_path, "a.txt", ["one", "both"]), _file(tmp_path, "b.txt", ["both", "two"])
    with pytest.raises(VectorError, match=r"'both' is in a\.txt and in b\.txt"):
        contrast_operator(*sides, tiny("llama"), layer=2)


def test_equal_means_have_no_direction(tiny, tmp_path, monkeypatch):
    sides = _file(tmp_path, "a.txt", ["golden"]), _file(tmp_path, "b.txt", ["bridge"])
    loaded = tiny("llama")
    monkeypatch.setattr("operators.vectors.contrast.last_target", lambda *_, **__: torch.ones(40).double())
    with pytest.raises(VectorError, match="are equal"):
        contrast_operator(*sides, loaded, layer=2)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused(tiny, sides, layer):
    with pytest.raises(BuildError, match="1 to 3 are accepted"):
        contrast_operator(*sides, tiny("llama"), layer=layer)


def test_a_text_longer_than_the_context_is_refused_by_its_line(tiny, tmp_path):
    sides = _file(tmp_path, "a.txt", ["short", "x" * 200]), _file(tmp_path, "b.txt", ["other"])
    with pytest.raises(VectorError, match=r"a\.txt: line 2: concept has"):
        contrast_operator(*sides, tiny("llama"), layer=2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "there are no texts"),
        (b"one\n\ntwo\n", "line 2 is blank"),
        (b" \n", "line 1 is blank"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_without_texts_are_refused(tmp_path, content, problem):
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(VectorError, match=problem):
        read_texts(tmp_path / "texts.txt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(VectorError, match="cannot be opened"):
        read_texts(tmp_path / "nowhere.txt")
    with pytest.raises(VectorError, match="not a regular file"):
        read_texts(tmp_path)


def test_a_file_whose_name_is_no_text_can_be_used(tiny, tmp_path):
    odd = _file(tmp_path, "a\udcff.txt", ["golden"])
    artifact = contrast_operator(odd, _file(tmp_path, "b.txt", ["bridge"]), tiny("llama"), layer=2)
    assert (artifact.header.vector.positive.name, artifact.header.concept[:14]) == ("a?.txt", "mean of a?.txt")


def test_line_ends_are_no_part_of_a_text(tmp_path):
    (tmp_path / "texts.txt").write_bytes("# one \r\nzwei ö\n".encode())
    assert read_texts(tmp_path / "texts.txt").texts == ("# one ", "zwei ö")
