"""Aesthetics (extra ``hps``): HPSv2 and HPSv2.1 (Wu et al. 2023, arXiv 2306.09341) on open_clip.

The package hpsv2 cannot be installed beside modern tools; its model is a fine-tuned ViT-H-14 whose state dict open_clip loads key for key, so
only the preprocessing is its own. `HPS_v2_compressed.pt` (v2) or `HPS_v2.1_compressed.pt` (v2.1) come from the hub, xswu/HPSv2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from id_reward.backends.loading import read_state
from id_reward.backends.text import ClipScorer, OpenClip, open_clip_module
from id_reward.errors import InputError
from id_reward.shapes import Float

try:
    from torch import Tensor
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms import functional as TF
except ImportError:
    raise ImportError('HPSv2 needs torch, torchvision and Pillow: pip install "id-reward[hps]"') from None

# of OpenAI's CLIP
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def hps_preprocess(image: Any, size: int = 224) -> Float[Tensor, "3 s s"]:
    """Hpsv2's own preprocessing: the whole picture, its long side at ``size``, black bars around, then normalised.

    CLIP crops the middle instead. Resizing is bicubic, with antialiasing, on floats: values may leave [0, 1] a little, and stay.

    Args:
        image: An RGB PIL picture.
        size: Side of the network's input.
    """
    tensor = TF.to_tensor(image.convert("RGB"))
    height, width = tensor.shape[1:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = max(round(height * scale), 1), max(round(width * scale), 1)
        tensor = TF.resize(tensor, [height, width], InterpolationMode.BICUBIC, antialias=True)
    down, right = size - height, size - width
    tensor = TF.pad(tensor, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    result: Tensor = TF.normalize(tensor, list(MEAN), list(STD))
    return result


class HPSv2Scorer(ClipScorer):
    """``HPS = cos(image, prompt)`` of the fine-tuned CLIP, as a scorer; some .2 to .3 for ordinary pictures."""

    def __init__(self, encoder: OpenClip) -> None:
        """Takes an encoder with `hps_preprocess`; see `from_pretrained`."""
        super().__init__(encoder, scale="cosine")

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        architecture: str | Mapping[str, Any] = "ViT-H-14",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> HPSv2Scorer:
        """Loads ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt`` (a dictionary with "state_dict"); nothing is unpickled but tensors.

        Args:
            checkpoint: The file, also as .safetensors.
            architecture: Name of an open_clip architecture, or a configuration like those in its ``model_configs``.
            device: Where the model runs; 4 GB in fp32.
            batch_size: Pictures at a time.

        Raises:
            ValueError: The file is missing, is not a checkpoint, or does not fit the architecture.
            ImportError: open_clip is missing.
        """
        library, path = open_clip_module(), Path(checkpoint)
        if not path.is_file():
            raise InputError(
                f"checkpoint must be HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of the hub's xswu/HPSv2, but there is no {path}"
            )
        state = read_state(path)
        if isinstance(architecture, str):
            model = library.create_model(architecture, pretrained=None, load_weights=False, device=device)
            size = model.visual.image_size
        else:
            model = library.CLIP(**architecture).to(device)
            size = architecture["vision_cfg"]["image_size"]
        size = size[0] if isinstance(size, (tuple, list)) else size
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"{path} must fit {architecture}, got: {first}") from None
        tokenizer = library.get_tokenizer("ViT-H-14")
        return cls(OpenClip(model, lambda image: hps_preprocess(image, size), tokenizer, batch_size=batch_size))
