"""Whatever somebody hands to a function of a leaf, it answers or says in one sentence what was wrong: no traceback of torch from within."""

from __future__ import annotations

from typing import Any

import gspo
import id_reward
import idar
import moe_lora
import numpy as np
import pytest
import torch
from idar import SubjectLayout

GENERATOR = torch.Generator().manual_seed(0)
ODD = [
    None, True, "x", b"x", -1, 0, 1.5, float("nan"), float("inf"), 10**30, [], [[]], ["x"], (1,), {}, {"a": 1}, {1}, object(), 1j,
    torch.tensor([1.0, 2.0]), torch.tensor(1.0), torch.zeros(0), torch.zeros(4, 3, 2, 2, 2), torch.zeros(4, 3, dtype=torch.complex64),
    torch.full((4, 3), float("nan")), torch.full((1, 2, 4), float("nan")), np.array([1, 2]), np.float32(0.5),
]  # fmt: skip


def rand(*shape: int) -> torch.Tensor:
    """Uniform numbers."""
    return torch.rand(*shape, generator=GENERATOR)


def net() -> torch.nn.Module:
    """What an adapter goes into."""
    return torch.nn.Sequential(torch.nn.Linear(2, 2))


def follow(x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A velocity."""
    return x


IDS, LEVELS, INDEX = torch.tensor([0, 0, 1, 1]), torch.linspace(1, 0, 5), torch.zeros(6, 1, dtype=torch.long)
LAYOUT = SubjectLayout.in_order(num_text=1, num_image=4, num_references=[2, 2])
QUERIES, MASKS = rand(1, 2, 9, 4), (rand(1, 2, 4) > 0.5).float()
STEPS = {name: rand(4, 2) for name in ("log_prob", "old_log_prob")}
GUARDED = {**STEPS, "mean": rand(4, 2, 3), "old_mean": rand(4, 2, 3), "std": rand(4, 2) + 0.1}
CALLS: dict[Any, dict[str, dict[str, Any]]] = {
    gspo: dict(
        auto_clip_range=dict(ratio=rand(4) + 0.5),
        awm_loss=dict(
            velocity=rand(4, 3),
            old_velocity=rand(4, 3),
            target=rand(4, 3),
            advantages=rand(4) - 0.5,
            clip_range=None,
            sigma=rand(4),
            weighting="sigma",
            reduction="mean",
        ),
        clipped_surrogate_loss=dict(
            ratio=rand(4) + 0.5,
            advantages=rand(4) - 0.5,
            clip_range=0.2,
            max_advantage=5.0,
            reduction="mean",
            sample_weights=rand(4),
        ),
        controlled_variance=dict(rewards=rand(4), group_ids=IDS, free_rewards=rand(4), free_group_ids=IDS),
        gaussian_kl=dict(mean=rand(4, 3), reference_mean=rand(4, 3), std=rand(4) + 0.1),
        gaussian_log_prob=dict(value=rand(4, 3), mean=rand(4, 3), std=rand(4) + 0.1),
        gaussian_log_ratio=dict(next_latents=rand(4, 3), mean=rand(4, 3), old_mean=rand(4, 3), std=rand(4) + 0.1),
        gdpo_advantages=dict(
            rewards={"a": rand(4)}, weights={"a": 1.0}, group_ids=IDS, scale="group", ddof=0, eps=1e-4
        ),
        gradient_signal=dict(gradients=rand(4, 10), samples_per_batch=4),
        group_advantages=dict(rewards=rand(4), group_ids=IDS, scale="group", ddof=0, eps=1e-4),
        group_has_signal=dict(advantages=rand(4), group_ids=IDS),
        group_statistics=dict(rewards=rand(4), group_ids=IDS),
        guard_step_weights=dict(sigma=torch.tensor([0.9, 0.8]), sigma_next=torch.tensor([0.8, 0.7])),
        guarded_log_ratio=GUARDED,
        guarded_step_importance_ratio=GUARDED,
        importance_ratio=dict(kind="sequence", log_ratio=rand(4, 2)),
        kl_mask=dict(
            log_ratio=rand(4),
            mean=rand(4, 3),
            old_mean=rand(4, 3),
            std=rand(4) + 0.1,
            advantages=rand(4) - 0.5,
            threshold=1e-3,
        ),
        masked_surrogate_loss=dict(log_ratio=rand(4), advantages=rand(4), keep=rand(4) > 0.5, reduction="mean"),
        multi_reward_advantages=dict(
            rewards={"a": rand(4)}, weights={"a": 1.0}, group_ids=IDS, scale="group", ddof=0, eps=1e-4
        ),
        nft_loss=dict(
            velocity=rand(4, 3),
            old_velocity=rand(4, 3),
            target=rand(4, 3),
            reward=rand(4),
            beta=1.0,
            sigma=rand(4),
            weighting="sigma",
            reduction="mean",
        ),
        optimality=dict(advantages=rand(4) - 0.5, advantage_clip=5.0),
        sequence_importance_ratio=dict(log_prob=rand(4, 2), old_log_prob=rand(4, 2)),
        step_importance_ratio=dict(log_prob=rand(4, 2), old_log_prob=rand(4, 2)),
        share_groups=dict(num_prompts=4, group_size=4, rank=0, num_ranks=2),
        surrogate_gradient=dict(
            log_ratio=rand(4, 2),
            advantages=rand(4),
            clip_range=0.2,
            ratio="sequence",
            max_advantage=3.0,
            reduction="mean",
        ),
        token_advantages=dict(advantages=rand(2, 2), regions=rand(2, 2, 5), background="sum"),
        token_log_ratio=dict(next_latents=rand(4, 3, 2), mean=rand(4, 3, 2), old_mean=rand(4, 3, 2), std=rand(4) + 0.1),
        walk_ratio=dict(updates=rand(4, 10), momentum=0.0),
        whiten=dict(advantages=rand(4), center=True, eps=1e-4),
        draw=dict(
            velocity_fn=follow, noise=rand(2, 3), sigmas=LEVELS, group_size=2, solver="euler", micro_batch_size=2
        ),
        draft_samples=dict(
            velocity_fn=follow, noise=rand(2, 3), sigmas=LEVELS, index=torch.arange(2), last_steps=1, recompute=False
        ),
        refl_samples=dict(velocity_fn=follow, noise=rand(2, 3), sigmas=LEVELS, index=torch.arange(2), step=1),
        finished_samples=dict(latents=rand(2, 3), index=[0, 1], num_function_evaluations=3),
        rollout=dict(
            velocity_fn=follow,
            noise=rand(2, 3),
            sigmas=LEVELS,
            kernel=gspo.FlowSDE(),
            window=(0, 1),
            group_size=2,
            share_prefix=True,
            offload=False,
            tail_steps=2,
            micro_batch_size=2,
            index=[0, 1],
        ),
    ),
    idar: dict(
        attention_owners=dict(query=QUERIES, key=QUERIES, layout=LAYOUT),
        box_masks=dict(
            boxes=torch.tensor([[[0.0, 0, 10, 10], [10, 10, 20, 20]]]), grid=(2, 2), size=(20, 20), margin=1.0
        ),
        idar_loss=dict(maps=rand(1, 2, 4), masks=MASKS, kind="dice", normalization="none", weight=rand(1), eps=1e-6),
        leakage=dict(maps=rand(1, 2, 4), masks=MASKS),
        map_boxes=dict(maps=rand(1, 2, 4), grid=(2, 2), size=(20, 20), tail=0.05),
        map_iou=dict(maps=rand(1, 2, 4), masks=MASKS, threshold=0.5),
        map_overlap=dict(maps=rand(1, 2, 4)),
        normalize_maps=dict(maps=rand(1, 2, 4), mode="max", eps=1e-8),
        owner_masks=dict(coverage=rand(1, 2, 4), threshold=0.15),
        peak_in_mask=dict(maps=rand(1, 2, 4), masks=MASKS),
        separation_bias=dict(
            layout=LAYOUT, masks=MASKS, strength=1.0, background="none", arrows=("image_to_reference",), num_tokens=10
        ),
        sigma_weight=dict(sigma=rand(3), sigma_max=1.0, power=0.0),
        stratified_subset=dict(length=10, num_samples=3),
        subject_attention=dict(
            query=QUERIES,
            key=QUERIES,
            subject_spans=[(5, 7), (7, 9)],
            image_span=(1, 5),
            direction="reference_to_image",
            chunk_size=2,
            scale=0.5,
            num_samples=2,
        ),
        token_masks=dict(masks=rand(1, 2, 8, 8), grid=(2, 2), fit="stretch", padding=(0, 0, 0, 0)),
    ),
    moe_lora: dict(
        experts=dict(
            h=rand(6, 4),
            lora_a=rand(3, 2, 4),
            lora_b=rand(3, 5, 2),
            gate_weights=rand(6, 1),
            expert_index=INDEX,
            dispatch="grouped",
        ),
        gate_logits=dict(h=rand(6, 4), weight=rand(3, 4)),
        load_balance_loss=dict(gate_logits=rand(6, 3), expert_index=INDEX),
        load_by_kind=dict(expert_index=INDEX, kinds=torch.zeros(6, dtype=torch.long), num_experts=3),
        mutual_information=dict(joint=rand(2, 3)),
        route=dict(gate_logits=rand(6, 3), top_k=1, gating="softmax_then_topk"),
        router_z_loss=dict(gate_logits=rand(6, 3)),
        specialisation=dict(counts=torch.randint(0, 9, (8, 3)), labels=torch.arange(8) % 2, permutations=9),
        find_targets=dict(model=net(), targets=["0"]),
        inject=dict(model=net(), config=moe_lora.MoELoRAConfig(rank=2, alpha=2.0), targets=["0"]),
    ),
    id_reward: dict(
        box_overlap=dict(a=np.array([[0, 0, 1, 1.0]]), b=np.array([[0, 0, 1, 1.0]])),
        copy_paste=dict(generated=np.array([1.0, 0]), target=np.array([0, 1.0]), reference=np.array([1.0, 1])),
        cosine_similarity=dict(a=np.eye(2), b=np.eye(2)),
        id_confidence=dict(similarity=np.eye(2)),
        match=dict(similarity=np.eye(2)),
        multi_id_alignment_reward=dict(
            reference_embeddings=np.eye(2),
            face_embeddings=np.eye(2),
            missing_penalty=0.0,
            extra_penalty=0.0,
            convention="multicrafter",
            min_similarity=0.0,
            off_pair_penalty=0.0,
        ),
        placed_confusion=dict(similarity=np.eye(2), expected=np.eye(2)),
        score_similarity=dict(
            similarity=np.eye(2),
            missing_penalty=0.0,
            convention="multicrafter",
            min_similarity=0.0,
            off_pair_penalty=0.0,
        ),
        swap_matrix=dict(similarity=np.eye(2)),
        swap_rate=dict(confusion=np.eye(2)),
        get_face_backend=dict(name="auto"),
        as_composite=dict(scorer=lambda i, p, r: np.zeros(len(i)), name="a"),
    ),
}
"""What is right, by function; every argument in turn is replaced by something odd."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package, calls in CALLS.items() for name in calls],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_odd_argument_is_answered_or_named(package: Any, name: str) -> None:
    call, right = getattr(package, name), CALLS[package][name]
    call(**right)
    for argument in right:
        for odd in ODD:
            given = {**right, argument: odd}
            if "model" in right and argument != "model":
                given["model"] = net()
            try:
                call(**given)
            except ValueError as error:
                message = str(error)
            else:
                message = ""
            assert "\n" not in message, (argument, odd)
