"""Each backbone fits its full-size transformer: its number of parameters summed by hand, without memory."""

from __future__ import annotations

import pytest
import torch
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import BACKBONES, get_backbone

NAMES = [b.name for b in BACKBONES]


def linear(d_in, d_out):
    return d_in * d_out + d_out


W, M = 3072, 9216  # width of both, FFN width of klein 4B
FLUX1 = (  # summed by hand from the released shapes
    linear(64, W) + linear(4096, W) + 2 * (linear(256, W) + linear(W, W)) + linear(768, W) + linear(W, W)
    + 19 * (2 * linear(W, 6 * W) + 8 * linear(W, W) + 2 * (linear(W, 4 * W) + linear(4 * W, W)) + 4 * 128)
    + 38 * (linear(W, 3 * W) + 3 * linear(W, W) + linear(W, 4 * W) + linear(5 * W, W) + 2 * 128)
    + linear(W, 2 * W) + linear(W, 64)
)  # fmt: skip
FULL = {
    "flux1_dev": FLUX1,
    "flux2_klein": (128 + 7680 + 256 + W) * W  # picture, text, time
    + (2 * 6 + 3) * W * W  # modulations, shared by all blocks
    + 5 * (8 * W * W + 2 * (W * 2 * M + M * W) + 4 * 128)
    + 20 * (W * (3 * W + 2 * M) + (W + M) * W + 2 * 128)
    + 2 * W * W + W * 128,
    "flux2_dev": (128 + 15360 + 256 + 2 * W) * 2 * W  # picture, text, time
    + (256 + 2 * W) * 2 * W  # guidance
    + (2 * 6 + 3) * 4 * W * W  # modulations, shared by all blocks
    + 8 * (8 * 4 * W * W + 2 * (2 * W * 4 * M + 2 * M * 2 * W) + 4 * 128)
    + 48 * (2 * W * (6 * W + 4 * M) + (2 * W + 2 * M) * 2 * W + 2 * 128)
    + 2 * 4 * W * W + 2 * W * 128,
    "qwen_image_edit": linear(64, W) + 3584 + linear(3584, W) + linear(256, W) + linear(W, W)
    + 60 * (2 * linear(W, 6 * W) + 8 * linear(W, W) + 2 * (linear(W, 4 * W) + linear(4 * W, W)) + 4 * 128)
    + linear(W, 2 * W) + linear(W, 64),
    "qwen_image_21": 64 * 4096 + 4096 + 2 * 4096**2  # picture, text
    + 256 * 4096 + 4096**2 + 4 * 4096**2  # time, and one modulation for all blocks
    + 32 * (4 * 4096**2 + 3 * 4096 * 3 * 4096 + 2 * 128)
    + 4096**2 + 4096 * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("flux1_kontext", "flux2_klein_kv", "qwen_image_edit") else n
        for n in NAMES
    ],
)  # two have the network of FLUX.1-dev and of FLUX.2-klein, one takes nine seconds
def test_full_size_on_the_meta_device(name):
    """Without memory: parameters of the whole network; of two blocks of each kind the velocity's shape and where the adapters sit."""
    backbone = get_backbone(name)
    if name in FULL:
        with torch.device("meta"):
            assert sum(p.numel() for p in backbone.build_transformer().parameters()) == FULL[name]
    blocks = {key: 2 for key in ("num_layers", "num_single_layers") if key in backbone.full_config}
    with torch.device("meta"):
        transformer = backbone.build_transformer(**blocks)
        tokens, references = (
            torch.zeros(2, 1024, transformer.config.in_channels),
            [torch.zeros(2, 400, transformer.config.in_channels)] * 4,
        )
        text, sigma = backbone.empty_text(transformer, 2, 512), torch.ones(2)
        velocity = backbone.velocity(
            transformer, tokens, sigma, text, image_grid=(32, 32), references=references, reference_grids=[(20, 20)] * 4
        )
        adapters = Adapters(transformer, AdapterConfig(rank=512, alpha=512.0), backbone=backbone)
    assert velocity.shape == tokens.shape
    assert velocity.is_meta
    double, single = 2, 2 if "num_single_layers" in blocks else 0
    lora = {n.rsplit(".lora_A", 1)[0] for n, _ in adapters.named_parameters() if "lora_A" in n}
    idle = name == "qwen_image_edit"  # nothing reads the text of its last block: two projections and a FFN
    per_block = 4 if name == "qwen_image_21" else 8  # one stream
    assert len(lora) == double * per_block + single * (3 if name.startswith("flux1") else 1) - 2 * idle
    assert len(adapters.experts.layers) == double * per_block // 4 + single - idle
    touched = {n for n, _ in adapters.named_parameters()}
    assert all("blocks." in n for n in touched)


def test_kontext_is_the_network_of_flux1_dev():
    one, other = get_backbone("flux1_dev"), get_backbone("flux1_kontext")
    assert one.full_config == other.full_config and one.transformer_class == other.transformer_class
