"""Outside the repository, from gspo's source archive alone, nobody else says what the marks mean."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marks."""
    config.addinivalue_line("markers", "slow: takes minutes")
    config.addinivalue_line("markers", "gpu: needs an accelerator")
