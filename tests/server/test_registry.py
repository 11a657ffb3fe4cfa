import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from operators.core.apply import Setting
from operators.core.artifact import to_bytes
from operators.core.header import Recommended
from operators.core.positions import ALL_POSITIONS, Positions
from operators.core.store import Store
from steer_server import registry as registry_module
from steer_server.errors import (
    InvalidRequestError,
    OperatorUnusableError,
    UnknownOperatorError,
)
from steer_server.registry import Registry
from steer_server.types import OperatorUse

_MAX_BYTES = 1 << 20
_OTHER = f"weights-sha256:{'0' * 64}"
_OTHER_TOKENIZER = f"sha256:{'0' * 64}"


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def registry(tmp_path, artifact, model_info):
    Store(tmp_path).save("good", artifact)
    return lambda: Registry(Store(tmp_path), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)


def _flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _narrow(artifact, remake):
    """The same operator cut down to half of its hidden size."""
    d = artifact.header.hidden_size // 2
    parts = {
        "anchor": artifact.anchor[:d],
        "substitute_base": artifact.substitute_base[:d],
        "neutral": artifact.neutral[:d],
    }
    cut = replace(artifact, factors=artifact.factors[:, :d, :d], **parts)
    return remake(cut, hidden_size=d)


BAD = {
    "foreign model": ("model", lambda a, remake: to_bytes(remake(a, model="other", model_fingerprint=_OTHER))),
    "foreign tokenizer": ("tokenizer", lambda a, remake: to_bytes(remake(a, tokenizer_fingerprint=_OTHER_TOKENIZER))),
    "more layers": ("number of layers 9", lambda a, remake: to_bytes(remake(a, num_layers=9))),
    "another hidden size": ("hidden size 20", lambda a, remake: to_bytes(_narrow(a, remake))),
    "truncated": ("not a whole safetensors file", lambda a, _: to_bytes(a)[:-7]),
    "cut to nothing": ("not a whole safetensors file", lambda a, _: b""),
    "one flipped bit in the numbers": ("it is damaged", lambda a, _: _flip(to_bytes(a), -40)),
    "trailing bytes": ("not a whole safetensors file", lambda a, _: to_bytes(a) + b"\0"),
    "not a number": (
        "not finite",
        lambda a, _: to_bytes(replace(a, factors=torch.full_like(a.factors, float("nan")))),
    ),
    "a pickle": ("pickle", lambda a, _: pickle.dumps({"jacobian": [1.0]}, protocol=4)),
    "text": ("not a whole safetensors file", lambda a, _: b"hello, this is not an operator at all"),
}


@pytest.mark.parametrize(("what", "make"), BAD.values(), ids=BAD)
def test_a_bad_artifact_is_listed_with_its_problem_and_refused(registry, tmp_path, artifact, remake, what, make):
    (tmp_path / "bad.safetensors").write_bytes(make(artifact, remake))
    made = registry()
    entry = made.entry("bad")
    assert what in entry.problem
    assert entry.artifact is None
    assert entry.size_bytes == (tmp_path / "bad.safetensors").stat().st_size
    with pytest.raises(OperatorUnusableError) as caught:
        made.plan((OperatorUse("bad"),))
    assert caught.value.name == "bad"
    assert entry.problem in str(caught.value)
    # The good one beside it is as good as before.
    assert made.entry("good").problem == ""
    assert made.plan((OperatorUse("good"),)) is not None


def test_what_was_served_is_named_beside_what_was_found(registry, tmp_path, artifact, remake, model_info):
    Store(tmp_path).save("bad", remake(artifact, model="gpt-9", model_fingerprint=_OTHER))
    problem = registry().entry("bad").problem
    for part in ("gpt-9", _OTHER, model_info.model, model_info.model_fingerprint):
        assert part in problem


