"""What the tests share; outside the repository, from the source archive alone, nobody else says what the marks mean."""

import sys
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Helpers beside the tests can be imported; marks; an old name fails a test that does not expect it, as by the root's settings."""
    sys.path.append(str(Path(__file__).parent))
    config.addinivalue_line("markers", "slow: takes minutes")
    config.addinivalue_line("markers", "gpu: needs an accelerator")
    config.addinivalue_line("filterwarnings", "error:.*the old name leaves with multicrafter :DeprecationWarning")


@pytest.fixture
def seed_torch():
    torch.manual_seed(0)


@pytest.fixture
def pipe():
    """A fresh, untrained FLUX of the smallest size; its zero-initialised output layer is filled so that everything matters."""
    from multicrafter.world.tiny_flux import build_pipeline
    from multicrafter_tiny import CONFIG, filled

    return filled(build_pipeline(CONFIG))


@pytest.fixture
def scenes(pipe):
    from multicrafter.training.scenes import encode_scenes
    from multicrafter.world import WorldConfig

    return encode_scenes(pipe, WorldConfig(numbers=(2,), shared_attributes=4), 12, seed=3)
