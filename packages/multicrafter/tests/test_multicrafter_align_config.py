"""Stage 2's configuration nests gspo's; what earlier versions wrote flat still loads, goes on, and says that it moved."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import hypothesis
import pytest
from gspo import KERNELS, DanceSDE, FlowCPS, FlowSDE, OnlineConfig, PolicyConfig, SlidingWindow
from hypothesis import given
from hypothesis import strategies as st
from multicrafter import UserError
from multicrafter.config import recipes, settings
from multicrafter.config.recipes import Stage2
from multicrafter.training.align_config import MOVED, AlignConfig, modern, online_defaults
from multicrafter.training.runs import _check_resume

FLAT = {
    "num_sampling_steps": 9, "window_size": 3, "window_interval": 7, "kernel": "flow_cps", "noise_level": 0.6, "group_size": 5,
    "tail_steps": 4, "policy": PolicyConfig(kl_coef=0.1), "seed": 11,
}  # fmt: skip
NESTED = OnlineConfig(
    window=SlidingWindow(9, size=3, interval=7), kernel=FlowCPS(0.6), group_size=5, tail_steps=4,
    policy=PolicyConfig(kl_coef=0.1), seed=11,
)  # fmt: skip

OLD_FILE = """
model: {path: null, backbone: flux1_dev, text_tokens: 16}
align:
  num_steps: 40  # ours
  prompts: 8  # ours
  group_size: 8  # ours
  num_sampling_steps: 16  # paper
  window_size: 2  # paper
  window_interval: 4  # ours
  tail_steps: 5  # ours
  kernel: flow_sde  # ours
  noise_level: 0.7  # ours
  guidance: 2.5  # ours
  lr: 0.0003  # ours
  schedule: {warmup_steps: 5, decay: constant}
  adamw: {betas: [0.9, 0.99], eps: 1.0e-08, weight_decay: 0.0}
  seed: 3  # ours
  policy: {ratio: sequence, clip_range: auto, num_inner_epochs: 2, max_grad_norm: 1.0, micro_batch_size: null}
