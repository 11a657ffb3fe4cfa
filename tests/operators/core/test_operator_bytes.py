"""What docs/LARGE.md says an operator takes is what it takes."""

import re
from pathlib import Path

import pytest
import torch

from operators.core.apply import prepare, prepared_bytes
from operators.core.artifact import make_artifact
from operators.core.header import LowRank

PAGE = (Path(__file__).parents[3] / "docs/LARGE.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def operator_bytes():
    """The function of the page."""
    [program] = [
        each for each in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if "def " in each
    ]
    found = {}
    exec(program, found)
    return found["operator_bytes"]


@pytest.fixture(params=[None, 2, 5], ids=["exact", "rank 2", "full rank"])
def rank(request):
    return request.param


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prepared_operator_takes_what_the_formula_says(make_operator, operator_bytes, rank, n, offset, dtype):
    exact = make_operator(n, affine=offset)
    d = exact.header.hidden_size
    header = exact.header.model_copy(update={"dtype": dtype})
    factors, basis = exact.factors, None
    if rank is not None:
        low = LowRank(rank=rank, residuals=(0.5,) * n, weighting="white", oversample=1, power_iterations=0, seed=0)
        header = header.model_copy(update={"low_rank": low})
        factors, basis = exact.factors[:, :rank], torch.eye(d)[:, :rank]
    parts = [factors, exact.anchor, exact.substitute_base, exact.offset, basis]
    kind = getattr(torch, dtype)
    *plain, basis = [None if part is None else part.to(kind) for part in parts]
    artifact = make_artifact(header, *plain, basis=basis)
    assert prepare(artifact, torch.device("cpu")).nbytes == operator_bytes(n, d, rank, offset)
    assert prepared_bytes(artifact) == operator_bytes(n, d, rank, offset)


def test_the_table_of_the_page_follows_from_its_formula(operator_bytes):
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| ([\d.]+) MB \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for n, d, rank, megabytes, count in rows:
        found = operator_bytes(int(n), int(d), None if rank == "exact" else int(rank))
        assert f"{found / 1e6:.1f}" == megabytes
        assert (4 << 30) // found == int(count)
