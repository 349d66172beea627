"""Numbers and ids as people have them: integers, booleans, lists, arrays; nothing is rounded on the way, or one sentence says so."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from gspo import (
    FlowSDE,
    auto_clip_range,
    clipped_surrogate_loss,
    group_advantages,
    group_statistics,
    multi_reward_advantages,
    rollout,
    sequence_importance_ratio,
    surrogate_gradient,
)  # fmt: skip
from gspo.inputs import as_ids, as_numbers
from hypothesis import given, settings

np = pytest.importorskip("numpy", reason="needs gspo[test]")
IDS = torch.tensor([0, 0, 0, 0])
FORMS = {
    "bool tensor": torch.tensor([False, True, True, False]),
    "list of bools": [False, True, True, False],
    "tuple": (0, 1, 1, 0),
    "int64": torch.tensor([0, 1, 1, 0]),
    "int8": torch.tensor([0, 1, 1, 0], dtype=torch.int8),
    "uint8": torch.tensor([0, 1, 1, 0], dtype=torch.uint8),
    "numpy int": np.array([0, 1, 1, 0]),
    "numpy uint16": np.array([0, 1, 1, 0], dtype=np.uint16),
    "numpy bool": np.array([False, True, True, False]),
    "numpy objects": np.array([0, 1, True, 0.0], dtype=object),
    "numpy scalars": [np.float32(0), np.int64(1), np.bool_(True), 0],
    "tensors": [torch.tensor(0.0), torch.tensor(1), 1, 0],
    "numpy float32": np.array([0, 1, 1, 0], dtype=np.float32),
    "half": torch.tensor([0, 1, 1, 0], dtype=torch.bfloat16),
    "strided": np.array([0, 9, 1, 9, 1, 9, 0, 9])[::2],
}


@pytest.mark.parametrize("form", FORMS)
def test_advantages_of_any_kind_of_numbers(form: str) -> None:
    got = group_advantages(FORMS[form], IDS, eps=0.0)
    assert got.tolist() == [-1, 1, 1, -1]
    assert got.dtype == (torch.bfloat16 if form == "half" else torch.float32)
    assert group_statistics(FORMS[form], IDS) == (1, 0, 0)
    parts = {"a": FORMS[form], "b": [1, 1, 1, 1]}
    assert multi_reward_advantages(parts, {"a": 1, "b": 1}, IDS, eps=0.0).tolist() == [-1, 1, 1, -1]


def test_floating_dtypes_are_kept() -> None:
    for given_, dtype in ((np.array([0.0, 1.0]), torch.float64), (torch.tensor([0.0, 1.0]).double(), torch.float64)):
        assert group_advantages(given_, [0, 0]).dtype == dtype
    # differences that fp32 would not see
    assert group_advantages([1e9, 1e9 + 4], [0, 0], scale="none").tolist() == [-2, 2]


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([2**53, 2**53 + 1, 2**53, 2**53 + 1]),
        [2**62, 2**62 + 1, 2**62, 2**62 + 1],
        np.array([2**53, 2**53 + 1, 2**53, 2**53 + 1]),
        np.array([2**53, 2**53 + 1, 2**53, 2**53 + 1], dtype=np.uint64),
        torch.tensor([-(2**63), -(2**63) + 1, -(2**63), -(2**63) + 1]),
    ],
)
def test_group_ids_are_exact(ids) -> None:  # type: ignore[no-untyped-def]
    assert group_statistics([0, 1, 2, 3], ids).num_groups == 2
    assert group_advantages([0, 1, 2, 3], ids, eps=0.0).tolist() == [-1, -1, 1, 1]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True), st.integers(2, 4))
@settings(deadline=None)
def test_any_64_bit_ids_are_as_many_groups(ids: list[int], members: int) -> None:
    rewards = [float(i) for _ in ids for i in range(members)]
    assert group_statistics(rewards, [i for i in ids for _ in range(members)]).num_groups == len(ids)


BAD = [
    (lambda: group_advantages("0110", IDS), "rewards must be numbers, one per sample, got str"),
    (lambda: group_advantages({0: 1.0}, IDS), "rewards must be numbers, one per sample, got dict"),
    (lambda: group_advantages({1.0, 2.0}, IDS), "rewards must be numbers, one per sample, got set"),
    (lambda: group_advantages(None, IDS), "rewards must be numbers, one per sample, got NoneType"),
    (lambda: group_advantages(["0", "1"], [0, 0]), "rewards must be numbers .* got '0'"),
    (lambda: group_advantages([[0.0], [1.0]], [0, 0]), r"rewards must be numbers .* got \[0.0\]"),
    (lambda: group_advantages(torch.tensor([1j, 2j]), [0, 0]), "rewards must be real numbers"),
    (lambda: group_advantages([1 + 1j, 2], [0, 0]), "rewards must be numbers"),
    (lambda: group_advantages([2**53 + 1, 2**53 + 2], [0, 0]), r"rewards must be at most 2\^53"),
    (lambda: group_advantages(torch.tensor([2**60, 2**60 + 1]), [0, 0]), r"rewards must be at most 2\^53"),
    (lambda: group_advantages(np.zeros((2, 2)), [0, 0]), r"rewards must be \(b,\)"),
    (lambda: group_advantages([0, 1], [0.0, 0.0]), "group_ids must be whole numbers of 64 bits"),
    (lambda: group_advantages([0, 1], torch.zeros(2)), "group_ids must be whole numbers .* got dtype torch.float32"),
    (lambda: group_advantages([0, 1], ["a", "a"]), "group_ids must be whole numbers"),
    (lambda: group_advantages([0, 1], "aa"), "group_ids must be whole numbers .* got str"),
    (lambda: group_advantages([0, 1], [2**64, 2**64]), "group_ids must be whole numbers of 64 bits"),
    (lambda: group_advantages([0, 1], [0]), r"group_ids must have the shape of rewards \(2,\), got \(1,\)"),
    (lambda: clipped_surrogate_loss([1.0, 1.0], [1.0, 1.0], 0.1), "ratio must be a torch tensor, got list"),
    (lambda: clipped_surrogate_loss(torch.ones(2).half(), [1, 1], 0.1), "ratio must be float32 or float64"),
    (lambda: clipped_surrogate_loss(torch.ones(2), "ab", 0.1), "advantages must be numbers"),
    (lambda: sequence_importance_ratio(np.zeros((2, 2)), np.zeros((2, 2))), "log_prob must be a torch tensor"),
    (lambda: sequence_importance_ratio(torch.zeros(2, 2), 1.0), "old_log_prob"),
    (lambda: surrogate_gradient([[0.0]], [1.0], 0.1), "log_ratio must be a torch tensor, got list"),
    (lambda: auto_clip_range([1.0], 0.1), "ratio must be a torch tensor, got list"),
    (lambda: auto_clip_range(torch.ones(2), 0.1, [1]), "advantages"),
    (lambda: auto_clip_range(torch.ones(2), 1.5), "target_clip_fraction"),
    (lambda: FlowSDE().step([[0.0]], [[0.0]], 0.5, 0.4), "latents must be a torch tensor, got list"),
    (lambda: draw(np.zeros((1, 2))), "noise must be a torch tensor"),
    (lambda: draw(torch.zeros(1, 2), ["a", "b", "c"]), "sigmas must be numbers"),
    (lambda: draw(torch.zeros(1, 2), index=[0, 1]), "index must have one entry per row of noise"),
]


def draw(noise, sigmas=(1, 0.5, 0.25, 0), **options):  # type: ignore[no-untyped-def]
    return rollout(lambda x, s, i: x, noise, sigmas, kernel=FlowSDE(), window=(1,), group_size=2, **options)


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_what_cannot_be_meant_is_one_sentence(call, message: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_schedules_are_tensors_arrays_or_lists() -> None:
    want = draw(torch.ones(1, 2), torch.tensor([1, 0.5, 0.25, 0]), generator=torch.Generator().manual_seed(0)).latents
    for sigmas in ([1, 0.5, 0.25, 0], (1.0, 0.5, 0.25, 0.0), np.array([1, 0.5, 0.25, 0])):
        assert torch.equal(draw(torch.ones(1, 2), sigmas, generator=torch.Generator().manual_seed(0)).latents, want)


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats()), max_size=8))
@settings(deadline=None)
def test_lists_become_exactly_their_numbers(values: list) -> None:
    got = as_numbers("values", values)
    want = [float("nan") if v is None else float(v) for v in values]
    assert got.dtype == torch.float64 and all(a == b or (a != a and b != b) for a, b in zip(got.tolist(), want))


def test_half_precision_log_probs_are_widened_before_they_are_subtracted() -> None:
    new, old = torch.tensor([[-1.0]]).bfloat16(), torch.tensor([[-1.0078125]]).bfloat16()
    ratio = sequence_importance_ratio(new, old)
    assert ratio.dtype == torch.float32 and ratio.item() == pytest.approx(1.00784, abs=1e-5)


def test_ids_of_a_tensor_stay() -> None:
    assert as_ids("ids", torch.tensor([1, 2], dtype=torch.int32)).dtype == torch.int64
    assert as_ids("ids", [True, False, 3]).tolist() == [1, 0, 3]


def test_whole_numbers_with_a_large_offset_still_differ() -> None:
    big = torch.tensor([10_000_000, 10_000_001])
    for rewards in (big, big.tolist(), big.double()):
        assert group_advantages(rewards, [0, 0], eps=0.0).tolist() == [-1, 1]
    # what fp32 rounds is no signal
    assert not group_advantages([0.1, 0.1 + 1e-9], [0, 0]).any()
