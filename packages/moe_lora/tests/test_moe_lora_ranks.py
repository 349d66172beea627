"""DDP and fully_shard on two gloo processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("moe_lora_ranks_worker.py")
spec = importlib.util.spec_from_file_location("moe_lora_ranks_worker", WORKER)
assert spec is not None and spec.loader is not None
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
lacks = worker.sharding_lacks()
needs_sharding = pytest.mark.skipif(lacks is not None, reason=str(lacks))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
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
    two = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with torch.random.fork_rng():
        net, handle = worker.build()
        worker.two_steps(net, handle, worker.batch(None), 0.0)
    handle.save(out / "one")
    log, _ = two.communicate(timeout=300)
    # ranks sometimes abort at exit after finishing: what counts are the files
    assert (out / "done.1").exists() and (out / "done.0").exists(), log
    return out


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=needs_sharding)])
def test_two_processes_train_as_one(results: Path, how: str) -> None:
    one, two = (load_file(results / name / "moe_lora.safetensors") for name in ("one", how))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddp", "ddp_aux"])
def test_ranks_stay_equal(results: Path, name: str) -> None:
    first, second = (load_file(results / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    if name == "ddp_aux":
        plain = load_file(results / "ddp.0.safetensors")
        assert not torch.equal(first["0.router.weight"], plain["0.router.weight"])


@needs_sharding
def test_files_go_into_a_sharded_model(results: Path) -> None:
    saved = load_file(results / "fsdp" / "moe_lora.safetensors")
    for rank in (0, 1):
        assert all(torch.equal(t, saved[k]) for k, t in load_file(results / f"reloaded.{rank}.safetensors").items())
        outputs = load_file(results / f"outputs.{rank}.safetensors")
        torch.testing.assert_close(outputs["out"], outputs["want"])
