"""The models behind the metrics, each optional, each from a local folder: CLIP, DINO, faces, aesthetics, a vision-language judge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from id_reward import FaceBackend, Scorer
from jaxtyping import Float

if TYPE_CHECKING:
    from PIL import Image


class PictureEmbedder(Protocol):
    """Pictures as unit vectors."""

    def pictures(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b d"]:
        """One row per picture."""
        ...


class TextPictureEmbedder(PictureEmbedder, Protocol):
    """Pictures and sentences in one space."""

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """One row per sentence."""
        ...


def _load(kind: Any, folder: str, what: str) -> Any:
    if not Path(folder).is_dir():
        raise ValueError(f"{what} must be the folder of a transformers model, but {folder} is none")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"{what} {folder} must be readable by transformers, got {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None


def _unit(output: Any) -> Float[np.ndarray, "b d"]:
    import torch

    features = getattr(output, "pooler_output", output)
    unit: np.ndarray = torch.nn.functional.normalize(features.float(), dim=-1).cpu().double().numpy()
    return unit


class Clip:
    """CLIP or SigLIP of transformers (the usual CLIP-T and CLIP-I: openai/clip-vit-base-patch32 or -large-patch14)."""

    def __init__(self, folder: str) -> None:
        """Loads model, tokenizer and image processor."""
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = _load(AutoModel, folder, "--clip").eval()
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"--clip {folder} must be a model of pictures and text, got {type(self.model).__name__}")
        self.processor, self.tokenizer = (
            _load(AutoImageProcessor, folder, "--clip"),
            _load(AutoTokenizer, folder, "--clip"),
        )

    def pictures(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b d"]:
        """See `PictureEmbedder`."""
        import torch

        with torch.inference_mode():
            return _unit(self.model.get_image_features(**self.processor(images=list(pictures), return_tensors="pt")))

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """See `TextPictureEmbedder`; prompts longer than the model takes are cut."""
        import torch

        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            return _unit(self.model.get_text_features(**tokens))


class TinyClip:
    """The CLIP of the drawn world, which ships with the package."""

    def __init__(self) -> None:
        """Loads it."""
        from multicrafter import judges
        from multicrafter.judges.clip import ClipScorer

        self.scorer = ClipScorer.from_pretrained(judges.shipped() / "clip")

    def pictures(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b d"]:
        """See `PictureEmbedder`."""
        import torch

        with torch.inference_mode():
            return _unit(self.scorer.embed_pictures(list(pictures)))

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """See `TextPictureEmbedder`."""
        import torch

        with torch.inference_mode():
            return _unit(self.scorer.embed_text(list(texts)))


class Dino:
    """DINO or DINOv2 of transformers: the class token (the usual DINO-I: facebook/dino-vits16 or dinov2-base)."""

    def __init__(self, folder: str) -> None:
        """Loads model and image processor."""
        from transformers import AutoImageProcessor, AutoModel

        self.model, self.processor = (
            _load(AutoModel, folder, "--dino").eval(),
            _load(AutoImageProcessor, folder, "--dino"),
        )

    def pictures(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b d"]:
        """See `PictureEmbedder`."""
        import torch

        with torch.inference_mode():
            return _unit(
                self.model(**self.processor(images=list(pictures), return_tensors="pt")).last_hidden_state[:, 0]
            )


QUESTIONS = {
    "vlm_pf": "The first {n} pictures are references. The last picture was made from them for this request: {prompt!r}. "
    "How well does the last picture follow the request? Answer with one whole number from 0 (not at all) to 10 (perfectly).",
    "vlm_sc": "The first {n} pictures are references. The last picture was made from them for this request: {prompt!r}. "
    "How consistent are the subjects of the last picture with the references, in identity and looks? "
    "Answer with one whole number from 0 (other subjects) to 10 (the very same).",
}


class VisionLanguageJudge:
    """Asks a local vision-language model for OmniContext's two scores; NaN where its answer holds no number from 0 to 10."""

    def __init__(self, folder: str) -> None:
        """Loads model and processor."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = _load(AutoModelForImageTextToText, folder, "--vlm").eval()
        self.processor = _load(AutoProcessor, folder, "--vlm")

    def __call__(self, picture: Image.Image, references: Sequence[Image.Image], prompt: str) -> dict[str, float]:
        """The scores by name."""
        from multicrafter.data.photos.captions import answer

        shown = [*references, picture]
        return {
            name: parse_score(
                answer(self.model, self.processor, shown, text.format(n=len(references), prompt=prompt), 8)
            )
            for name, text in QUESTIONS.items()
        }


def parse_score(text: str) -> float:
    """The first number of an answer, if it is from 0 to 10, else NaN.

    >>> parse_score("Score: 7/10")
    7.0
    """
    found = re.search(r"\d+(\.\d+)?", text)
    value = float(found.group()) if found else float("nan")
    return value if 0 <= value <= 10 else float("nan")


def hps_scorer(path: str) -> Scorer:
    """HPSv2 or v2.1 from a local checkpoint (HPS_v2.1_compressed.pt), by id_reward."""
    from id_reward.backends.aesthetics import HPSv2Scorer

    return HPSv2Scorer.from_pretrained(path)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which models score; a metric whose model is not given is left out.

    Attributes:
        faces: "tiny" or a name of `id_reward.get_face_backend`; "none" leaves identity out.
        clip: "tiny", or the folder of a CLIP.
        dino: Folder of a DINO.
        aesthetics: "closed_form", "hps:PATH" or "none".
        vlm: Folder of a vision-language model.
    """

    faces: str = "dlib"
    clip: str | None = None
    dino: str | None = None
    aesthetics: str = "closed_form"
    vlm: str | None = None

    def __post_init__(self) -> None:
        kind, _, path = self.aesthetics.partition(":")
        if kind not in ("closed_form", "hps", "none") or (kind == "hps" and not path):
            raise ValueError(f"aesthetics must be closed_form, hps:PATH or none, got {self.aesthetics!r}")


class Judges:
    """The loaded models."""

    def __init__(self, config: JudgeConfig) -> None:
        """Loads what the configuration names.

        Raises:
            ValueError: A model cannot be read.
            ImportError: An extra is missing.
        """
        from multicrafter.data.photos.people import face_backend
        from multicrafter.data.photos.quality import aesthetics_scorer

        self.config = config
        self.faces: FaceBackend | None = None if config.faces == "none" else face_backend(config.faces)
        self.clip: TextPictureEmbedder | None = (
            None if config.clip is None else TinyClip() if config.clip == "tiny" else Clip(config.clip)
        )
        self.dino: PictureEmbedder | None = None if config.dino is None else Dino(config.dino)
        self.aesthetics: Scorer | None = aesthetics_scorer(config.aesthetics)
        self.vlm = None if config.vlm is None else VisionLanguageJudge(config.vlm)

    def describe(self) -> dict[str, str]:
        """What each judge is, so that only runs judged alike are compared: names of folders, and a hash of their configuration."""
        return {name: _identity(value) for name, value in sorted(vars(self.config).items()) if value is not None}


def _identity(value: str) -> str:
    import hashlib

    kind, _, path = value.rpartition(":")
    folder = Path(path)
    if not folder.exists():
        return value
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        if file.suffix == ".json":
            digest.update(json.dumps(json.loads(file.read_text(encoding="utf-8")), sort_keys=True).encode())
    return f"{kind}:{folder.name}@{digest.hexdigest()[:10]}".lstrip(":")
