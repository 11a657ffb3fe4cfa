"""An operator on the command line: its strength, blend, positions and anchor."""

import pytest
from steer_client import OperatorUse, Positions


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("g", OperatorUse("g")),
        ("g,anchor=contrast", OperatorUse("g", anchor="contrast")),
        (
            "g=0.4@0.5:first,first_token=anchor,anchor=concept",
            OperatorUse("g", 0.4, None, 0.5, Positions(end=1), "concept", "anchor"),
        ),
        ("g=0.4,digest=sha256:ab,anchor=concept", OperatorUse("g", 0.4, anchor="concept", digest="sha256:ab")),
        ("g:generated:1..4,first_token=operator", OperatorUse("g", positions=Positions("generated", 1, 4),
                                                              first_token="operator")),
    ],
)  # fmt: skip
def test_what_is_written_is_read(text, use):
    assert OperatorUse.parse(text) == use


@pytest.mark.parametrize(
    "text",
    [
        "g,",
        "g,anchor",
        "g,anchor=",
        "g,anchor=mean",
        "g,rule=x",
        "g,digest=",
        "g,digest=a,digest=a",
        "g,anchor=contrast,anchor=contrast",
        ",anchor=x",
    ],
)
def test_what_cannot_be_read_is_named_with_what_can(text):
    with pytest.raises(ValueError, match="anchor=contrast\\|concept"):
        OperatorUse.parse(text)
