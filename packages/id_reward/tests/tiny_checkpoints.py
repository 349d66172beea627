"""Randomly initialised checkpoints in the real on-disk formats: Florence-2, SAM 2, DINOv2, CLIP. Needs transformers."""

from __future__ import annotations

from pathlib import Path

import torch

REGIONS = {"PATTERN": r"([a-zA-Z0-9 ]+)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>"}
POST_PROCESSOR = {
    "description_with_bboxes": REGIONS,
    "description_with_bboxes_or_polygons": {},
    "phrase_grounding": {"banned_grounding_tokens": ["it", "the image"]},
    "pure_text": {},
    "bboxes": {},
    "polygons": {},
    "ocr": {"AREA_THRESHOLD": 0.0},
}


def fast_tokenizer(family: str, **options):  # type: ignore[no-untyped-def]
    """A tokenizer of the class that the processors of the installed transformers accept: 4 asks for the family's own, 5 for any."""
    import transformers

    five = int(transformers.__version__.split(".")[0]) >= 5
    kind = transformers.PreTrainedTokenizerFast if five else getattr(transformers, f"{family}TokenizerFast")
    return kind(**options)


def byte_tokenizer(kind: str, specials: list[str]):  # type: ignore[no-untyped-def]
    """A byte-level tokenizer without merges; Bart's order of special tokens, or CLIP's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = ["<s>", "<pad>", "</s>", "<unk>"] if kind == "bart" else []
    last = ["<mask>", *specials] if kind == "bart" else ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate([*first, *alphabet, *last])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = ("<s>", "</s>") if kind == "bart" else last[:2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    return tokenizer, vocabulary


def florence(folder: Path) -> Path:
    """Florence-2 with its processor; 32x32 pictures, one window, one layer."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    tags = ["<image>", "<od>", "</od>", *[f"<loc_{i}>" for i in range(1000)]]
    tokenizer, vocabulary = byte_tokenizer("bart", tags)
    fast = fast_tokenizer(
        "Bart", tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
        additional_special_tokens=tags, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    torch.manual_seed(0)
    text = BartConfig(
        vocab_size=len(vocabulary), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    vision = dict(
        depths=[1], patch_size=[7], patch_stride=[4], patch_padding=[3], patch_prenorm=[False], embed_dim=[16], num_heads=[2],
        num_groups=[2], window_size=8, projection_dim=32, max_temporal_embeddings=4, max_position_embeddings=16,
    )  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=vocabulary["<image>"])
    Florence2ForConditionalGeneration(config).eval().save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, image_seq_length=65)
    images.image_seq_length = 65
    Florence2Processor(images, fast, post_processor_config=POST_PROCESSOR).save_pretrained(folder)
    return folder


def sam(folder: Path) -> Path:
    """SAM 2 with its processor; 128x128 pictures."""
    import transformers
    from transformers import Sam2Config, Sam2Model, Sam2Processor

    torch.manual_seed(0)
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, image_size=[128, 128], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        blocks_per_stage=[1, 1, 2, 1], global_attention_blocks=[3], window_size_per_stage=[8, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    config = Sam2Config(
        vision_config=dict(
            model_type="sam2_vision_model", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=32,
        ),
        prompt_encoder_config=dict(hidden_size=32, image_size=128, patch_size=16),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
    )  # fmt: skip
    Sam2Model(config).eval().save_pretrained(folder)
    name = (
        "Sam2ImageProcessor" if hasattr(transformers, "Sam2ImageProcessor") else "Sam2ImageProcessorFast"
    )  # of 5, of 4
    images = getattr(transformers, name)(size={"height": 128, "width": 128}, mask_size={"height": 32, "width": 32})
    Sam2Processor(images).save_pretrained(folder)
    return folder


def dino(folder: Path) -> Path:
    """DINOv2 with its image processor; 28x28 pictures."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, initializer_range=0.2
    )
    Dinov2Model(config).eval().save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def clip(folder: Path) -> Path:
    """CLIP with its processor; 32x32 pictures."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer, vocabulary = byte_tokenizer("clip", [])
    end = vocabulary["<|endoftext|>"]
    fast = fast_tokenizer(
        "CLIP", tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", model_max_length=77,
    )  # fmt: skip
    torch.manual_seed(0)
    shared = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = CLIPConfig(
        text_config=dict(
            shared, vocab_size=len(vocabulary), max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        ),
        vision_config=dict(shared, image_size=32, patch_size=8),
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).eval().save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, fast).save_pretrained(folder)
    return folder


QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen(folder: Path) -> Path:
    """Qwen2-VL with its processor: two layers, pictures in patches of 14 pixels, merged 2 x 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet, *QWEN_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = fast_tokenizer(
        "Qwen2", tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=QWEN_TOKENS,
        model_max_length=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(vocabulary) + 20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.2,
            rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
            bos_token_id=0, eos_token_id=vocabulary["<|im_end|>"], pad_token_id=0,
        ),
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=14, spatial_merge_size=2, initializer_range=0.2,
        ),
        image_token_id=vocabulary["<|image_pad|>"], video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"], vision_end_token_id=vocabulary["<|vision_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).eval().save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    Qwen2VLProcessor(images, fast, Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT).save_pretrained(folder)
    return folder


def hpsv3(base: Path, file: Path) -> Path:
    """A checkpoint as HPSv3's: the keys of Qwen2-VL as they were in 2025, one more token, and the head of its reward."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    state = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.contiguous()
        for name, value in model.state_dict().items()
    }
    head = torch.nn.Sequential(
        torch.nn.Linear(32, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    )  # fmt: skip
    state |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(state, file)
    return file
