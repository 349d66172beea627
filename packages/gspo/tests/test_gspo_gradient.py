"""What other people's loops take: gradients per log-ratio, asymmetric ranges, weights, and who calls backward."""

from __future__ import annotations

import pytest
import torch
from gspo import (
    FlowSDE,
    PolicyConfig,
    PolicyTrainer,
    clipped_surrogate_loss,
    gaussian_log_ratio,
    group_advantages,
    guard_step_weights,
    importance_ratio,
    rollout,
    surrogate_gradient,
)  # fmt: skip

NAN = float("nan")
LINE = torch.linspace(1, 0, 9)
G = torch.Generator().manual_seed(0)
LOG_RATIO = 0.2 * torch.randn(7, 3, generator=G, dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, NAN, 0.0, 3.0, -3.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
OPTIONS = [
    {},
    {"max_advantage": 1.5},
    {"sample_weights": WEIGHTS},
    {"reduction": "sum"},
    {"max_advantage": 2.0, "sample_weights": WEIGHTS, "reduction": "sum"},
]


def by_hand(kind: str, low: float, high: float, step_weights, max_advantage=1e9, sample_weights=None, reduction="mean"):  # type: ignore[no-untyped-def]
    """The closed form, entry by entry."""
    out = torch.zeros_like(LOG_RATIO)
    kept = [i for i in range(7) if not ADVANTAGES[i].isnan()]
    entries = len(kept) * (1 if kind == "sequence" else 3)
    for i in kept:
        gain = max(-max_advantage, min(max_advantage, float(ADVANTAGES[i])))
        weight = 1.0 if sample_weights is None else float(sample_weights[i])
        for t in range(3):
            ratio = float((LOG_RATIO[i].mean() if kind == "sequence" else LOG_RATIO[i, t]).exp())
            clipped = (gain > 0 and ratio > 1 + high) or (gain < 0 and ratio < 1 - low)
            share = 1 / 3 if kind == "sequence" else 1.0 if step_weights is None else float(step_weights[t])
            out[i, t] = 0 if clipped else -weight * gain * ratio * share / (1 if reduction == "sum" else entries)
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("clip_range", [0.1, (0.05, 0.2), (0.3, 0.01)])
@pytest.mark.parametrize("kind", ["sequence", "step", "guarded"])
def test_gradient_per_log_ratio_is_the_closed_form(kind: str, clip_range, options: dict) -> None:  # type: ignore[no-untyped-def]
    steps = None if kind == "sequence" else torch.tensor([1.5, 1.0, 0.5])
    got = surrogate_gradient(LOG_RATIO, ADVANTAGES, clip_range, ratio=kind, step_weights=steps, **options)  # type: ignore[arg-type]
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    want = by_hand(kind, low, high, steps, **options)
    torch.testing.assert_close(got, want)
    assert (want == 0).any() and (want != 0).any()


@pytest.mark.parametrize("kind", ["sequence", "step"])
def test_backward_step_by_step_equals_one_graph(kind: str) -> None:
    """A loop that holds one denoising step's graph at a time."""
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.1 * torch.randn(4, 4, generator=g))
    policy = lambda x, s, i: x @ weight  # noqa: E731
    drawn = rollout(
        policy, torch.randn(3, 4, generator=g), LINE, kernel=FlowSDE(), window=(1, 2, 3), group_size=4, generator=g
    )
    advantages = group_advantages(drawn.latents.sum(1), drawn.index)
    with torch.no_grad():
        weight += 0.05 * torch.randn(4, 4, generator=g)

    def log_ratio(step):  # type: ignore[no-untyped-def]
        velocity = policy(step.latents, torch.full((12,), step.sigma), drawn.index)
        out = FlowSDE().step(step.latents, velocity, step.sigma, step.sigma_next, next_latents=step.next_latents)
        return gaussian_log_ratio(step.next_latents, out.mean, step.mean, out.std)

    everything = torch.stack([log_ratio(step) for step in drawn.trajectory], 1)
    loss = clipped_surrogate_loss(importance_ratio(kind, everything), advantages, (0.01, 0.02)).loss  # type: ignore[arg-type]
    (want,) = torch.autograd.grad(loss, weight)
    slopes = surrogate_gradient(everything.detach(), advantages, (0.01, 0.02), ratio=kind)  # type: ignore[arg-type]
    for t, step in enumerate(drawn.trajectory):
        (slopes[:, t] * log_ratio(step)).sum().backward()
    torch.testing.assert_close(weight.grad, want, atol=1e-7, rtol=1e-5)
    # and the trainer does just that
    mine = want.clone()
    weight.grad = None
    config = PolicyConfig(
        ratio=kind,
        clip_range=(0.01, 0.02),
        num_inner_epochs=1,
        max_grad_norm=1e9,
        off_policy="allow",  # type: ignore[arg-type]
    )
    PolicyTrainer([weight], torch.optim.SGD([weight], lr=0.0), config).update(policy, drawn, advantages)
    torch.testing.assert_close(weight.grad, mine, atol=1e-7, rtol=1e-5)


