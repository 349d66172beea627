"""Two processes (torchrun, gloo) equal one: objectives, old policy, reward gradients, whitening; without a group nobody talks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("gspo_objective_ranks_worker.py")


@pytest.fixture(scope="module")
def worker():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("gspo_objective_ranks_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(WORKER),
        str(out),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    files = [out / f"rank{rank}.pt" for rank in range(2)]
    assert all(f.exists() for f in files), done.stderr[-3000:]
    return [torch.load(f, weights_only=True) for f in files]


@pytest.mark.parametrize("name", ["nft", "awm"])
@pytest.mark.parametrize("how", ["own", "ddp", "one rank without"])
def test_two_processes_equal_one(ranks: list, worker, name: str, how: str) -> None:  # type: ignore[no-untyped-def]
    alone = worker.run(name, torch.arange(12), None, False, first_missing=how == "one rank without")
    for result in ranks:
        got = {k.removeprefix(f"{how}/{name}/"): v for k, v in result.items() if k.startswith(f"{how}/{name}/")}
        torch.testing.assert_close(got["weight"], alone["weight"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got["old policy"], alone["old policy"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got["norm"], alone["norm"], atol=1e-6, rtol=1e-4)
        assert got["num_samples"] == alone["num_samples"]
    start = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 0.3
    assert (alone["weight"] - start).abs().max() > 1e-3
    assert name == "awm" or (alone["weight"] - alone["old policy"]).abs().max() > 1e-5


def test_reward_gradients_and_whitening_span_the_ranks(ranks: list, worker) -> None:  # type: ignore[no-untyped-def]
    from gspo import whiten

    alone = worker.ascend(torch.arange(12), None)
    advantages = worker.samples()[1]
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["ascend/weight"], alone["weight"], atol=1e-6, rtol=1e-5)
        assert result["ascend/num_samples"] == alone["num_samples"] == 11
        rows = torch.arange(12).split([5, 7])[rank]
        torch.testing.assert_close(result["white"], whiten(advantages)[rows], equal_nan=True)
        torch.testing.assert_close(result["alone"], whiten(advantages[rows]), equal_nan=True)
