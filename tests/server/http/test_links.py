"""Links of the page, which it alone reads."""

import shutil
import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "bench" / "fuzz_links.mjs"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_an_edited_link_is_refused_or_means_what_it_shows():
    done = subprocess.run(["node", FUZZ, "--links", "3000"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
