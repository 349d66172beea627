"""What people prefer (extra ``preference``): PickScore and HPSv3, loaded by transformers.

The text around the prompt belongs to a checkpoint as much as its weights do: under another text HPSv3 gives other numbers. That text is not in
this package. It is read out of the installed package ``hpsv3`` (``pip install --no-deps hpsv3``; nothing of it is run), or given.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from id_reward.backends.loading import load, read_state, transformers_module
from id_reward.backends.text import TransformersClip
from id_reward.errors import InputError
from id_reward.images import as_image
from id_reward.shapes import Float

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    raise ImportError('preference models need torch: pip install "id-reward[preference]"') from None

REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of HPSv3's pictures, whatever their shape


class PickScorer:
    """``exp(logit_scale) cos(image, prompt)``, as a scorer (PickScore, Kirstain et al. 2023, arXiv 2305.01569); some 18 to 24.

    Args:
        encoder: CLIP as it was trained on Pick-a-Pic.
        scale: "logit", as above, or "unit": divided by 26, as Flow-GRPO and Flow-Factory use it.
    """

    releases_gil = True

    def __init__(self, encoder: TransformersClip, *, scale: Literal["logit", "unit"] = "logit") -> None:
        """Takes an encoder whose model has a ``logit_scale``."""
        if scale not in ("logit", "unit"):
            raise InputError(f"scale must be 'logit' or 'unit', got {scale!r}")
        self.encoder, self.scale = encoder, scale

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        processor: str | Path | None = None,
        *,
        scale: Literal["logit", "unit"] = "logit",
        **options: Any,
    ) -> PickScorer:
        """Loads a folder of yuvalkirstain/PickScore_v1, which has no processor of its own.

        Args:
            folder: The model.
            processor: Folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K; None: the model's.
            scale: See the class.
            **options: See `TransformersClip.from_pretrained`.

        Raises:
            ValueError: A folder is missing, or holds something else.
        """
        return cls(TransformersClip.from_pretrained(folder, processor=processor, **options), scale=scale)

    def to(self, device: Any) -> PickScorer:
        """Moves the model."""
        self.encoder.to(device)
        return self

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; references do not matter."""
        if len(images) != len(prompts):
            raise InputError(f"prompts must have one entry per picture ({len(images)}), got {len(prompts)}")
        if not len(images):
            return np.zeros(0)
        cosine = (self.encoder.embed_pictures(images) * self.encoder.embed_text(prompts)).sum(1)
        scale = float(self.encoder.model.logit_scale.detach().cpu().double().exp())
        return np.asarray(cosine * scale / (26 if self.scale == "unit" else 1))


def hpsv3_instruction() -> str:
    """The text around HPSv3's prompt, with ``{prompt}`` in it, out of the installed package ``hpsv3``.

    Raises:
        ImportError: The package is not installed, or holds no such text.
    """
    wanted = {"INSTRUCTION", "prompt_with_special_token"}
    texts: dict[str, str] = {}
    spec = importlib.util.find_spec("hpsv3")
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / "dataset" / "data_collator_qwen.py"
        for node in ast.parse(file.read_text()).body if file.is_file() else ():
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
                texts[node.targets[0].id] = ast.literal_eval(node.value)
    if texts.keys() != wanted:
        raise ImportError("the text that HPSv3 was trained with is in its package: pip install --no-deps hpsv3")
    return texts["INSTRUCTION"].replace("{text_prompt}", "{prompt}") + texts["prompt_with_special_token"]


def _reward_head(state: dict[str, Tensor]) -> nn.Sequential:
    """The perceptron that reads the reward off its token, in single precision; as wide as the checkpoint's."""
    sizes = [tuple(state[f"rm_head.{n}.weight"].shape) for n in (0, 3, 5)]
    layers = [nn.Linear(inputs, outputs) for outputs, inputs in sizes]
    head = nn.Sequential(layers[0], nn.ReLU(), nn.Dropout(0.05), layers[1], nn.ReLU(), layers[2])
    head.load_state_dict(
        {name.removeprefix("rm_head."): value.float() for name, value in state.items() if "rm_head." in name}
    )
    return head.eval()


