import os

import pytest


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("STEER_"):
            monkeypatch.delenv(name)
