"""Two processes (torchrun, gloo) equal one: advantages, clip range, dropped groups, gradients."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("gspo_ranks_worker.py")


@pytest.fixture(scope="module")
def worker():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("gspo_ranks_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.parametrize("name", ["uneven/own", "uneven/ddp", "one rank without signal/own"])
def test_two_processes_equal_one(ranks: list, worker, name: str) -> None:  # type: ignore[no-untyped-def]
    split = worker.SPLITS[name.split("/")[0]]
    if split[0] == 4:  # the same groups and rewards as the ranks had, in one process
        alone = run_alone_with_the_ranks_groups(worker)
    else:
        alone = worker.run(0, [12], False)
    for rank, result in enumerate(ranks):
        got = {k.removeprefix(f"{name}/"): v for k, v in result.items() if k.startswith(f"{name}/")}
        rows = torch.arange(12).split(split)[rank]
        torch.testing.assert_close(got["advantages"], alone["advantages"][rows], equal_nan=True)
        torch.testing.assert_close(got["weight"], alone["weight"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got["clip_range"], alone["clip_range"], rtol=1e-4, atol=0)
        assert got["num_samples"] == alone["num_samples"]
        assert got["counted"].tolist() == alone["counted"].tolist()
    start = worker.build()[0].weight
    assert (alone["weight"] - start).abs().max() > 1e-3


def run_alone_with_the_ranks_groups(worker) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]

    layer, drawn, rewards, _ = worker.build()
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    rewards[:4] = 1.0
    original = worker.build
    worker.build = lambda: (layer, drawn, rewards, ids)
    try:
        return worker.run(0, [12], False)
    finally:
        worker.build = original


def test_ranks_number_their_own_groups(ranks: list) -> None:
    """Rewards of the two ranks differ by 100: had their groups been merged, one rank's advantages would all have one sign."""
    for result in ranks:
        groups, largest = result["step"].tolist()
        assert groups == 2 + 3 and 0.9 < largest <= 1.0


def test_functions_are_local_unless_they_are_given_a_group(ranks: list) -> None:
    for rank, result in enumerate(ranks):
        assert result["local"][:4].tolist() == [-1, 1, -1, 1]
        assert result["local"][4:7].tolist() == [1, 0, 0]
        assert float(result["local"][7]) == pytest.approx(0.15 + rank, abs=1e-5)


@pytest.mark.parametrize("name", ["whole groups", "cut groups"])
def test_a_batch_that_ranks_share_is_the_batch_of_one_process(ranks: list, worker, name: str) -> None:  # type: ignore[no-untyped-def]
    """Rollouts, rewards by name with gaps, advantages, clip ranges, updates, and what is logged."""
    alone = worker.split(*worker.SPLIT_BATCHES[name])
    for result in ranks:
        for key, value in alone.items():
            torch.testing.assert_close(result[f"{name}/{key}"], value, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert torch.equal(ranks[0][f"{name}/generator"], alone["generator"]), "generators move on alike"


def test_what_breaks_on_one_rank_is_skipped_or_left_out_on_all(ranks: list) -> None:
    for name in ("one broken", "one judge"):
        first, second = ({k: v for k, v in r.items() if k.startswith(name)} for r in ranks)
        assert all(torch.equal(first[k].nan_to_num(), second[k].nan_to_num()) for k in first), name
    skipped = [bool(ranks[0][f"one broken/{step}.skipped"]) for step in range(3)]
    assert skipped == [False, True, False] and ranks[0]["one broken/1.broken_velocities"] > 0
    assert ranks[0]["one judge/1.invalid_rewards"] == 8 and not ranks[0]["one judge/1.skipped"]


def test_ranks_that_hold_different_batches_are_told(ranks: list) -> None:
    assert all(bool(result["disagree"]) for result in ranks)
