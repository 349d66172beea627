"""Adapters: what trainers may be given, and what Flow-Factory and verl-omni call."""

from __future__ import annotations

import asyncio
import inspect
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from id_reward import CompositeReward, Faces, IdentityScorer, as_composite
from id_reward.building import build_scorer
from id_reward.examples.adapters import Standin
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward

PEOPLE = np.eye(4)
REFERENCES = [PEOPLE[:1], PEOPLE[1:2]]


def test_a_scorer_is_enough_for_every_adapter() -> None:
    """TRLReward(scorer) died inside the first batch, for want of .totals."""
    scorer = IdentityScorer(Standin())
    for reward in (scorer, CompositeReward({"x": (scorer, 1.0)}), {"x": (scorer, 1.0)}, scorer.__call__):
        assert TRLReward(reward)(prompts=["x"], completions=[PEOPLE[:1]], references=[REFERENCES]) == [0.5]
        scores, _ = FlowGRPOReward(reward)([PEOPLE[:1]], ["x"], [{"references": REFERENCES}])
        assert scores["avg"] == [0.5]
        assert VerlOmniReward(reward)("", PEOPLE[:1], "x", {"references": REFERENCES})["score"] == 0.5


@pytest.mark.parametrize(("given", "words"), [
    (Standin(), r"is a face backend: IdentityScorer\(Standin\(\)\) makes a scorer of it"), (IdentityScorer, "is a class: give an object"),
    (lambda prompts, completions: 1, "cannot be called with three arguments"), (3, "cannot be called"), (None, "cannot be called"),
    ("identity", "cannot be called"), ({"x": 1}, "parts must map names"),
])  # fmt: skip
def test_what_is_no_reward_is_told_what_it_could_be(given, words) -> None:
    for adapter in (TRLReward, FlowGRPOReward, VerlOmniReward):
        with pytest.raises(ValueError, match=words) as caught:
            adapter(given)
        assert "\n" not in str(caught.value)


def test_options_that_build_a_scorer_are_all_known(monkeypatch) -> None:
    import id_reward.backends.faces

    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(
        id_reward.backends.faces, "get_face_backend", lambda name, **o: asked.append((name, o)) or Standin()
    )
    reward = build_scorer(
        {"backend": "dlib", "threshold": 0.1, "missing_penalty": 0.5, "no_face": "error", "model": None}
    )
    assert asked == [("dlib", {"threshold": 0.1})]
    identity = reward.parts["identity"][0]
    assert isinstance(identity, IdentityScorer) and identity.missing_penalty == 0.5 and identity.no_face == "error"
    for wrong, words in (
        ({"missing_penality": 1}, "must be among .*missing_penalty.*, got missing_penality"),
        ({"missing_penalty": -1}, "missing_penalty must be"), ({"model": "x"}, "model needs the backend insightface"),
        ({"convention": "best"}, "convention must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            build_scorer(wrong)


STAND_IN = '''
"""The interface that Flow-Factory gives to reward models."""
from dataclasses import dataclass
from typing import Any

@dataclass
class RewardModelOutput:
    rewards: Any
    extra_info: Any = None

class PointwiseRewardModel:
    def __init__(self, config, accelerator):
        self.config, self.accelerator, self.device, self.model = config, accelerator, "cpu", None
'''


@pytest.fixture
def flow_factory(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """The module with a stand-in for Flow-Factory, as it is loaded by the path in a configuration."""
    pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    package = tmp_path / "flow_factory" / "rewards"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "abc.py").write_text(STAND_IN)
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(
        """
        from id_reward import CompositeReward, IdentityScorer
        from id_reward.examples.adapters import Standin

        def build(missing_penalty=0.0, how=None):
            scorer = IdentityScorer(Standin(), missing_penalty=missing_penalty)
            return CompositeReward({"identity": (scorer, 1.0)}, normalization={"identity": how} if how else None)
        """
    ))  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("flow_factory", "my_rewards", "id_reward.integrations.flow_factory")
    known = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(names)}
    import id_reward.integrations.flow_factory as module

    yield module
    for name in list(sys.modules):
        if name.startswith(names):
            del sys.modules[name]
    sys.modules.update(known)


def config(**extra):  # type: ignore[no-untyped-def]
    return SimpleNamespace(batch_size=16, extra_kwargs=extra)


