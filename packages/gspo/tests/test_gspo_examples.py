from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gspo.examples import pointmass


def test_pointmass_moves_to_the_target(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib", reason="needs gspo[plot]")
    picture = tmp_path / "p.png"
    assert pointmass.main(["--iterations", "30", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    words = capsys.readouterr().out.split()
    before, after = (float(words[words.index(w) - 1]) for w in ("before,", "after"))
    assert after > 0.6 * before


@pytest.mark.parametrize("kernel", ["flow_cps", "dance_sde"])
def test_pointmass_with_other_kernels(kernel: str) -> None:
    run = pointmass.train(kernel=pointmass.KERNELS[kernel], iterations=30)
    rewards = [r.summary()["reward"] for r in run.reports]
    assert rewards[-1] > 0.7 * rewards[0]


def test_pointmass_is_seeded() -> None:
    one, two, other = (pointmass.train(iterations=2, seed=seed).reports[-1].rewards for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "arguments", [["--iterations", "0"], ["--kernel", "x"], ["--iterations", "1", "--out", "/nowhere/p.png"]]
)
def test_wrong_arguments_end_with_code_2(arguments: list[str], capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        pointmass.main(arguments)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_core_imports_nothing_heavy() -> None:
    """What makes an import slow is another library: none comes with gspo but torch's and jaxtyping's own."""
    code = "import sys, torch, jaxtyping; before = set(sys.modules); import gspo; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torchs_own = {"torch", "sympy", "mpmath"}  # which torch 2.6 loads late
    assert set(done.stdout.split()) - sys.stdlib_module_names <= {"gspo", *torchs_own}


@pytest.mark.slow
def test_tiny_flux_learns_to_compress(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("multicrafter")
    from gspo.examples import flux_jpeg

    pipe = flux_jpeg.load(None)
    run = flux_jpeg.train(pipe, iterations=10)
    rewards = [r.summary()["reward"] for r in run.reports]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    flux_jpeg.save(tmp_path / "f.png", run)
    with pytest.raises(SystemExit) as stop:
        flux_jpeg.main(["--model", "/nowhere"])
    assert stop.value.code == 2
