"""Plain LoRAs in place of mixtures: the closed form is the best one, one expert is itself, and what is lost is said first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter import UserError, load_into
from multicrafter.cli import main
from multicrafter.models import export
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.fitting import applied, best_expert, distil, plain_of, reduced_rank_regression
from multicrafter.models.flux.model import Text
from multicrafter.pipeline import load_flux
from multicrafter.scoring.export_loss import LossConfig, plain_loras
from multicrafter.world import shipped_adapter
from multicrafter.world.tiny_backbones import TINY, tiny_qwen
from multicrafter.world.tiny_flux import TinyFluxConfig

SMALL = TinyFluxConfig(num_heads=2, head_dim=16, num_double=2, num_single=1, vae_channels=(8, 8, 8), text_width=16)


@torch.no_grad()
def mixed(name: str, **options: Any) -> tuple[Any, Adapters]:
    """A tiny pipeline whose every weight matters, and an adapter with experts on it that does something."""
    pipe = TINY[name](SMALL) if name.startswith("flux1") else TINY[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in pipe.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapters = Adapters(pipe.transformer, AdapterConfig(**{"rank": 2, "alpha": 3.0, "num_experts": 3, **options}))
    for parameter in adapters.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return pipe, adapters


def velocity(pipe: Any, adapters: Adapters, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    width, like = pipe.transformer.config.in_channels, adapters.backbone.empty_text(pipe.transformer, 4, 6)
    text = Text(
        torch.randn(like.embeds.shape, generator=generator),
        None if like.pooled is None else torch.randn(like.pooled.shape, generator=generator),
    )
    return adapters.backbone.velocity(
        pipe.transformer, torch.randn(4, 64, width, generator=generator), torch.rand(4, generator=generator), text, image_grid=(8, 8),
        references=[torch.randn(4, 16, width, generator=generator)], reference_grids=[(4, 4)], guidance=2.0,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_no_matrix_of_that_rank_is_nearer(inputs, outputs, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, inputs, generator=generator).double()
    y = torch.randn(30, outputs, generator=generator).double()
    (a, b), explained = reduced_rank_regression(x.T @ x, x.T @ y, rank, ridge=1e-12)
    assert len(a) == b.shape[1] == min(rank, inputs, outputs)
    left = float((y - x @ (b @ a).double().T).square().sum())
    assert left == pytest.approx(float(y.square().sum()) - explained, rel=1e-4, abs=1e-4)
    best = torch.linalg.lstsq(x, y).solution  # without a limit on the rank, the textbook's answer
    if rank >= min(inputs, outputs):
        torch.testing.assert_close((b @ a).double(), best.T, atol=1e-4, rtol=1e-4)
    for other in (best, torch.randn(inputs, outputs, generator=generator).double()):  # cut to the rank in another way
        u, s, vh = torch.linalg.svd(other, full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert left <= float((y - x @ cut).square().sum()) * (1 + 1e-4) + 1e-6


def test_tokens_that_are_all_zero_give_a_lora_of_zeros():
    (a, b), explained = reduced_rank_regression(torch.zeros(3, 3).double(), torch.zeros(3, 2).double(), 2)
    assert explained == 0 and not a.any() and not b.any()
    with pytest.raises(ValueError, match="rank must be at least 1"):
        reduced_rank_regression(torch.eye(2).double(), torch.eye(2).double(), 0)


@pytest.mark.parametrize("name", ["flux1_dev", "flux2_klein"])
@pytest.mark.parametrize("way", ["fit", "best-expert"])
@torch.no_grad()
def test_one_expert_on_linears_is_a_lora_exactly(name, way):
    """Both ways must find it, and on tokens that they have not seen."""
    pipe, adapters = mixed(name, num_experts=1, experts_on_linears=True)
    lora = plain_of(adapters, lambda: [velocity(pipe, adapters, seed) for seed in range(20, 50)], way)
    want = velocity(pipe, adapters, seed=8)
    adapters.detach()
    assert float((velocity(pipe, adapters, seed=8) - want).abs().max()) > 0.1
    with applied(pipe.transformer, lora.layers):
        torch.testing.assert_close(velocity(pipe, adapters, seed=8), want, atol=1e-3, rtol=1e-3)
    assert (
        lora.layers.keys() == export.linears(adapters.backbone, {"base": export.fingerprint(pipe.transformer)}).keys()
    )


@torch.no_grad()
def test_the_expert_that_does_the_work_is_kept():
    pipe, adapters = mixed("flux1_dev", gating="topk_then_softmax", experts_on_linears=True)
    for layer in adapters.experts.layers.values():
        layer.lora_b[:2] = 0
    lora = plain_of(adapters, lambda: velocity(pipe, adapters), "best-expert")
    for name, layer in adapters.experts.layers.items():
        torch.testing.assert_close(lora.layers[name].lora_a, layer.lora_a[2])
    assert best_expert([0.0, 0.0], [0.0, 0.0]) == (0, 0.0)
    assert best_expert([2.0, 3.0], [4.0, 3.0]) == (1, 1.0), "not the largest one, but the one that explains most"


@pytest.mark.parametrize("name", ["flux1_dev", "flux2_klein"])
@torch.no_grad()
def test_round_whole_ffns_the_fit_is_nearer_than_one_expert_and_that_than_nothing(name):
    pipe, adapters = mixed(name)

    def run() -> None:
        for seed in range(20, 28):
            velocity(pipe, adapters, seed)

    loras = {way: plain_of(adapters, run, way) for way in ("fit", "best-expert")}
    want = velocity(pipe, adapters)
    state = adapters.state_dict()
    adapters.detach()
    away = {}
    only_attention = {n: lora for n, lora in loras["fit"].layers.items() if n not in _experts(adapters, state, loras)}
    for way, layers in {**{w: lora.layers for w, lora in loras.items()}, "attention alone": only_attention}.items():
        with applied(pipe.transformer, layers):
            away[way] = float((velocity(pipe, adapters) - want).norm())
    assert away["fit"] < away["best-expert"] < away["attention alone"], away
    assert away["fit"] < 0.7 * away["attention alone"], away
    for lora in loras.values():  # every format takes it
        assert all(export.tensors(lora, form) for form in ("diffusers", "peft", "comfyui", "kohya"))


def _experts(adapters: Adapters, state: Any, loras: Any) -> set[str]:
    attention = {re.sub(r"\.lora_A\.default\.weight$", "", k) for k in state if k.endswith("lora_A.default.weight")}
    return loras["fit"].layers.keys() - attention


def test_distilling_brings_the_velocity_nearer():
    pipe, adapters = mixed("flux1_dev")
    lora = plain_of(adapters, lambda: velocity(pipe, adapters), "best-expert")
    with torch.no_grad():
        targets = [velocity(pipe, adapters, seed) for seed in (20, 21)]
    adapters.detach()

    def away(found: export.PlainLoRA) -> float:
        with torch.no_grad(), applied(pipe.transformer, found.layers):
            return float((velocity(pipe, adapters, 20) - targets[0]).norm())

    before = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
    trained = distil(
        pipe.transformer, lora, lambda i: velocity(pipe, adapters, 20 + i), targets, steps=40, learning_rate=3e-3
    )
    assert away(trained) < 0.95 * away(lora)
    assert trained.exactness == {"way": "best-expert", "rank": 2, "distilled_steps": 40}
    assert all(torch.equal(t, before[n]) for n, t in pipe.transformer.state_dict().items()), "the base is left alone"
    assert not any(t.requires_grad for pair in trained.layers.values() for t in pair)


def test_the_loss_of_the_mixture_itself_is_none_and_of_no_adapter_is_one():
    pipe, adapters = mixed("flux1_dev")
    adapters.notes |= {"size": 64, "reference_size": 32, "num_references": 2, "sampling": {"num_steps": 2}}
    before = velocity(pipe, adapters)
    _, losses = plain_loras(pipe, adapters, ["fit"], LossConfig(fit_cases=4, test_cases=3, batch=2))
    assert losses["mixture"][:3] == (0.0, 0.0, 0.0)
    assert losses["base"].of_change == 1.0 and losses["base"].picture > losses["fit"].picture > 0
    assert 0 < losses["fit"].of_change < losses["no experts"].of_change < 1
    assert losses["fit"].identity != losses["fit"].identity, "no judge reads the pictures of an untrained base"
    torch.testing.assert_close(velocity(pipe, adapters), before, msg="the adapter is back on")


def test_what_cannot_be_fitted_is_said():
    pipe, adapters = mixed("flux1_dev")
    with pytest.raises(UserError, match="must show every mixture some tokens"):
        plain_of(adapters, lambda: None, "fit")
    with pytest.raises(UserError, match="must be 'fit' or 'best-expert'"):
        plain_of(adapters, lambda: None, "guess")  # type: ignore[arg-type]
    lora = plain_of(adapters, lambda: velocity(pipe, adapters), "fit")
    with pytest.raises(UserError, match="must have a linear layer"), applied(pipe.transformer, lora.layers):
        pass
    with pytest.raises(UserError, match="fit_cases must be a whole number of at least 1"):
        LossConfig(fit_cases=0)
    with pytest.raises(UserError, match="experts_on_linears must be true or false"):
        AdapterConfig(experts_on_linears="yes")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with experts of the tiny FLUX that ships."""
    pipe = load_flux()
    made, generator = (
        Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2)),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made.save(
        tmp_path_factory.mktemp("mixture") / "adapter",
        num_references=2,
        size=64,
        reference_size=32,
        sampling={"num_steps": 1},
    )


