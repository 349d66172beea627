"""Helpers beside the tests can be imported; outside the repository, from gspo's source archive alone, nobody else says what the marks mean."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Finds the helpers, declares the marks."""
    sys.path.append(str(Path(__file__).parent))
    config.addinivalue_line("markers", "slow: takes minutes")
    config.addinivalue_line("markers", "gpu: needs an accelerator")