def _language_model(hf: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Qwen2-VL with these weights; names of 2025 (``visual.``, ``model.layers.``) are today's too, transformers maps them.

    Raises:
        InputError: They do not fit.
    """
    text = getattr(config, "text_config", config)
    text.vocab_size = next(v.shape[0] for name, v in state.items() if name.endswith("embed_tokens.weight"))
    config.torch_dtype = dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, found = hf.Qwen2VLForConditionalGeneration.from_pretrained(
                None, config=config, state_dict=state, torch_dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise InputError(f"checkpoint must fit its base model, got: {str(error).strip().splitlines()[0]}") from error
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found.get("mismatched_keys", ()))})
    if wrong:
        raise InputError(f"checkpoint must fit its base model, but {len(wrong)} tensors do not, {wrong[0]} for one")
    return model.eval().requires_grad_(False)


class HPSv3Scorer:
    """Mean of the preference that HPSv3 predicts, as a scorer (Ma et al. 2025, arXiv 2508.03789); some -5 to 15.

    Qwen2-VL reads picture and prompt inside an instruction that ends in ``<|Reward|>``; a perceptron on the last hidden state of that token
    gives mean and deviation, of which the mean is taken.

    Args:
        model: A `Qwen2VLForConditionalGeneration`.
        head: The perceptron, hidden width -> 2.
        processor: Qwen2-VL's, whose tokenizer has the token.
        instruction: The text that the checkpoint was trained with, with ``{prompt}`` and ``<|Reward|>`` in it.
        batch_size: Pictures at a time.
        pixels: Width times height that every picture is brought to.
    """

    releases_gil = True

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        processor: Any,
        instruction: str,
        *,
        batch_size: int = 8,
        pixels: int = PIXELS,
    ) -> None:
        """Puts the parts together."""
        if instruction.count("{prompt}") != 1 or instruction.count(REWARD_TOKEN) != 1:
            raise InputError(f"instruction must hold {{prompt}} and {REWARD_TOKEN}, once each")
        self.model, self.head, self.processor, self.instruction = model, head, processor, instruction
        self.batch_size, self.pixels = batch_size, pixels
        self.token = processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        base: str | Path,
        *,
        instruction: str | None = None,
        device: str = "cpu",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        local_files_only: bool = True,
        **options: Any,
    ) -> HPSv3Scorer:
        """Loads ``HPSv3.safetensors`` of the hub's MizzenAI/HPSv3; 17 GB in bfloat16.

        Args:
            checkpoint: The file.
            base: Folder of Qwen/Qwen2-VL-7B-Instruct: its configuration and its processor, no weights.
            instruction: See the class; None: out of the installed package hpsv3.
            device: Where it runs.
            dtype: Of the language model; the head is in float32.
            local_files_only: Whether ``base`` must be a folder; False allows hub ids.
            **options: See the class.

        Raises:
            ValueError: A file is missing or does not fit.
            ImportError: transformers is missing, or the instruction is neither given nor installed.
        """
        hf, path = transformers_module("preference"), Path(checkpoint)
        if not path.is_file():
            raise InputError(
                f"checkpoint must be HPSv3.safetensors of the hub's MizzenAI/HPSv3, but there is no {path}"
            )
        text = hpsv3_instruction() if instruction is None else instruction
        processor = load(hf.AutoProcessor, base, "base", local_files_only=local_files_only, padding_side="right")
        processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        state = read_state(path)
        if not any(name.startswith("rm_head.0.") for name in state):
            raise InputError(f"checkpoint must hold the reward's head (rm_head), which {path} lacks")
        head = _reward_head(state)
        body = {name: value for name, value in state.items() if not name.startswith("rm_head.")}
        config = load(hf.AutoConfig, base, "base", local_files_only=local_files_only)
        model = _language_model(hf, config, body, getattr(torch, dtype))
        return cls(model.to(device), head.to(device), processor, text, **options)

    def to(self, device: Any) -> HPSv3Scorer:
        """Moves model and head."""
        self.model.to(device)
        self.head.to(device)
        return self

    def _picture(self, image: Any) -> Any:
        """The picture at `pixels`, both sides multiples of 28."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        picture = as_image(image)
        height, width = smart_resize(picture.height, picture.width, min_pixels=self.pixels, max_pixels=self.pixels)
        return picture.resize((width, height), 3)  # bicubic

    def _rewards(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Mean and deviation (b, 2)."""
        pictures = [self._picture(image) for image in images]
        content = [
            [
                {"type": "image", "image": picture},
                {"type": "text", "text": self.instruction.replace("{prompt}", prompt)},
            ]
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": c}], tokenize=False, add_generation_prompt=True
            )
            for c in content
        ]
        batch = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.model.device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        hidden = self.model.model(**batch).last_hidden_state
        at = batch["input_ids"] == self.token
        if not (at.sum(1) == 1).all():
            raise InputError(f"prompts must not hold {REWARD_TOKEN}")
        result: Tensor = self.head(hidden[at].float())
        return result

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; references do not matter."""
        if len(images) != len(prompts):
            raise InputError(f"prompts must have one entry per picture ({len(images)}), got {len(prompts)}")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                parts.append(self._rewards(images[part], prompts[part])[:, 0].cpu().double().numpy())
        return np.concatenate(parts) if parts else np.zeros(0)
