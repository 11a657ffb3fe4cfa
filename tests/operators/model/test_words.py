"""Words -> operator: the word rule, the numbers, and what is refused."""

import math
from functools import partial

import pytest
import torch

from operators.core.apply import prepare
from operators.core.artifact import from_bytes, tensors_of, to_bytes
from operators.core.errors import IncompatibleOperatorError, SettingError, SteeringError, VectorError
from operators.core.file_format import read_file_header
from operators.core.store import Store
from operators.model.steered import steered
from operators.model.unembedding import LoadedUnembedding, loaded_unembedding
from operators.model.words import lens_words, word_ids, word_operator


@pytest.fixture
def loaded(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture
def lens(loaded, make_random_lens):
    return make_random_lens(loaded)


@pytest.fixture
def of(loaded, lens):
    """``of({"bridge": 1.0})``: the operator of these words."""
    return lambda words: word_operator(lens, words, loaded_unembedding(loaded.model), loaded.tokenizer)


def _token(loaded, text):
    (token,) = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def test_a_lens_comes_back_from_its_file_and_its_header_needs_no_numbers(lens, tmp_path):
    read = from_bytes(to_bytes(lens), source="a")
    assert (read.header, read.digest) == (lens.header, lens.digest)
    assert torch.equal(read.lens.pull, lens.lens.pull)
    assert sorted(tensors_of(read)) == ["pull", "vocabulary_mean"]
    found = read_file_header(Store(tmp_path).save("lens", lens))
    assert (found.header, found.digest) == (lens.header, lens.digest)


def test_a_lens_is_no_operator(lens):
    with pytest.raises(SteeringError, match="lens, which pushes along words"):
        prepare(lens, torch.device("cpu"))


def test_a_word_is_the_mean_of_its_variants_that_are_one_token(loaded):
    variants = {_token(loaded, text) for text in ("the", " the", "The")}
    assert word_ids("the", loaded.tokenizer) == word_ids("The", loaded.tokenizer) == tuple(sorted(variants))
    assert word_ids("painting", loaded.tokenizer) == (_token(loaded, " painting"),)


def test_a_word_of_several_tokens_is_the_mean_of_them(loaded):
    ids = loaded.tokenizer(" golden gate", add_special_tokens=False)["input_ids"]
    proper = {token for token in ids if loaded.tokenizer.decode([token]).strip()}
    assert word_ids("golden gate", loaded.tokenizer) == tuple(sorted(proper))


def test_the_vector_is_the_lens_times_the_word_without_the_vocabulary(loaded, lens, of):
    made = of({"bridge": 1.0})
    table = loaded.model.get_output_embeddings().weight.double()
    ids = list(word_ids("bridge", loaded.tokenizer))
    expected = lens.lens.pull.double() @ (table[ids].mean(0) - table.mean(0))
    torch.testing.assert_close(made.anchor.double(), expected / expected.norm(), atol=1e-6, rtol=1e-5)
    source = made.header.vector
    assert (source.method, source.lens, source.words[0].ids) == ("lens", lens.digest, tuple(ids))
    assert (made.header.layer, made.header.recommended) == (lens.header.layer, lens.header.recommended)


def test_a_mixture_is_the_weighted_sum_of_unit_directions(of):
    one, other = of({"bridge": 1.0}).anchor, of({"bay": 1.0}).anchor
    torch.testing.assert_close(of({"bridge": 1.0, "bay": -0.25}).anchor, one - 0.25 * other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1e-300, 1e-25, 2.0, 1e25, 1e300])
def test_the_size_of_the_weights_makes_no_difference(of, size):
    expected = of({"bridge": 1.0, "bay": -0.25})
    made = of({"bridge": size, "bay": -0.25 * size})
    torch.testing.assert_close(made.anchor, expected.anchor, atol=1e-6, rtol=0)
    assert [word.weight for word in made.header.vector.words] == [size, -0.25 * size]
    # Squares of 1e-25 and 1e25 are 0 and infinite in float32, in which engines make them unit vectors.
    prepare(made, torch.device("cpu"))


def test_the_digest_depends_on_lens_words_and_weights_only(loaded, lens, of, make_random_lens):
    made = of({"bridge": 1.0})
    assert of({" bridge ": 1.0}).digest == made.digest
    assert of({"bridge": 2.0}).digest != made.digest
    other = make_random_lens(loaded, seed=1)
    assert (
        word_operator(other, {"bridge": 1.0}, loaded_unembedding(loaded.model), loaded.tokenizer).digest != made.digest
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "0 words; 1 to 16"),
        ({f"a{i}": 1.0 for i in range(17)}, "17 words"),
        ({"": 1.0}, "0 characters"),
        ({" \t": 1.0}, "0 characters"),
        ({"\u200b": 1.0}, "no visible character"),
        ({"\ud800": 1.0}, "not Unicode"),
        ({"a" * 65: 1.0}, "65 characters; 1 to 64"),
        ({"a" * 100_000: 1.0}, "100000 characters"),
        ({"<end>": 1.0}, "only special or unknown"),
        ({"<end> bridge": 1.0}, "only special or unknown"),
        ({"東" * 64: 1.0, "bridge": 0.0}, "weight 0"),
        ({"bridge": math.nan}, "weight nan"),
        ({"bridge": math.inf}, "weight inf"),
        ({"bridge": 1.0, "bridge ": 1.0}, "twice"),
        ({"the": 1.0, "The": -1.0}, "cancel"),
        ({"the": 1.0, "bridge": 1e-9}, "'bridge' has the weight 1e-09, which is lost beside 1"),
    ],
)
def test_what_is_no_word_is_refused(of, words, message):
    with pytest.raises(VectorError, match=message):
        of(words)


def test_a_word_of_too_many_tokens_is_refused(loaded):
    with pytest.raises(VectorError, match=r"tokens; at most 32"):
        lens_words({"".join(map(chr, range(0x100, 0x140))): 1.0}, partial(word_ids, tokenizer=loaded.tokenizer))


def test_an_operator_is_no_lens_and_a_lens_of_another_vocabulary_does_not_fit(loaded, lens, make_rank_0):
    rows = loaded_unembedding(loaded.model)
    with pytest.raises(VectorError, match="this operator is none"):
        word_operator(make_rank_0(loaded=loaded), {"bridge": 1.0}, rows, loaded.tokenizer)
    smaller = LoadedUnembedding(rows.weight[:-1], tied=False)
    with pytest.raises(IncompatibleOperatorError, match=r"\(319, 40\); the lens was built with \(320, 40\)"):
        word_operator(lens, {"bridge": 1.0}, smaller, loaded.tokenizer)


def test_a_word_without_a_strength_is_no_silent_push_of_0(loaded, of):
    with pytest.raises(SettingError, match="the lens recommends none"), steered(loaded, of({"bridge": 1.0})):
        pass
