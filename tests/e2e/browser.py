"""What the tests of the page share: Debian's Chromium without a screen is in ``conftest.py``.

``PAGE_PICTURES=FOLDER`` keeps a picture of each step, to be looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

PICTURES = os.environ.get("PAGE_PICTURES")


def is_complaint(line):
    """Whether a line of the console is one; what the browser says of an answer that is no 200 is expected."""
    return line.type in ("error", "warning") and not line.text.startswith("Failed to load resource")


def picture(page, name):
    """Keeps a picture, where they are asked for."""
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)
