"""What strangers handed over and what came of it: each of these was a wrong number without a word or a traceback once."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import pytest
import torch
from idar import (
    SubjectLayout,
    attention_owners,
    box_masks,
    idar_loss,
    leakage,
    map_boxes,
    map_iou,
    map_overlap,
    normalize_maps,
    owner_masks,
    separate_attention,
    sigma_weight,
    stratified_subset,
    subject_attention,
    token_masks,
)
from torch import nn

np = pytest.importorskip("numpy", reason="needs idar[diffusers]")

NAN, INF = math.nan, math.inf
LAYOUT = SubjectLayout.in_order(2, 4, [2, 1])
MASKS = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 0]]])
X = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def without_shape_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape hook would catch wrong kinds before the package does; here the package must."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Joint(nn.Module):
    """Attention of a sequence to itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def passed(masks: Any = MASKS, model: Any = None, **options: Any) -> torch.Tensor:
    model = nn.Sequential(Joint()) if model is None else model
    modules = options.pop("modules", {"joint": model[0]} if isinstance(model, nn.Module) else {})
    with separate_attention(model, modules, options.pop("layout", LAYOUT), masks, **options):
        output: torch.Tensor = model(X)
    return output


def test_a_strength_that_is_changed_in_place_counts() -> None:
    """The bias of the pass before was used again."""
    model, strength, results = nn.Sequential(Joint()), torch.ones(1), []
    with separate_attention(model, {"joint": model[0]}, LAYOUT, MASKS, strength=strength):
        for value in (1.0, 0.0, 0.5):
            strength.fill_(value)
            results.append(model(X))
    for found, value in zip(results, (1.0, 0.0, 0.5), strict=True):
        torch.testing.assert_close(found, passed(strength=value))


@pytest.mark.parametrize("masks", [MASKS.numpy(), MASKS.tolist(), lambda q, k, _: MASKS.numpy()])
def test_masks_in_arrays_and_lists(masks: Any) -> None:
    torch.testing.assert_close(passed(masks), passed())


@pytest.mark.parametrize(
    "options", [{"strength": np.float32(1)}, {"heads": [np.int64(0), torch.tensor(1)]}, {"heads": (i for i in (0, 1))}]
)
def test_numbers_of_numpy_and_torch(options: dict[str, Any]) -> None:
    torch.testing.assert_close(passed(**options), passed())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": "masks"}, "masks must be a tensor"), ({"masks": MASKS.to_sparse()}, "dense tensor"),
        ({"masks": MASKS.to("meta")}, "with values"),
        ({"masks": lambda q, k, _: None}, "a router must return masks"), ({"strength": "1"}, "strength must be a number"),
        ({"strength": None}, "strength must be a number"), ({"strength": [1.0]}, "strength must be a number"),
        ({"heads": [0.0]}, "heads must be"),
        ({"heads": "0"}, "heads must be"), ({"heads": 0}, "heads must be"), ({"heads": [True]}, "heads must be"),
        ({"heads": [NAN]}, "heads must"),
        ({"arrows": None}, "arrows must be"), ({"arrows": "image_to_reference"}, "arrows must be"), ({"arrows": [1]}, "arrows must be"),
        ({"background": "some"}, "background must be"), ({"background": "some", "masks": None}, "background must be"),
        ({"layout": "first"}, "layout must be"), ({"layout": [1], "masks": None}, "layout must be"), ({"strength": True}, "strength must be"),
        ({"layout": None}, "layout must be"), ({"modules": {}}, "modules must hold"),
        ({"model": 3}, "model must be a module"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        passed(**options)


@pytest.mark.parametrize("counts", [(2, 4.5, [1]), (2, 4, 3), ("2", 4, [1])])
def test_layouts_are_of_whole_tokens(counts: Any) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        SubjectLayout.in_order(*counts)
    with pytest.raises(ValueError, match=r"whole numbers of tokens, got 6\.5"):
        SubjectLayout(num_text=2, image_span=(2, 6.5), subject_spans=((7, 8),))  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(2,), (2, 2, 2), (2.5, 2), ("a", 2), None, (NAN, 2), 2])