def test_an_asymmetric_range_by_hand() -> None:
    ratio, gains = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    got = clipped_surrogate_loss(ratio, gains, (0.2, 0.3), reduction="none")
    torch.testing.assert_close(got.loss, torch.tensor([-1.3, 0.8, 1.5, -0.5]))
    assert got.clip_fraction == 0.5
    assert clipped_surrogate_loss(ratio, gains, (0.2, 0.2)) == clipped_surrogate_loss(ratio, gains, 0.2)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_reductions_agree(shape: tuple) -> None:
    g = torch.Generator().manual_seed(1)
    ratio = (1 + 0.3 * torch.randn(shape, generator=g)).requires_grad_()
    gains = torch.tensor([1.0, NAN, -1.0, 0.0, 2.0])
    weights = torch.tensor([1.0, 9.0, 0.5, 1.0, 2.0])
    losses = {
        name: clipped_surrogate_loss(ratio, gains, 0.1, sample_weights=weights, reduction=name).loss  # type: ignore[arg-type]
        for name in ("mean", "sum", "none")
    }
    assert losses["none"].shape == ratio.shape and not losses["none"][1].any()
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])
    torch.testing.assert_close(losses["sum"] / (4 * ratio[0].numel()), losses["mean"])
    gradients = [torch.autograd.grad(x.sum(), ratio, retain_graph=True)[0] for x in (losses["sum"], losses["none"])]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][1].any() and bool(torch.isfinite(gradients[0]).all())
    nothing = clipped_surrogate_loss(ratio, [NAN] * 5, 0.1, reduction="none").loss
    assert nothing.shape == ratio.shape and not nothing.any() and nothing.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_range": (0.1,)}, "clip_range"),
        ({"clip_range": (0.1, 0.0)}, "clip_range"),
        ({"clip_range": (0.1, NAN)}, "clip_range"),
        ({"clip_range": float("inf")}, "clip_range"),
        ({"clip_range": True}, "clip_range"),
        ({"sample_weights": [1.0]}, "sample_weights"),
        ({"sample_weights": [-1.0] * 7}, "sample_weights"),
        ({"sample_weights": [NAN] * 7}, "sample_weights"),
        ({"max_advantage": 0.0}, "max_advantage"),
        ({"reduction": "none"}, "reduction"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            surrogate_gradient(LOG_RATIO, ADVANTAGES, **{"clip_range": 0.1, **options})
        if message == "clip_range":
            with pytest.raises(ValueError, match="clip_range must be a positive number, two of them"):
                PolicyConfig(**options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def trained(**hooks):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.1 * torch.randn(4, 4, generator=g))
    policy = lambda x, s, i: x @ weight  # noqa: E731
    drawn = rollout(
        policy, torch.randn(3, 4, generator=g), LINE, kernel=FlowSDE(), window=(1, 2), group_size=4, generator=g
    )
    options = hooks.pop("config", {})
    given = hooks.pop("given", {})
    trainer = PolicyTrainer(
        [weight], torch.optim.SGD([weight], lr=0.1), PolicyConfig(clip_range=0.01, **options), **hooks
    )
    statistics = trainer.update(policy, drawn, group_advantages(drawn.latents.sum(1), drawn.index), **given)
    return weight, statistics


def test_backward_and_clipping_may_be_the_loops_own() -> None:
    """As accelerator.backward and accelerator.clip_grad_norm_ are."""
    called = []

    def backward(loss: torch.Tensor) -> None:
        called.append("backward")
        loss.backward()

    def clip(parameters, norm):  # type: ignore[no-untyped-def]
        called.append(("clip", norm))
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    want, _ = trained(config={"max_grad_norm": 0.5})
    got, _ = trained(config={"max_grad_norm": 0.5}, backward=backward, clip_grad_norm=clip)
    assert torch.equal(got, want)
    assert called == ["backward", "backward", ("clip", 0.5)] * 2
    # a hook may keep the norm to itself
    _, statistics = trained(clip_grad_norm=lambda p, n: None)
    assert str(statistics.grad_norm) == "nan" and not statistics.skipped


def test_a_loss_scaler_is_told_of_a_step_it_will_skip() -> None:
    """An optimizer that scales losses (accelerate's, in fp16) skips by itself and lowers its scale; it must be called."""
    steps = []

    class Scaled(torch.optim.SGD):
        scaler = object()

        def step(self, closure=None):  # type: ignore[no-untyped-def]
            steps.append(1)

    weight = torch.nn.Parameter(torch.eye(4))
    policy = lambda x, s, i: x @ weight  # noqa: E731
    drawn = rollout(policy, torch.randn(2, 4), LINE, kernel=FlowSDE(), window=(1,), group_size=3)
    trainer = PolicyTrainer(
        [weight],
        Scaled([weight], lr=0.1),
        PolicyConfig(num_inner_epochs=1),
        clip_grad_norm=lambda p, n: torch.tensor(NAN),
    )
    assert trainer.update(policy, drawn, group_advantages(drawn.latents.sum(1), drawn.index)).skipped
    assert steps == [1]


def test_weights_and_advantage_clipping_reach_the_update() -> None:
    plain, _ = trained()
    doubled, _ = trained(given={"sample_weights": [2.0] * 12}, config={"max_grad_norm": 1e9})
    same, _ = trained(given={"sample_weights": [1] * 12})
    assert torch.equal(plain, same) and not torch.allclose(plain, doubled)
    clipped, _ = trained(config={"max_advantage": 0.1})
    assert not torch.allclose(plain, clipped)
    with pytest.raises(ValueError, match=r"sample_weights must be \(b,\) = \(12,\) as the rollout"):
        trained(given={"sample_weights": [1.0]})


def test_the_trainer_calls_the_formulas_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each formula of the paper map is what is trained: change it, and the update changes."""
    import gspo.gradient
    import gspo.passes
    import gspo.ratio
    import gspo.score

    want = {kind: trained(config={"ratio": kind})[0] for kind in ("sequence", "step", "guarded")}

    def differs(module, name: str, kind: str, wrap) -> None:  # type: ignore[no-untyped-def]
        real = getattr(module, name)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, wrap(real))
            assert not torch.equal(trained(config={"ratio": kind})[0], want[kind]), name

    squared = lambda real: lambda *a: real(*a) ** 2  # noqa: E731
    differs(gspo.ratio, "sequence_importance_ratio", "sequence", squared)
    differs(gspo.ratio, "step_importance_ratio", "step", squared)
    differs(gspo.score, "guarded_log_ratio", "guarded", lambda real: lambda *a: 3 * real(*a))
    differs(gspo.score, "gaussian_log_ratio", "sequence", lambda real: lambda *a: 3 * real(*a))
    differs(gspo.gradient, "clipped_surrogate_loss", "sequence", lambda real: lambda r, a, c, **k: real(r, -a, c, **k))
    differs(
        gspo.passes,
        "rescore",
        "sequence",
        lambda real: lambda *a, **k: real(*a, **k)._replace(log_ratio=2 * real(*a, **k).log_ratio),
    )
    monkeypatch.setattr("gspo.batch.guard_step_weights", lambda a, b: 5 * guard_step_weights(a, b))
    assert not torch.equal(trained(config={"ratio": "guarded"})[0], want["guarded"])
