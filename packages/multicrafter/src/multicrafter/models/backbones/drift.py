"""Do the references' keys and values depend on the noise? Measured, so that caching them is used only where it is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multicrafter.models.backbones.base import Backbone
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid


@torch.no_grad()
def reference_drift(
    backbone: Backbone,
    transformer: nn.Module,
    text: Text,
    *,
    tokens: Tensor,
    references: Sequence[Tensor],
    image_grid: Grid,
    reference_grids: Sequence[Grid],
    sigmas: tuple[float, float] = (0.9, 0.3),
) -> dict[str, float]:
    """Relative change of every block's reference keys between two noise levels: ``|K(sigma_1) - K(sigma_0)| / |K(sigma_0)|``.

    Keys before RoPE (which no noise touches), read off each attention's ``norm_k``; the noisy image differs as well, as it does
    between the steps of a sampler. Zero everywhere is what makes a cache exact.

    Args:
        backbone: Lays the tokens out.
        transformer: Of that backbone.
        text: Encoded prompts.
        tokens: Clean picture (b, n, d); noise is drawn from a fixed seed.
        references: As for `Backbone.velocity`.
        image_grid: As for `Backbone.velocity`.
        reference_grids: As for `Backbone.velocity`.
        sigmas: The two levels.

    Returns:
        By the attention's name.
    """
    layout = backbone.layout_of(text, image_grid, reference_grids)
    start, stop = min(s for s, _ in layout.subject_spans), max(e for _, e in layout.subject_spans)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
    attentions = {n.removesuffix(".norm_k"): m for n, m in transformer.named_modules() if n.endswith(".norm_k")}

    def keys(sigma: float) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        double = {n for n in attentions if getattr(transformer.get_submodule(n), "norm_added_k", None) is not None}

        def keep(name: str) -> Any:
            offset = (
                layout.num_text if name in double else 0
            )  # double blocks norm image and references apart from the text
            return lambda _m, _i, out: kept.__setitem__(name, out[:, start - offset : stop - offset].float())

        handles = [m.register_forward_hook(keep(n)) for n, m in attentions.items()]
        try:
            level = torch.full((len(tokens),), sigma, device=tokens.device)
            backbone.velocity(
                transformer, ((1 - sigma) * tokens + sigma * noise).to(tokens.dtype), level, text, image_grid=image_grid,
                references=references, reference_grids=reference_grids,
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        return kept

    first, second = keys(sigmas[0]), keys(sigmas[1])
    return {n: float((second[n] - first[n]).norm() / first[n].norm()) for n in attentions}