def test_flow_factory(flow_factory) -> None:
    import torch

    model = flow_factory.IdentityRewardModel(
        config(scorer="my_rewards:build", missing_penalty=0.5, missing_score=-1.0), SimpleNamespace()
    )
    accepted = inspect.signature(model.__call__).parameters  # Flow-Factory passes what the signature names
    assert (
        list(accepted)
        == ["prompt", "image", "condition_images"]
        == [*model.required_fields[:2], model.required_fields[2]]
    )
    pictures = [PEOPLE[:2], PEOPLE[:1], np.full((1, 4), np.nan)]
    found = model(prompt=["x"] * 3, image=pictures, condition_images=[REFERENCES] * 3)
    assert found.rewards.dtype == torch.float32
    np.testing.assert_allclose(found.rewards, [1, 0.25, -1])
    assert torch.isnan(found.extra_info["identity"]).tolist() == [False, False, True]
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="got no condition_images"):
        model(prompt=["x"], image=pictures[:1])
    for wrong, words in (
        ({"scorer": "my_rewards:build", "how": "batch"}, "must be normalised by"), ({"missing_penality": 1}, "got missing_penality"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            flow_factory.IdentityRewardModel(config(**wrong), SimpleNamespace())


def test_without_flow_factory_the_pip_line_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    monkeypatch.delitem(sys.modules, "id_reward.integrations.flow_factory", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        import id_reward.integrations.flow_factory  # noqa: F401


class Frames:
    """One face in each picture: the person of its first pixel's level."""

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        from id_reward.images import as_array

        levels = [int(as_array(i)[0, 0, 0]) for i in images]
        return [Faces(np.array([[0.0, 0, 1, 1]]), np.ones(1), PEOPLE[level : level + 1]) for level in levels]


def frames() -> CompositeReward:
    """For verl-omni's `scorer` option."""
    return as_composite(IdentityScorer(Frames()), "identity")


@pytest.fixture
def own_name(monkeypatch) -> str:
    """This module under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "test_id_reward_integrations_here", sys.modules[__name__])
    return "test_id_reward_integrations_here:frames"


def picture(level: int):  # type: ignore[no-untyped-def]
    return pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it").full(
        (3, 4, 4),
        level,
        dtype=pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it").uint8,
    )


def test_verl_omni(own_name, tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    pytest.importorskip("PIL", reason="needs id-reward[image]")
    from id_reward.integrations.verl_omni import compute_score
    from PIL import Image

    for level in (0, 1):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / f"{level}.png")
    info = {"references": np.array([str(tmp_path / "0.png"), str(tmp_path / "1.png")], object), "num_turns": None}
    one = {"data_source": "d", "solution_image": picture(0), "ground_truth": "x", "extra_info": info}
    router = {"reward_router_address": "a:1", "reward_model_tokenizer": None, "model_name": "m"}
    assert compute_score(**one, **router, scorer=own_name) == {"score": 0.5, "identity": 0.5}
    info["references"] = [{"bytes": (tmp_path / "1.png").read_bytes(), "path": None}]  # as parquet keeps pictures
    assert compute_score(**one, scorer=own_name)["score"] == 0
    video = torch.stack([picture(1), picture(0), picture(1), picture(1)])
    assert compute_score(**{**one, "solution_image": video}, scorer=own_name)["score"] == 0.75
    with pytest.raises(ValueError, match="extra_info must hold 'references'"):
        compute_score("d", picture(0), "x", {}, scorer=own_name)
    # MultiVisualRewardManager passes on what the signature names, so everything must be named
    kinds = {p.kind for p in inspect.signature(compute_score).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_verl_omni_by_a_server(own_name, tmp_path) -> None:
    pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    pytest.importorskip("PIL", reason="needs id-reward[image]")
    from id_reward.integrations.verl_omni import compute_score_http
    from id_reward.serving import ScorerServer
    from PIL import Image

    Image.new("RGB", (4, 4), (1, 1, 1)).save(tmp_path / "1.png")
    assert inspect.iscoroutinefunction(compute_score_http)

    async def many(url: str) -> list[float]:
        calls = [
            compute_score_http("d", picture(level), "x", {"references": [tmp_path / "1.png"]}, server_url=url)
            for level in (0, 1, 0, 1)
        ]
        return [found["score"] for found in await asyncio.gather(*calls)]

    with ScorerServer.of_scorer(frames(), max_wait=0.2) as server:
        assert asyncio.run(many(server.url)) == [0, 1, 0, 1]
        assert server.engine.metrics.get("batches") < 4  # they were scored together
