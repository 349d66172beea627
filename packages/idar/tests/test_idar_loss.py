from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from idar import capture_attention, idar_loss, leakage, map_iou, normalize_maps, peak_in_mask, sigma_weight
from idar.integrations.diffusers import capture_subject_attention

MAPS = torch.tensor([[[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]])
MASKS = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])


def test_dice_by_hand() -> None:
    value = idar_loss(MAPS, MASKS, kind="dice", eps=0.0)
    # 1 - 2 * 0.8 / (1 + 2), for both subjects; the loss is their sum
    torch.testing.assert_close(value.per_subject, torch.full((1, 2), 1 - 1.6 / 3))
    torch.testing.assert_close(value.loss, torch.tensor(2 * (1 - 1.6 / 3)))


def test_other_kinds_by_hand() -> None:
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="soft_iou", eps=0.0).per_subject[0, 0], torch.tensor(1 - 0.8 / 2.2)
    )
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="cross_entropy", eps=1e-9).per_subject[0, 0], torch.tensor(-math.log(0.8))
    )
    want = -(math.log(0.6 / 0.7) + math.log(0.2 / 0.3)) / 2
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="share_cross_entropy", eps=1e-9).per_subject[0, 0], torch.tensor(want)
    )
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="token_cross_entropy", eps=1e-9).per_subject[0, 0],
        torch.tensor(-(math.log(0.6) + math.log(0.2)) / 2),
    )
    torch.testing.assert_close(
        idar_loss(MAPS, MASKS, kind="balanced").per_subject, torch.full((1, 2), 0.2 / 2 - 0.8 / 2)
    )


def test_a_token_is_asked_how_much_it_listens_or_only_to_whom() -> None:
    """Shares stay as they are where all references get less; the loss of tokens grows by -log of the factor."""
    for kind, grows in (("share_cross_entropy", 0.0), ("token_cross_entropy", 2 * math.log(4))):
        quiet, loud = (idar_loss(m, MASKS, kind=kind, eps=1e-9).loss for m in (MAPS / 4, MAPS))  # type: ignore[arg-type]
        torch.testing.assert_close(quiet - loud, torch.tensor(grows))


def test_the_defaults_are_what_worked() -> None:
    """Decision 0020: cross-entropy of shares, of what image tokens take from each reference."""
    takes = MAPS * 0.3
    assert torch.equal(idar_loss(takes, MASKS).loss, idar_loss(takes, MASKS, kind="share_cross_entropy").loss)
    for function in (capture_attention, capture_subject_attention):
        assert inspect.signature(function).parameters["direction"].default == "image_to_reference"