"""
"""What version 0.1 wrote for `tiny_stage2` with seed 3 (its last parts left out)."""


def old_names(config: AlignConfig) -> dict:
    """The plain data that version 0.1 wrote for a configuration that it could say."""
    flat = json.loads(json.dumps(asdict(config)))
    online = flat.pop("online")
    window, kernel = online["window"], online["kernel"]
    return {
        **flat, "num_sampling_steps": window["num_steps"], "window_size": window["size"], "window_interval": window["interval"],
        "kernel": kernel["kind"], "noise_level": kernel["noise_level"],
        **{name: online[name] for name in ("group_size", "tail_steps", "policy", "seed")},
    }  # fmt: skip


def test_the_flat_names_of_before_make_the_same_configuration_and_say_so():
    with pytest.warns(DeprecationWarning, match=r"AlignConfig.\w+ is now AlignConfig.online.*; the old name") as said:
        made = AlignConfig(prompts=2, **FLAT)
    words = [str(warning.message) for warning in said]
    assert len(words) == len(FLAT) and any(
        "AlignConfig.kernel is now AlignConfig.online.kernel.kind;" in w for w in words
    )
    assert made == AlignConfig(prompts=2, online=NESTED)
    assert MOVED.keys() == FLAT.keys()
    for name, value in FLAT.items():
        with pytest.warns(DeprecationWarning, match=rf"AlignConfig.{name} is now"):
            assert getattr(made, name) == value
        with pytest.warns(DeprecationWarning, match=rf"AlignConfig.{name} is now"):
            assert replace(made, **{name: value}) == made, "and dataclasses.replace takes it"
    with pytest.warns(DeprecationWarning, match="kernel"), pytest.raises(UserError, match="kernel must be one of"):
        AlignConfig(kernel="x")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = made.nothing


configs = st.builds(
    AlignConfig,
    prompts=st.integers(1, 9),
    online=st.builds(
        OnlineConfig,
        window=st.builds(SlidingWindow, st.integers(4, 30), size=st.integers(1, 3), interval=st.integers(1, 99)),
        kernel=st.builds(FlowSDE, st.floats(0.1, 2)) | st.builds(FlowCPS, st.floats(0.1, 1)),
        group_size=st.integers(2, 9), tail_steps=st.none() | st.integers(1, 9), seed=st.integers(0, 10**6),
        policy=st.builds(PolicyConfig, ratio=st.sampled_from(["sequence", "step"]), clip_range=st.just("auto") | st.floats(1e-6, 1)),
    ),
)  # fmt: skip


@hypothesis.settings(deadline=None)
@given(configs)
def test_what_was_written_flat_or_nested_is_read_as_the_same(config):
    assert settings.from_dict(AlignConfig, settings.to_dict(config)) == config
    assert settings.from_dict(AlignConfig, old_names(config)) == config
    assert modern(settings.to_dict(config)) == settings.to_dict(config), "nothing is to be done to what is new"


def test_a_recipe_of_version_0_1_runs_as_it_did(tmp_path):
    (tmp_path / "recipe.yaml").write_text(OLD_FILE)
    assert recipes.resolve(config=tmp_path / "recipe.yaml").align == AlignConfig(online=online_defaults(seed=3))
    (tmp_path / "part.yaml").write_text("align: {group_size: 4}")
    (tmp_path / "new.yaml").write_text("align: {online: {group_size: 4, window: {size: 3}}}")
    part, new = (recipes.resolve(config=tmp_path / name).align for name in ("part.yaml", "new.yaml"))
    assert part.online == replace(online_defaults(), group_size=4), "what is left out is as it is in AlignConfig"
    assert new.online == replace(part.online, window=SlidingWindow(16, size=3, interval=4))


@pytest.mark.parametrize("short", [False, True])
def test_set_takes_the_names_of_before(short):
    changes = [
        f"{'' if short else 'align.'}{name}={value}" for name, value in FLAT.items() if name not in ("policy", "kernel")
    ]
    run = settings.override(Stage2(), [*changes, "align.kernel=flow_cps", "align.policy.kl_coef=0.1"])
    assert run.align.online == NESTED
    run = settings.override(Stage2(), ["kernel={kind: dance_sde, eta: 0.2}", "window.strategy=random"])
    assert run.align.online.kernel == DanceSDE(0.2) and run.align.online.window.strategy == "random"
    assert settings.override(Stage2(), ["online.kernel=flow_cps"]).align.online.kernel == FlowCPS()
    for wrong, words in (
        ("kernel=x", "align.online.kernel.kind must be one of flow_sde, flow_cps, dance_sde, got 'x'"),
        ("align.online.kernel.eta=1", "must name a value"),
        ("align.online.group_size=1", "align.online: group_size must be at least 2"),
        ("align.online=3", "align.online must be a mapping, got 3"),
        ("align.online.reward_weights={a: 1}", "reward_weights must be empty"),
        ("align.online.reward_weights={a: x}", "reward_weights.a must be float"),
    ):
        with pytest.raises(UserError, match=words):
            settings.override(Stage2(), [wrong])


def test_old_and_new_names_that_do_not_fit_together_are_refused():
    with pytest.raises(UserError, match=r"online.window must be a mapping, got 3"):
        settings.from_dict(AlignConfig, {"online": {"window": 3}, "window_size": 2})
    with pytest.raises(UserError, match=r"online.window must be a mapping, got 3"):
        settings.from_dict(AlignConfig, {"online": {"window": 3}})


def test_every_kernel_says_its_name_in_plain_data():
    for kind, cls in KERNELS.items():
        config = AlignConfig(online=replace(NESTED, kernel=cls()))
        assert asdict(config)["online"]["kernel"]["kind"] == kind
        assert settings.from_dict(AlignConfig, settings.to_dict(config)) == config


def test_a_run_of_version_0_1_goes_on_and_under_another_group_size_it_does_not(tmp_path):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    config = AlignConfig(online=NESTED)
    (tmp_path / "config.json").write_text(json.dumps(old_names(config)))
    _check_resume(tmp_path, config, True)
    for other, name in (
        (replace(NESTED, group_size=6), "online.group_size"),
        (replace(NESTED, kernel=FlowSDE(0.6)), "online.kernel.kind"),
        (replace(NESTED, policy=PolicyConfig()), "online.policy.kl_coef"),
    ):
        with pytest.raises(UserError, match=f"but {name} changed"):
            _check_resume(tmp_path, replace(config, online=other), True)
