"""One batch of groups on several ranks: which samples are whose, and the same noise for a sample wherever it lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gspo.checks import check_whole
from gspo.rollout import StepNoise


@dataclass(frozen=True, kw_only=True)
class GroupShare:
    """One rank's part of a batch of groups.

    Attributes:
        prompts: Which prompts of the batch.
        members: Which members of each of their groups.
        num_prompts: Of the whole batch.
        group_size: Of the whole groups.
    """

    prompts: slice
    members: slice
    num_prompts: int
    group_size: int

    @property
    def num_members(self) -> int:
        """Members of a group that are here: the ``group_size`` of this rank's rollout."""
        return int(self.members.stop - self.members.start)

    @property
    def num_samples(self) -> int:
        """Samples of the whole batch."""
        return self.num_prompts * self.group_size

    def rows(self) -> Int[Tensor, " b"]:
        """Where these samples are among all, in the order of this rank's rollout.

        >>> share_groups(2, 4, rank=1, num_ranks=4).rows().tolist()
        [2, 3]
        """
        prompts = torch.arange(self.prompts.start, self.prompts.stop)[:, None] * self.group_size
        return (prompts + torch.arange(self.members.start, self.members.stop)).flatten()


def share_groups(num_prompts: int, group_size: int, *, rank: int = 0, num_ranks: int = 1) -> GroupShare:
    """Spreads ``num_prompts`` groups of ``group_size`` samples over the ranks, in equal numbers.

    Whole groups where there are enough prompts (their shared prefix is taken once); otherwise groups are cut.

    Raises:
        ValueError: The samples cannot be spread evenly, or there is no such rank.

    >>> share_groups(4, 6, rank=1, num_ranks=2).prompts, share_groups(1, 6, rank=1, num_ranks=2).members
    (slice(2, 4, None), slice(3, 6, None))
    """
    check_whole(1, num_prompts=num_prompts, group_size=group_size, num_ranks=num_ranks)
    check_whole(0, rank=rank)
    if not rank < num_ranks:
        raise ValueError(
            f"num_prompts and group_size must be at least 1 and rank in [0, num_ranks), got {num_prompts} prompts of "
            f"{group_size} and rank {rank} of {num_ranks}"
        )
    # ranks that share a prompt, if prompts are dealt out; else every rank has its members of every prompt
    for prompts_each, ranks_each in (
        (num_prompts // num_ranks, 1),
        (1, num_ranks // num_prompts),
        (num_prompts, num_ranks),
    ):
        even = prompts_each * num_ranks == num_prompts * ranks_each
        if even and prompts_each and ranks_each and group_size % ranks_each == 0:
            block, part = divmod(rank, ranks_each)
            size = group_size // ranks_each
            prompts = slice(block * prompts_each, (block + 1) * prompts_each)
            members = slice(part * size, (part + 1) * size)
            return GroupShare(prompts=prompts, members=members, num_prompts=num_prompts, group_size=group_size)
    raise ValueError(
        f"num_prompts and group_size must spread evenly over {num_ranks} processes (one divisible by it, or whole parts of "
        f"groups), got {num_prompts} prompts of {group_size}"
    )


def shared_noise(generator: torch.Generator, share: GroupShare, shape: Sequence[int]) -> StepNoise:
    """Noise for `gspo.rollout`'s ``step_noise``: drawn for all samples of all ranks, of which this rank uses its own.

    With the generator in one state on all ranks, every rank's moves on alike, and a sample does not depend on how the batch is spread.

    Args:
        generator: Equal on all ranks.
        share: Which samples are here.
        shape: Of one sample's latents.
    """

    def draw(position: int) -> Tensor:
        noise = torch.randn(share.num_samples, *shape, generator=generator, device=generator.device)
        return noise[share.rows().to(noise.device)]

    return draw