def test_an_operator_of_an_earlier_version_is_told_how_to_be_renewed(registry, tmp_path, artifact, remake):
    Store(tmp_path).save("old", remake(artifact, model_fingerprint=f"sha256:{'0' * 64}"))
    Store(tmp_path).save("other", remake(artifact, model_fingerprint=_OTHER))
    made = registry()
    with pytest.raises(OperatorUnusableError, match="'steer-operators renew old' holds it against its model"):
        made.plan((OperatorUse("old"),))
    assert "renew" not in made.entry("other").problem


def test_a_model_under_another_name_is_known_by_its_fingerprint(tmp_path, artifact, with_name):
    Store(tmp_path).save("good", artifact)
    made = Registry(Store(tmp_path), with_name(model="/some where/else"), max_bytes=_MAX_BYTES, max_dose=1.0)
    assert made.entry("good").problem == ""


def test_an_oversized_file_is_not_read(registry, tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    entry = registry().entry("huge")
    assert f"at most {_MAX_BYTES} are read (STEER_MAX_ARTIFACT_BYTES sets it)" in entry.problem
    assert entry.size_bytes == 64 << 30


def test_a_symbolic_link_is_not_followed(registry, tmp_path, tmp_path_factory, artifact):
    elsewhere = Store(tmp_path_factory.mktemp("elsewhere")).save("good", artifact)
    (tmp_path / "link.safetensors").symlink_to(elsewhere)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    made = registry()
    for name in ("link", "dangling"):
        assert "symbolic link" in made.entry(name).problem
        with pytest.raises(OperatorUnusableError):
            made.plan((OperatorUse(name),))


def test_what_is_no_regular_file_is_not_opened_for_long(registry, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    made = registry()
    assert "not a regular file" in made.entry("folder").problem
    assert "not a regular file" in made.entry("pipe").problem


def test_a_pickle_is_never_unpickled(registry, tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(_Bomb(trap), protocol=4))
    torch.save(_Bomb(trap), tmp_path / "archive.safetensors")
    made = registry()
    assert "pickle" in made.entry("bomb").problem
    assert "pickle or zip" in made.entry("archive").problem
    assert not trap.exists()


def test_files_of_other_names_are_no_operators(registry, tmp_path, artifact):
    for name in ("UPPER.safetensors", ".hidden.safetensors", "notes.txt", "a b.safetensors"):
        (tmp_path / name).write_bytes(to_bytes(artifact))
    assert [entry.name for entry in registry().entries()] == ["good"]


@pytest.mark.parametrize("name", ["missing", "", "../good", "good.safetensors", "/etc/passwd", "good\0", "GOOD"])
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(registry, name):
    with pytest.raises(UnknownOperatorError, match="there are: good") as caught:
        registry().plan((OperatorUse(name),))
    assert caught.value.name == name
    assert repr(name) in str(caught.value)


def test_an_empty_store_says_so(tmp_path, model_info):
    made = Registry(Store(tmp_path / "not made yet"), model_info, max_bytes=_MAX_BYTES, max_dose=1.0)
    assert made.entries() == ()
    with pytest.raises(UnknownOperatorError, match="there are: none"):
        made.entry("x")


def test_a_reload_reports_what_it_found(registry, tmp_path, artifact, other_artifact):
    Store(tmp_path).save("going", artifact)
    Store(tmp_path).save("changing", artifact)
    Store(tmp_path).save("breaking", artifact)
    made = registry()
    Store(tmp_path).delete("going")
    Store(tmp_path).save("changing", other_artifact, replace=True)
    Store(tmp_path).save("new", artifact)
    (tmp_path / "breaking.safetensors").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    report = made.reload()
    assert report.added == ("broken", "new")
    assert report.changed == ("breaking", "changing")
    assert report.removed == ("going",)
    assert report.unusable == ("breaking", "broken")
    again = made.reload()
    assert again.added == again.changed == again.removed == ()
    assert again.unusable == report.unusable


def test_a_file_that_is_repaired_can_be_used_after_a_reload(registry, tmp_path, artifact):
    (tmp_path / "late.safetensors").write_bytes(b"")
    made = registry()
    Store(tmp_path).save("late", artifact, replace=True)
    with pytest.raises(OperatorUnusableError):
        made.plan((OperatorUse("late"),))
    assert made.reload().changed == ("late",)
    assert made.plan((OperatorUse("late"),)) is not None


async def test_the_arms_of_a_request_are_of_one_snapshot(registry, tmp_path, artifact, other_artifact, monkeypatch):
    store = Store(tmp_path)
    made, original = registry(), registry_module.draft_application

    def reload_in_between(*args):
        application = original(*args)
        store.save("good", other_artifact, replace=True)
        made.reload()
        return application

    monkeypatch.setattr(registry_module, "draft_application", reload_in_between)
    uses = (OperatorUse("good"),)
    plans = await made.plan_beside({"arms[0].operators": uses, "arms[1].operators": uses})
    assert [plan.applications[0].artifact.digest for plan in plans] == [artifact.digest] * 2
    assert made.plan(uses).applications[0].artifact.digest == other_artifact.digest


def test_a_plan_keeps_its_version_whatever_a_reload_brings(registry, tmp_path, artifact, other_artifact):
    made = registry()
    before = made.plan((OperatorUse("good"),))
    Store(tmp_path).save("good", other_artifact, replace=True)
    made.reload()
    after = made.plan((OperatorUse("good"),))
    Store(tmp_path).delete("good")
    made.reload()
    assert before.applications[0].artifact.digest == artifact.digest
    assert after.applications[0].artifact.digest == other_artifact.digest
    with pytest.raises(UnknownOperatorError):
        made.plan((OperatorUse("good"),))


def test_what_a_request_leaves_open_is_what_the_artifact_recommends(registry):
    (use,) = registry().plan((OperatorUse("good"),)).applications
    assert (use.setting.strength, use.setting.rule, use.setting.blend) == (0.6, "substitute", 0.25)
    assert use.setting.positions == ALL_POSITIONS
    assert use.defaulted == ("strength", "rule", "blend", "positions", "anchor", "first_token")


def test_what_a_request_sets_is_kept_zero_included(registry):
    first = Positions(end=1)
    (use,) = registry().plan((OperatorUse("good", 0.0, "cumulative", 0.0, first, "contrast", "anchor"),)).applications
    assert use.setting == Setting(0.0, "cumulative", 0.0, first, "contrast", "anchor")
    assert use.defaulted == ()
    (use,) = registry().plan((OperatorUse("good", strength=-1.0),)).applications
    assert (use.setting.strength, use.defaulted) == (-1.0, ("rule", "blend", "positions", "anchor", "first_token"))


@pytest.mark.parametrize("text", ["1..", "generated", "prompt:2.."])
def test_an_anchor_at_a_first_token_that_is_not_pushed_is_refused(registry, text):
    positions = Positions.parse(text)
    with pytest.raises(InvalidRequestError, match=f"positions {text} leave the first token out") as caught:
        registry().plan((OperatorUse("good", positions=positions, first_token="anchor"),))
    assert caught.value.field == "operators[0].first_token"
    registry().plan((OperatorUse("good", positions=positions, first_token="operator"),))
    registry().plan((OperatorUse("good", positions=Positions("prompt", 0, 3), first_token="anchor"),))


def test_each_artifact_recommends_for_itself(registry, tmp_path, artifact, remake):
    Store(tmp_path).save("loud", remake(artifact, recommended=Recommended(strength=1.2)))
    uses = registry().plan((OperatorUse("good"), OperatorUse("loud"))).applications
    assert [use.setting.strength for use in uses] == [0.6, 1.2]
    Store(tmp_path).save("early", remake(artifact, recommended=Recommended(positions=Positions(end=1))))
    (use,) = registry().plan((OperatorUse("early"),)).applications
    assert (use.setting.positions, "positions" in use.defaulted) == (Positions(end=1), True)


@pytest.mark.parametrize(
    ("positions", "field"),
    [(Positions(start=-1), "start"), (Positions(start=4, end=4), "end"), (Positions("prompt", end=1 << 31), "end")],
)
def test_a_range_without_a_position_is_refused_by_its_field(registry, positions, field):
    with pytest.raises(InvalidRequestError, match="is accepted") as caught:
        registry().plan((OperatorUse("good"), OperatorUse("good", positions=positions)), field="arms[0].operators")
    assert caught.value.field == f"arms[0].operators[1].positions.{field}"


def test_no_operators_make_no_plan(registry):
    assert registry().plan(()) is None


def test_the_field_of_a_refused_value_is_in_the_callers_words(registry):
    with pytest.raises(InvalidRequestError) as caught:
        registry().plan((OperatorUse("good", blend=2.0),), field="arms[3].operators")
    assert caught.value.field == "arms[3].operators[0].blend"


def test_a_reload_of_an_unchanged_store_keeps_the_very_same_artifacts(registry, tmp_path, artifact, other_artifact):
    Store(tmp_path).save("changing", artifact)
    made = registry()
    before = {entry.name: entry for entry in made.entries()}
    made.reload()
    assert all(entry.artifact is before[entry.name].artifact for entry in made.entries())
    Store(tmp_path).save("changing", other_artifact, replace=True)
    made.reload()
    assert made.entry("good").artifact is before["good"].artifact
    assert made.entry("changing").artifact.digest == other_artifact.digest


@pytest.mark.parametrize("words", ["", "cannot allocate"])
def test_a_file_that_memory_does_not_hold_is_listed_with_a_problem(registry, tmp_path, artifact, monkeypatch, words):
    Store(tmp_path).save("large", artifact)
    load = Store.load

    def exhausted(store, name, **options):
        if name == "large":
            raise MemoryError(words)
        return load(store, name, **options)

    monkeypatch.setattr(Store, "load", exhausted)
    made = registry()
    assert made.entry("large").problem == (words or "MemoryError")
    assert made.entry("good").problem == ""


def test_a_concept_of_tokens_that_the_model_does_not_have_is_listed_with_its_problem(
    registry, tmp_path, artifact, remake
):
    size = 320
    ids = artifact.header.concept_ids
    Store(tmp_path).save("outside", remake(artifact, concept_ids=(*ids[:-1], size)))
    Store(tmp_path).save("inside", remake(artifact, concept_ids=(*ids[:-1], size - 1)))
    made = registry()
    assert f"token {size}; the model has {size}" in made.entry("outside").problem
    assert made.entry("inside").problem == ""
    with pytest.raises(OperatorUnusableError):
        made.plan((OperatorUse("outside"),))


def test_a_further_text_of_tokens_that_the_model_does_not_have_is_listed_with_its_problem(
    registry, tmp_path, low_artifact, remake
):
    first, second = low_artifact.header.more_texts
    foreign = second.model_copy(update={"ids": (*second.ids[:-1], 320)})
    Store(tmp_path).save("outside", remake(low_artifact, more_texts=(first, foreign)))
    Store(tmp_path).save("inside", low_artifact)
    made = registry()
    assert "token 320; the model has 320" in made.entry("outside").problem
    assert made.entry("inside").problem == ""


def test_a_problem_is_no_longer_than_a_person_reads(registry, tmp_path, artifact, remake):
    data = save(load_tensors(to_bytes(artifact)), metadata={"format": "x" * (1 << 19)})
    (tmp_path / "talker.safetensors").write_bytes(data)
    problem = registry().entry("talker").problem
    assert "metadata format is 'xxx" in problem
    assert len(problem) < 2000


def test_more_operators_than_are_accepted_are_refused_by_name(registry):
    made = registry()
    assert len(made.plan((OperatorUse("good", 0.125),) * 16).applications) == 16
    with pytest.raises(InvalidRequestError, match="17 operators; at most 16") as caught:
        made.plan((OperatorUse("good"),) * 17, field="arms[1].operators")
    assert caught.value.field == "arms[1].operators"
