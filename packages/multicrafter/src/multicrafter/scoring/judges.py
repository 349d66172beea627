"""The models behind the metrics, each optional, each from a local folder: CLIP, DINO, faces, aesthetics, a vision-language judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from id_reward import FaceBackend, Scorer
from id_reward.backends.loading import load
from jaxtyping import Float

from multicrafter import UserError
from multicrafter.models.checks import check_finite

if TYPE_CHECKING:
    from id_reward.backends.text import ClipEncoder
    from PIL import Image

Embed = Callable[["Sequence[Image.Image]"], Float[np.ndarray, "b d"]]


class TinyClip:
    """The CLIP of the drawn world, which ships with the package, as `id_reward.backends.text.ClipEncoder`."""

    def __init__(self) -> None:
        """Loads it."""
        from multicrafter.world import judges
        from multicrafter.world.judges.clip import ClipScorer

        self.scorer = ClipScorer.from_pretrained(judges.shipped() / "clip")

    def embed_pictures(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of pictures."""
        import torch

        with torch.inference_mode():
            return self.scorer.embed_pictures(list(images)).double().numpy()

    def embed_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of prompts."""
        import torch

        with torch.inference_mode():
            return self.scorer.embed_text(list(prompts)).double().numpy()


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

        self.model = load(AutoModelForImageTextToText, folder, "--vlm").eval()
        self.processor = load(AutoProcessor, folder, "--vlm")

    def __call__(self, picture: Image.Image, references: Sequence[Image.Image], prompt: str) -> dict[str, float]:
        """The scores by name."""
        from multicrafter.photos.captions import answer

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


def clip_encoder(name: str) -> ClipEncoder:
    """``tiny``, or a CLIP of transformers by id_reward (the usual CLIP-T and CLIP-I: openai/clip-vit-base-patch32 or -large-patch14)."""
    if name == "tiny":
        return TinyClip()
    from id_reward.backends.text import TransformersClip

    return TransformersClip.from_pretrained(name)


def dino_embedder(folder: str) -> Embed:
    """DINO or DINOv2 of transformers by id_reward (the usual DINO-I: facebook/dino-vits16 or dinov2-base)."""
    from id_reward.backends.objects import DinoEmbedder

    return DinoEmbedder.from_pretrained(folder).embed


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
        check_finite(self)
        kind, _, path = self.aesthetics.partition(":")
        if kind not in ("closed_form", "hps", "none") or (kind == "hps" and not path):
            raise UserError(f"aesthetics must be closed_form, hps:PATH or none, got {self.aesthetics!r}")


class Judges:
    """The loaded models; ``embed`` has those that turn pictures into unit vectors, "clip" and "dino"."""

    def __init__(self, config: JudgeConfig) -> None:
        """Loads what the configuration names.

        Raises:
            ValueError: A model cannot be read.
            ImportError: An extra is missing.
        """
        from multicrafter.photos.people import face_backend
        from multicrafter.photos.quality import aesthetics_scorer

        self.config = config
        self.faces: FaceBackend | None = None if config.faces == "none" else face_backend(config.faces)
        self.clip: ClipEncoder | None = None if config.clip is None else clip_encoder(config.clip)
        self.embed: dict[str, Embed] = {}
        if self.clip is not None:
            self.embed["clip"] = self.clip.embed_pictures
        if config.dino is not None:
            self.embed["dino"] = dino_embedder(config.dino)
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