def test_the_command_says_the_loss_before_it_writes(saved, tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    words = ["export", str(saved), "--format", "comfyui", "--out", str(out), "--fit-cases", "1", "--test-cases", "1"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "--lossy must say which loss to take" in said.err and not out.exists()
    rows = dict(re.findall(r"^(\S.*?)  +\S+  +(\S+) ", said.out, re.M))
    assert rows.keys() >= {"mixture", "fit", "best-expert", "no experts", "base"} and float(rows["fit"]) < 1
    assert main([*words, "--lossy", "fit", "--rank", "3", "--distil", "1"]) == 0
    said = capsys.readouterr().out
    assert said.index("fit") < said.index(str(out))
    exactness = export.read_header(out)["exactness"]
    assert exactness["way"] == "fit" and exactness["rank"] == 3 and exactness["distilled_steps"] == 1
    assert 0 < exactness["of_change"] < 1 and 0 <= exactness["identity"] <= 1
    pipe = load_flux()
    load_into(pipe, saved)  # and the mixture itself goes on whole


def test_a_plain_lora_needs_no_loss(tmp_path, capsys):
    words = [
        "export",
        str(shipped_adapter()),
        "--format",
        "kohya",
        "--out",
        str(tmp_path / "x.safetensors"),
    ]
    for more in (["--lossy", "fit"], ["--rank", "3"], ["--distil", "5"]):
        assert main([*words, *more]) == 2
        assert f"{more[0]} is for adapters with experts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_base_without_names_in_comfyui_is_refused_before_anything_is_fitted(tmp_path, capsys, monkeypatch):
    from multicrafter.scoring import export_loss

    monkeypatch.setattr(export_loss, "plain_loras", lambda *_: pytest.fail("it was fitted"))
    pipe = tiny_qwen()
    folder = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2)).save(tmp_path / "adapter")
    words = ["export", str(folder), "--format", "kohya", "--out", str(tmp_path / "x.safetensors"), "--lossy", "fit"]
    assert main(words) == 2
    assert "format must be diffusers, peft or merged for qwen_image_edit" in capsys.readouterr().err