def test_grids_are_of_whole_tokens(grid: Any) -> None:
    """(2.5, 2) gave six tokens."""
    for call in (
        lambda: token_masks(torch.ones(1, 1, 4, 4), grid),
        lambda: box_masks(torch.zeros(1, 1, 4), grid, (4, 4)),
    ):
        with pytest.raises(ValueError, match="grid must be positive"):
            call()


MAPS = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: token_masks(np.ones((1, 1, 4, 4)), (2, 2)), "masks must be a torch tensor, got ndarray"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4) + 0j, (2, 2)), "real"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4), (2, 2), padding=(NAN, 0, 0, 0)), "padding must be"),
        (lambda: owner_masks(torch.zeros(1, 0, 4)), "coverage must be"), (lambda: owner_masks(MAPS, threshold=INF), "threshold must be"),
        (lambda: owner_masks(MAPS, threshold="a"), "threshold must be"),
        (lambda: box_masks(torch.tensor([[[-INF, 0, INF, 4.0]]]), (2, 2), (4, 4)), "boxes must be finite"),
        (lambda: box_masks(torch.zeros(1, 1, 4), (2, 2), (NAN, 4)), "size must be positive"),
        (lambda: box_masks([[[0, 0, 1, 1]]], (2, 2), (4, 4)), "boxes must be a torch tensor"),
        (lambda: idar_loss(-MAPS, MASKS), "maps must be at least 0"), (lambda: idar_loss(MAPS, MASKS.numpy()), "masks must be a torch tensor"),
        (lambda: idar_loss(MAPS, MASKS, weight=torch.tensor([NAN])), "weight must be one factor"),
        (lambda: idar_loss(MAPS, MASKS, weight=torch.ones(3)), "weight must be one factor"),
        (lambda: idar_loss(MAPS, MASKS, weight=[1.0]), "weight must be a torch tensor"),
        (lambda: idar_loss(MAPS, MASKS, eps=NAN), "eps must be"),
        (lambda: idar_loss(MAPS, MASKS, eps=-1), "eps must be"), (lambda: idar_loss(MAPS, MASKS, eps=1e9), "eps must be"),
        (lambda: idar_loss(MAPS, MASKS, eps=True), "eps must be"), (lambda: idar_loss(MAPS, MASKS, kind=["dice"]), "kind must be one of"),
        (lambda: idar_loss(MASKS.long(), MASKS), "maps must be floating, as attention is"),
        (lambda: leakage(MAPS.numpy(), MASKS), "maps must be a torch tensor"),
        (lambda: leakage(MAPS - 1, MASKS), "maps must be at least 0"), (lambda: sigma_weight(0.5), "sigma must be a torch tensor"),
        (lambda: sigma_weight(torch.zeros(1), power=NAN), "power at least 0"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_masks_that_are_hidden_or_huge() -> None:
    pytest.importorskip("diffusers")
    from idar.integrations import pictures
    from PIL import Image

    for wrong in (np.ma.array(np.ones((4, 4)), mask=True), torch.ones(4, 4, device="meta"), np.ones((4, 4), complex)):
        with pytest.raises(ValueError, match="mask must"):
            pictures.read_mask(wrong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAX_PIXELS", 100)
        with pytest.raises(ValueError, match="at most 100 pixels, got 11 x 10"):
            pictures.read_mask(Image.new("L", (11, 10), 255))


SPANS, IMAGE = LAYOUT.subject_spans, LAYOUT.image_span


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: leakage(MAPS, MASKS + 0j), "masks must be a dense tensor of real"),
        (lambda: leakage(MAPS.to_sparse(), MASKS), "maps must be a dense"),
        (lambda: leakage(MAPS.to("meta"), MASKS), "maps must be a dense"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4).to_sparse(), (2, 2)), "dense"),
        (lambda: owner_masks(MAPS + 0j), "coverage must be a dense"),
        (lambda: box_masks(torch.zeros(1, 1, 4) + 0j, (2, 2), (4, 4)), "boxes must be a"),
        (lambda: box_masks(torch.zeros(1, 1, 4), (2, 2), "44"), "size must be positive"),
        (lambda: box_masks(torch.zeros(1, 1, 4), (2, 2), 4), "size must"),
        (lambda: box_masks(torch.zeros(1, 1, 4), (2, 2), (4,)), "size must be"),
        (lambda: map_boxes(MAPS, (2, 2), (NAN, 4)), "size must be positive"),
        (lambda: map_boxes(MAPS, (2, 2), (-4, 4)), "size must be positive"),
        (lambda: map_boxes(MAPS, (2, 2), (4, 4), tail="0"), "tail must be"),
        (lambda: box_masks(torch.zeros(1, 1, 4), (2, 2), (4, 4), margin="1"), "margin must be"),
        (lambda: normalize_maps(MAPS.numpy()), "maps must be a torch"),
        (lambda: normalize_maps(MAPS - 1, "share"), "maps must be at least 0"),
        (lambda: normalize_maps(MAPS, eps=NAN), "eps must be"),
        (lambda: map_iou(MAPS, MASKS, threshold=NAN), "threshold must be"),
        (lambda: map_iou(MAPS, MASKS, threshold=-1), "threshold must be"),
        (lambda: map_iou(MAPS, MASKS, threshold="a"), "threshold must be"),
        (lambda: map_overlap(MAPS - 1), "at least 0"),
        (lambda: map_overlap(MAPS[0]), r"maps must be \(b, s, n\)"),
        (lambda: map_overlap(MAPS.numpy()), "maps must be a torch tensor"),
        (lambda: sigma_weight(torch.tensor([0.5 + 1j])), "sigma must be a dense"),
        (lambda: subject_attention(X + 0j, X + 0j, SPANS, IMAGE), "query must be a d"),
        (lambda: subject_attention(X.long(), X.long(), SPANS, IMAGE), "must be floating"),
        (lambda: attention_owners(X.numpy(), X, LAYOUT), "query must be a t"),
        (lambda: subject_attention(X, X, SPANS, IMAGE, chunk_size=1.5), "chunk_size must be"),
        (lambda: subject_attention(X, X, ((6, 7, 8),), IMAGE), "two whole"),
        (lambda: subject_attention(X, X, ((6.0, 8.0),), IMAGE), "two whole numbers"),
        (lambda: stratified_subset(10, 2.5), "num_samples must be"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4), (True, 2)), "grid must be"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4), (10**9, 10**9)), "16,777,216 tokens"),
        (lambda: token_masks(torch.ones(1, 1, 4, 4), (2, 2), padding="0000"), "padding must be four numbers"),
    ],
)
def test_tensors_and_numbers_of_another_kind(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_say_what_they_hold(dtype: torch.dtype) -> None:
    """fp16 has no number as small as the eps of a division: a map of zeros became NaN; and it rounded the loss."""
    zeros = torch.zeros(1, 2, 4, dtype=dtype)
    for mode in ("max", "minmax", "share", "sum"):
        assert normalize_maps(zeros, mode).tolist() == zeros.tolist()
    maps = (torch.rand(1, 2, 4096, generator=torch.Generator().manual_seed(0)) / 4096).to(dtype)
    halves = (torch.arange(4096) < 2048).float()
    masks = torch.stack([halves, 1 - halves])[None]
    for measure in (leakage, lambda m, t: idar_loss(m, t, kind="dice").loss, lambda m, t: map_overlap(m)):
        torch.testing.assert_close(measure(maps, masks), measure(maps.float(), masks), rtol=0, atol=0)
    assert torch.equal(leakage(MAPS, MASKS.bool()), leakage(MAPS, MASKS))


def test_a_map_of_nothing_says_nothing() -> None:
    """It leaked 0, and lay apart from the others."""
    maps = MAPS.clone()
    maps[:, 0] = 0
    assert leakage(maps, MASKS).isnan().tolist() == map_overlap(maps).isnan().tolist() == [[True, False]]
