"""Optional models, tiny and random but saved in the real format: SAM 2, detectors, semantic segmentation, captioners, CLIP, DINO."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.photos.masks import (
    BoxMasker,
    ForegroundMasker,
    Sam2Masker,
    SelfieForeground,
    SemanticForeground,
    split_by_faces,
)
from multicrafter.photos.people import BodyDetector, assign_bodies, body_box
from multicrafter.photos.references import crop_box
from PIL import Image

SEED = st.integers(0, 2**32 - 1)


def random_boxes(random, count, width, height):
    corners = random.random((count, 2)) * [width * 0.7, height * 0.5]
    return [(x, y, x + 0.1 * width + 1, y + 0.12 * height + 1) for x, y in corners]


@settings(deadline=None, max_examples=40)
@given(SEED, st.integers(1, 6))
def test_split_masks_are_disjoint_and_inside_foreground_and_bodies(seed, count):
    random = np.random.default_rng(seed)
    foreground = random.random((40, 60)) < 0.6
    faces = random_boxes(random, count, 60, 40)
    bodies = [body_box(f, 60, 40) for f in faces]
    masks = split_by_faces(foreground, faces, bodies)
    assert masks.shape == (count, 40, 60) and masks.sum(0).max() <= 1
    covered = np.zeros_like(foreground)
    for left, top, right, bottom in bodies:
        y, x = np.mgrid[:40, :60] + 0.5
        covered |= (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    assert np.array_equal(masks.any(0), foreground & covered)  # nobody's pixel is lost


def test_a_body_hangs_below_its_own_face():
    faces = [(20, 10, 30, 22), (60, 10, 70, 22)]
    whole = [(0.0, 0.0, 100.0, 100.0)] * 2
    masks = split_by_faces(np.ones((100, 100), bool), faces, whole)
    assert masks[0][:, :44].all() and masks[1][:, 46:].all()
    above = [(45, 5, 55, 17), (45, 60, 55, 72)]  # one above the other: the lower head starts right above the lower face
    masks = split_by_faces(np.ones((100, 100), bool), above, whole)
    assert masks[0][50, 50] and masks[1][58, 50] and masks[1][90, 50]


def test_bodies_go_to_the_faces_inside_them():
    faces = [(10.0, 10.0, 20.0, 20.0), (60.0, 10.0, 70.0, 20.0), (200.0, 10.0, 210.0, 20.0)]
    bodies = [(50.0, 5.0, 85.0, 90.0), (0.0, 5.0, 35.0, 95.0)]
    got = assign_bodies(faces, bodies, 300, 100)
    assert got[:2] == [bodies[1], bodies[0]]
    assert got[2] == body_box(faces[2], 300, 100)


def test_of_bodies_around_both_faces_each_gets_the_one_that_fits_it():
    faces = [(10.0, 10.0, 20.0, 20.0), (40.0, 10.0, 50.0, 20.0)]
    left, right = (0.0, 5.0, 52.0, 80.0), (8.0, 5.0, 60.0, 80.0)  # each holds both faces
    for bodies in ([left, right], [right, left]):
        assert assign_bodies(faces, bodies, 300, 100) == [left, right]


def test_a_face_outside_of_every_body_keeps_the_guess():
    faces, bodies = (
        [(10.0, 10.0, 20.0, 20.0), (60.0, 10.0, 70.0, 20.0)],
        [(0.0, 5.0, 35.0, 95.0), (200.0, 5.0, 240.0, 95.0)],
    )
    assert assign_bodies(faces, bodies, 300, 100) == [bodies[0], body_box(faces[1], 300, 100)]


def test_a_reference_crop_shrinks_until_the_neighbour_is_out_of_it():
    face, neighbour = (100.0, 100.0, 140.0, 140.0), (150.0, 100.0, 190.0, 140.0)
    alone = crop_box(face, [], 400, 300, scale=2.2)
    assert alone[2] - alone[0] == alone[3] - alone[1] == 88 and alone[2] > 154  # it would show the neighbour
    box = crop_box(face, [neighbour], 400, 300, scale=2.2)
    assert box[2] <= 154 and box[0] <= 100 and box[2] >= 140 and box[2] - box[0] >= 48


def test_sam2_takes_the_mask_it_trusts_most():
    masks = torch.zeros(1, 3, 4, 4)
    for i in range(3):
        masks[0, i, i] = 1
    masker = object.__new__(Sam2Masker)
    masker.model = lambda **_: SimpleNamespace(pred_masks=None, iou_scores=torch.tensor([[[0.1, 0.9, 0.5]]]))

    class Processor(dict):
        def __call__(self, **_):
            return {"original_sizes": [(4, 4)]}

        def post_process_masks(self, *_):
            return [masks.bool()]

    masker.processor = Processor()
    found = masker(Image.new("RGB", (4, 4)), [(0.0, 0.0, 1.0, 1.0)], [(0.0, 0.0, 4.0, 4.0)])
    assert np.array_equal(found[0], masks[0, 1].bool().numpy())


def test_box_masks(photo):
    masks = BoxMasker()(photo(100, 80), [(10, 10, 20, 20)], [(5.0, 5.0, 35.0, 70.0)])
    assert masks.sum() == 30 * 65


def test_sam2(tmp_path, photo):
    from transformers import Sam2Config, Sam2Model, Sam2Processor
    from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 1, 1], "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3], "image_size": [256, 256], "window_positional_embedding_background_size": [2, 2],
    }  # fmt: skip
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 256, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    model = Sam2Model(config)
    model.save_pretrained(tmp_path)
    size = {"height": 256, "width": 256}
    Sam2Processor(Sam2ImageProcessor(size=size, mask_size={"height": 64, "width": 64})).save_pretrained(tmp_path)
    masker = Sam2Masker(str(tmp_path))
    faces = [(40.0, 20.0, 70.0, 50.0), (160.0, 20.0, 190.0, 50.0)]
    masks = masker(photo(240, 160), faces, [body_box(f, 240, 160) for f in faces])
    assert masks.shape == (2, 160, 240) and masks.dtype == bool
    assert masks.sum(0).max() <= 1
    assert masker(photo(240, 160), [], []).shape == (0, 160, 240)


def test_object_detector(tmp_path, photo):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 64], num_detection_tokens=12,
        id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(tmp_path)
    found = BodyDetector(str(tmp_path), threshold=0.0)([photo(120, 90), photo(90, 120, 1)])
    assert len(found) == 2 and all(len(box) == 4 for boxes in found for box in boxes)
    model = YolosForObjectDetection.from_pretrained(tmp_path)
    model.config.id2label = {0: "cat", 1: "dog"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="label 'person'"):
        BodyDetector(str(tmp_path))


def test_semantic_segmentation(tmp_path, photo):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1], decoder_hidden_size=8, id2label={0: "wall", 1: "person"}, label2id={"wall": 0, "person": 1},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    foreground = SemanticForeground(str(tmp_path))
    probability = foreground(photo(120, 90))
    assert probability.shape == (90, 120) and probability.min() >= 0 and probability.max() <= 1
    masks = ForegroundMasker(lambda _: np.ones((90, 120)))(
        photo(120, 90), [(50.0, 10.0, 60.0, 20.0)], [(40.0, 5.0, 70.0, 60.0)]
    )
    assert masks[0][89, 55] and not masks[0][10, 5]  # a body may reach the lower edge, but not the far side


def test_captioner(tmp_path, photo):
    from multicrafter.photos.captions import VisionLanguageCaptioner
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "people", "park"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **part,
        "vocab_size": len(words),
        "projection_dim": 8,
        "encoder_hidden_size": 16,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**part, "image_size": 32, "patch_size": 16}, projection_dim=8)
    )
    model.save_pretrained(tmp_path / "model")
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path / "model")
    captioner = VisionLanguageCaptioner(str(tmp_path / "model"), max_new_tokens=6)
    captions = captioner([photo(40, 30), photo(30, 40, 1)])
    assert len(captions) == 2 and captions == captioner([photo(40, 30), photo(30, 40, 1)])
    assert all(set(c.split()) <= {"two", "people", "park", "[UNK]"} for c in captions)


def test_a_selfie_model_that_is_missing_or_broken(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs multicrafter[selfie]")
    with pytest.raises(ValueError, match="not a file"):
        SelfieForeground(str(tmp_path / "none.tflite"))
    (tmp_path / "bad.tflite").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="tflite"):
        SelfieForeground(str(tmp_path / "bad.tflite"))


def test_clip_and_dino_judges(tmp_path, photo):
    from multicrafter.scoring.judges import JudgeConfig, Judges
    from multicrafter.world.judges.clip import build_clip
    from transformers import BitImageProcessor, CLIPImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model, tokenizer = build_clip()
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "clip"
    )
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(tmp_path / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "dino"
    )
    pictures = [photo(80, 60), photo(60, 80, 1)]
    folders = {"clip": str(tmp_path / "clip"), "dino": str(tmp_path / "dino")}
    judges = Judges(JudgeConfig(faces="none", **folders))
    assert set(judges.embed) == {"clip", "dino"}
    found = {name: embed(pictures) for name, embed in judges.embed.items()}
    found["text"] = judges.clip.embed_text(["two people in the park by day", "x " * 500])
    for rows in found.values():
        assert len(rows) == 2 and np.allclose(np.linalg.norm(rows, axis=1), 1)
    np.testing.assert_allclose(found["clip"][1], judges.embed["clip"](pictures[1:])[0], atol=1e-5)
    about = judges.describe()
    assert about["clip"].startswith("clip@") and about["faces"] == "none"
    with pytest.raises(ValueError, match=r"pictures and text, but .* holds a Dinov2Model"):
        Judges(JudgeConfig(faces="none", clip=folders["dino"]))
    with pytest.raises(ValueError, match="dino must be a folder"):
        Judges(JudgeConfig(faces="none", dino="/nowhere"))


@pytest.fixture
def hps_checkpoint(tmp_path, monkeypatch):
    """HPS_v2.1_compressed.pt as the hub has it, but of a tiny network: open_clip is told that this is what a ViT-H-14 looks like."""
    open_clip = pytest.importorskip("open_clip", reason="needs id-reward[hps]")
    tiny = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 56},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", tiny)
    torch.manual_seed(1)
    model = open_clip.CLIP(**tiny)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual initial weights hardly look at the picture
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path / "HPS_v2.1_compressed.pt"


def test_hps_scores_photos_and_filters_them(hps_checkpoint, drawn, make_config, tmp_path):
    """The scores in the manifest are those of id_reward's scorer on the photos, and a threshold between them parts the photos."""
    from id_reward.backends.aesthetics import HPSv2Scorer
    from multicrafter.photos import build
    from multicrafter.photos.store import open_split

    config = make_config(aesthetics=f"hps:{hps_checkpoint}")
    build(drawn[0], tmp_path / "out", config, progress=False)
    rows = [r for split in ("train", "test") for r in open_split(tmp_path / "out", split).records]
    pictures = [Image.open(drawn[0] / r["source_file"]).convert("RGB") for r in rows]
    want = HPSv2Scorer.from_pretrained(hps_checkpoint)(
        pictures, ["a photo of two people"] * len(rows), [()] * len(rows)
    )
    np.testing.assert_allclose([r["aesthetics"] for r in rows], want, atol=2e-5)
    assert np.ptp(want) > 1e-3
    least = float(np.median(want))
    strict = replace(config, filter=replace(config.filter, min_aesthetics=least))
    summary = build(drawn[0], tmp_path / "out", strict, progress=False)
    assert summary.counts["filter: not aesthetic"] == int((np.round(want, 5) < least).sum()) > 5
    assert summary.stages["aesthetics"]["computed"] == 0  # the scores come from the cache
    assert "aesthetic" in (tmp_path / "out" / "report.html").read_text()


def test_hps_scores_any_models_pictures(hps_checkpoint, drawn, tmp_path):
    from multicrafter.scoring.judges import JudgeConfig, Judges

    judges = Judges(JudgeConfig(faces="none", aesthetics=f"hps:{hps_checkpoint}"))
    pictures = [Image.open(drawn[0] / f"{i:03d}.png").convert("RGB") for i in range(3)]
    first, again = (judges.aesthetics(pictures, ["a", "b", "c"], [()] * 3) for _ in range(2))
    assert np.isfinite(first).all() and (np.abs(first) <= 1).all() and np.array_equal(first, again)
    assert judges.describe()["aesthetics"].startswith("hps:HPS_v2.1_compressed.pt@")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="checkpoint of tensors"):
        Judges(JudgeConfig(faces="none", aesthetics=f"hps:{tmp_path / 'broken.pt'}"))
