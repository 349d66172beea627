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


def test_jpeg_example_needs_nothing_but_its_extras(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("diffusers", "peft"):
        pytest.importorskip(name, reason="needs gspo[diffusers]")
    from gspo.examples import flux_jpeg

    monkeypatch.setitem(sys.modules, "multicrafter", None)
    run = flux_jpeg.train(flux_jpeg.load(None, teaching_steps=1), iterations=1, num_steps=4, group_size=2, size=8)
    assert run.reports[0].summary()["grad_norm"] > 0
    assert len(run.before) == len(run.after) == 2 and run.before[0].size == (8, 8)
    pytest.importorskip("matplotlib", reason="needs gspo[plot]")
    flux_jpeg.save(tmp_path / "f.png", run)


def test_stripes_are_packed_as_flux_packs() -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs gspo[diffusers]")
    from gspo.examples.tiny_flux import striped_latents

    packed = striped_latents(2, 4, torch.Generator().manual_seed(0))
    picture = diffusers.FluxPipeline._unpack_latents(packed, 32, 32, 4)
    assert picture.shape == (2, 4, 8, 8)
    again = diffusers.FluxPipeline._pack_latents(picture, 2, 4, 8, 8)
    torch.testing.assert_close(again, packed)
    # a wave is the same in channels 0 and 2, up to their colours
    torch.testing.assert_close(
        picture[:, 0] - picture[:, 0].mean((1, 2), keepdim=True),
        picture[:, 2] - picture[:, 2].mean((1, 2), keepdim=True),
    )


@pytest.mark.slow
def test_tiny_flux_learns_to_compress(capsys) -> None:  # type: ignore[no-untyped-def]
    for name in ("diffusers", "peft"):
        pytest.importorskip(name, reason="needs gspo[diffusers]")
    from gspo.examples import flux_jpeg

    assert flux_jpeg.main(["--iterations", "12"]) == 0
    words = capsys.readouterr().out.split()
    first, last = (float(words[words.index(word) - 3]) for word in ("first,", "last"))
    assert last < first - 0.02
    with pytest.raises(SystemExit) as stop:
        flux_jpeg.main(["--model", "/nowhere"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_teaching_lowers_the_loss() -> None:
    for name in ("diffusers", "peft"):
        pytest.importorskip(name, reason="needs gspo[diffusers]")
    from gspo.examples.flux_jpeg import PROMPTS
    from gspo.examples.tiny_flux import teach, tiny_flux

    losses = teach(tiny_flux(PROMPTS), steps=60)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