def test_a_loss_of_shares_on_maps_of_the_other_direction_is_said() -> None:
    with pytest.warns(UserWarning, match="image_to_reference"):
        idar_loss(MAPS, MASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idar_loss(MAPS * 0.3, MASKS)
        idar_loss(torch.cat([MAPS[:, :1], MAPS[:, 1:] * 0.3], 1), MASKS)
        idar_loss(MAPS, MASKS, kind="dice", normalization="max")


def test_absent_subjects_are_left_out() -> None:
    masks = MASKS.clone()
    masks[:, 1] = 0
    value = idar_loss(MAPS, masks, kind="dice")
    assert value.present.tolist() == [[True, False]]
    torch.testing.assert_close(value.loss, idar_loss(MAPS[:, :1], MASKS[:, :1], kind="dice").loss)
    with pytest.raises(ValueError, match="masks"):
        idar_loss(MAPS, torch.zeros_like(MASKS))


def test_weight_scales_samples() -> None:
    maps, masks = MAPS.repeat(2, 1, 1), MASKS.repeat(2, 1, 1)
    value = idar_loss(maps, masks, weight=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(value.loss, idar_loss(MAPS, MASKS).loss / 2)


def test_leakage_by_hand() -> None:
    torch.testing.assert_close(leakage(MAPS, MASKS), torch.full((1, 2), 0.2))
    assert leakage(torch.ones(1, 2, 4) / 4, MASKS)[0, 0] == 0.5
    assert leakage(MASKS / 2, MASKS).sum() == 0
    assert leakage(MAPS[:, :1], MASKS[:, :1]).isnan().all()


def test_iou_and_peak() -> None:
    assert map_iou(MAPS, MASKS).tolist() == [[0.5, 0.5]]
    assert peak_in_mask(MAPS, MASKS).tolist() == [[1.0, 1.0]]
    assert peak_in_mask(MAPS.flip(1), MASKS).tolist() == [[0.0, 0.0]]


def test_normalisations() -> None:
    assert normalize_maps(MAPS, "max").amax(-1).tolist() == [[1.0, 1.0]]
    assert normalize_maps(MAPS, "minmax").amin(-1).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(normalize_maps(MAPS, "share").sum(1), torch.ones(1, 4))
    torch.testing.assert_close(normalize_maps(MAPS * 3, "sum").sum(-1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="mode"):
        normalize_maps(MAPS, "softmax")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.full_like(MAPS, torch.nan), MAPS[:, :1]])
def test_bad_maps(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="maps"):
        idar_loss(bad, MASKS)


KINDS = ("dice", "soft_iou", "cross_entropy", "share_cross_entropy", "token_cross_entropy", "balanced")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_fall_as_maps_move_into_their_masks(kind: str) -> None:
    away = MAPS.flip(1)
    values = [idar_loss(torch.lerp(away, MASKS / 2, t), MASKS, kind=kind).loss for t in (0.0, 0.3, 0.6, 1.0)]  # type: ignore[arg-type]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pull_maps_into_their_masks(kind: str) -> None:
    maps = MAPS.double().requires_grad_()
    idar_loss(maps, MASKS.double(), kind=kind, normalization="max").loss.backward()  # type: ignore[arg-type]
    inside, outside = maps.grad[MASKS.bool()], maps.grad[~MASKS.bool()]
    assert inside.mean() < outside.mean()
    assert torch.autograd.gradcheck(lambda m: idar_loss(m, MASKS.double(), kind=kind).loss, maps)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_subjects_are_interchangeable_and_tokens_too(kind: str) -> None:
    value = idar_loss(MAPS, MASKS, kind=kind)  # type: ignore[arg-type]
    swapped = idar_loss(MAPS.flip(1), MASKS.flip(1), kind=kind)  # type: ignore[arg-type]
    torch.testing.assert_close(swapped.per_subject.flip(1), value.per_subject)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(idar_loss(MAPS[..., order], MASKS[..., order], kind=kind).loss, value.loss)  # type: ignore[arg-type]


def test_absent_subjects_get_no_gradient_and_no_nan() -> None:
    for kind in KINDS:
        maps, masks = MAPS.clone().requires_grad_(), MASKS.clone()
        masks[:, 1] = 0
        idar_loss(maps, masks, kind=kind).loss.backward()  # type: ignore[arg-type]
        assert bool(maps.grad.isfinite().all())
        if kind != "share_cross_entropy":  # there an absent subject's mass is what the present one competes with
            assert maps.grad[:, 1].abs().sum() == 0


def test_overlapping_masks_are_allowed() -> None:
    """Both subjects cover the two tokens in the middle: perfect maps have Dice 0 all the same."""
    masks = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]])
    torch.testing.assert_close(idar_loss(masks / 3, masks, kind="dice", normalization="max").loss, torch.tensor(0.0))
    assert leakage(masks, masks)[0, 0] == 0  # what one shares with the other is no leak


def test_weight_by_sigma() -> None:
    sigma = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(sigma_weight(sigma), torch.ones(4))
    torch.testing.assert_close(sigma_weight(sigma, sigma_max=0.75), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(sigma_weight(sigma, power=2.0), torch.tensor([1.0, 0.5625, 0.0625, 0.0]))
    for options in ({"sigma_max": 0.0}, {"sigma_max": 1.5}, {"power": -1.0}):
        with pytest.raises(ValueError, match="sigma_max"):
            sigma_weight(sigma, **options)
    with pytest.raises(ValueError, match="sigma"):
        sigma_weight(torch.tensor([1000.0]))


@pytest.mark.parametrize(
    ("maps", "masks", "options", "word"),
    [
        (MAPS, MASKS[:, :1], {}, "subjects"),
        (MAPS, torch.cat([MASKS, MASKS], 1), {}, "subjects"),
        (MAPS, MASKS * 0, {}, "empty"),
        (MAPS, MASKS * 2, {}, "masks"),
        (MAPS, MASKS * math.nan, {}, "masks"),
        (MAPS * math.inf, MASKS, {}, "maps"),
        (MAPS, MASKS, {"kind": "hinge"}, "kind"),
        (MAPS, MASKS, {"normalization": "softmax"}, "mode"),
    ],
)
def test_bad_input_is_named(maps: torch.Tensor, masks: torch.Tensor, options: dict[str, str], word: str) -> None:
    with pytest.raises(Exception, match=word) as caught:
        idar_loss(maps, masks, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError) or "jaxtyping" in type(caught.value).__module__
