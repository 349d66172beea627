"""What a card has, and how much of its peak such a model reaches: the only assumptions of the time estimate."""

from __future__ import annotations

from dataclasses import dataclass

from multicrafter import UserError

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card.

    Attributes:
        name: Of the card the numbers are from (its maker's data sheet, dense bf16).
        memory: Bytes.
        tflops: Dense bf16 TFLOP/s.
        bandwidth: Memory, GB/s.
        link: To the other cards, GB/s in one direction.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    link: float


CARDS = {
    24: Card(name="RTX 4090", memory=24 * GB, tflops=165, bandwidth=1008, link=25),
    40: Card(name="A100 40GB", memory=40 * GB, tflops=312, bandwidth=1555, link=300),
    80: Card(name="H100 SXM", memory=80 * GB, tflops=989, bandwidth=3350, link=450),
    141: Card(name="H200", memory=141 * GB, tflops=989, bandwidth=4800, link=450),
}

EFFICIENCY = 0.4  # of the peak arithmetic, and
FUSION = 0.5  # of the unfused traffic that remains: both assumed (docs/guides/plan.md), not measured here
RESERVED = 1.0 * GIB  # context of the device and its libraries
FRAGMENTATION = 0.05  # of the allocator, on top of live bytes


def card_for(memory_gb: float) -> Card:
    """The smallest card with at least so much memory, its memory replaced by the given one.

    Raises:
        ValueError: Not positive.
    """
    if not memory_gb > 0:
        raise UserError(f"memory must be positive, got {memory_gb}")
    known = next((CARDS[m] for m in sorted(CARDS) if m >= memory_gb), CARDS[max(CARDS)])
    return Card(name=known.name, memory=memory_gb * GB, tflops=known.tflops, bandwidth=known.bandwidth, link=known.link)
