"""Pictures that are not square, everywhere: drawn, encoded, trained on in both stages, bound, evaluated, and asked for on the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import gspo
import multicrafter_workers as workers
import pytest
import torch
from gspo import OnlineConfig, PolicyConfig, SlidingWindow
from id_reward import IdentityScorer
from idar import owner_masks
from idar.integrations.diffusers import capture_subject_attention
from multicrafter.cli import main
from multicrafter.config.recipes import resolve
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.binding import BindingConfig, by_subject, masks_of_places
from multicrafter.models.finding import IdentityFinder, Places
from multicrafter.models.loaded import LoadedModel
from multicrafter.pipeline import MultiCrafterPipeline, to_image
from multicrafter.plan.estimate import shape_of
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, cases, draw_cases, evaluate, score_attributes
from multicrafter.training import loop
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.attention import watch_attention
from multicrafter.training.pretrain import Pretrain, PretrainConfig, SeparationConfig
from multicrafter.training.runs import run_align, training_scenes
from multicrafter.training.scenes import encode_scenes, encode_shaped_scenes
from multicrafter.world import FAMILIES, WorldConfig, make_scenes
from multicrafter.world.judges.reader import ReaderBackend
from PIL import Image

WIDE, TALL = (48, 96), (96, 48)
WORLD = WorldConfig(numbers=(2,), shared_attributes=4)


@pytest.fixture(scope="module")
def pipe():
    """Its tokens have a side of 8 pixels."""
    return workers.small_pipe()


@pytest.fixture(scope="module")
def buckets(pipe):
    return encode_shaped_scenes(pipe, WORLD, 12, (WIDE, TALL), seed=3)


# ---- drawn scenes


@pytest.mark.parametrize("shape", [WIDE, TALL, (32, 96), (128, 128)])
def test_scenes_fill_their_shape_and_are_read_as_they_were_drawn(shape):
    """People stand inside, their masks lie in their boxes, and the judges find them where and as they are, however large the pictures are."""
    scenes = make_scenes(12, replace(WORLD, shape=shape), torch.Generator().manual_seed(0))
    height, width = shape
    assert scenes.images.shape[-2:] == scenes.masks.shape[-2:] == shape
    assert scenes.boxes[..., 2].max() > 0.6 * width and scenes.boxes[..., 3].max() > 0.8 * height
    for masks, boxes in zip(scenes.masks, scenes.boxes, strict=True):
        for mask, (left, _, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            rows, columns = torch.where(mask > 0.5)
            assert left - 3 <= columns.float().quantile(0.1) and columns.float().quantile(0.9) <= right + 3
            assert rows.max() <= bottom + 1
    judges = WorldJudges.load()
    found = judges.reader.read(scenes.images)
    right = [
        score_attributes(truth, read.identities, FAMILIES["people"], truth[0]).attributes
        for truth, read in zip(scenes.identities, found, strict=True)
    ]
    assert sum(right) / len(right) > 0.85
    assert sum(read.setting == int(s) for read, s in zip(found, scenes.setting, strict=True)) >= 11
    for people in (judges.people, ReaderBackend(judges.reader)):
        places = IdentityFinder(backend=people)(scenes.images, [list(r) for r in scenes.references], None, (1, 1)).boxes
        apart = (places - scenes.boxes).abs() / torch.tensor([width, height] * 2)
        assert apart.nanmedian() < 0.04 and (apart[..., :2].amax(-1) < 0.1).float().mean() > 0.8


def test_references_are_recognised_at_any_size():
    """Of 128 pixels, half as high as wide, or a line of pixels: the first two show the people of the small ones, the last nobody."""
    scenes = make_scenes(6, WORLD, torch.Generator().manual_seed(2))
    (large,) = (make_scenes(6, replace(WORLD, reference_size=128), torch.Generator().manual_seed(2)),)
    scorer = IdentityScorer(WorldJudges.load().people)
    for shown in (
        scenes.references,
        large.references,
        torch.nn.functional.pad(large.references, (64, 64, 0, 0), value=0.6),
    ):
        assert scorer(list(scenes.images), [""] * 6, [list(row) for row in shown]).mean() > 0.85
    for line in (torch.rand(3, 64, 1), torch.rand(3, 1, 2000)):
        scorer.backend.detect_and_embed([line]), scorer.backend.detect_and_embed_references([line])


def test_a_shape_that_is_square_draws_the_square_to_the_bit():
    square, same = (
        make_scenes(3, replace(WORLD, shape=shape), torch.Generator().manual_seed(5)) for shape in (None, (64, 64))
    )
    assert all(torch.equal(a, b) for a, b in zip(square, same, strict=True))


def test_masks_and_tokens_follow_the_grid(pipe, buckets):
    """Token masks are averages over patches of the picture's own rows and columns; of the transposed picture they are not."""
    for scenes, shape in zip(buckets, (WIDE, TALL), strict=True):
        assert len(scenes) == 6 and scenes.grid == (shape[0] // 8, shape[1] // 8)
        again = make_scenes(6, replace(WORLD, shape=shape), torch.Generator().manual_seed(3 + (shape is TALL)))
        want = torch.nn.functional.avg_pool2d(again.masks, 8).flatten(2)
        torch.testing.assert_close(scenes.masks, want, atol=1e-5, rtol=0)
        transposed = torch.nn.functional.avg_pool2d(again.masks.transpose(2, 3), 8).flatten(2)
        assert not torch.allclose(scenes.masks, transposed, atol=1e-2)
        torch.testing.assert_close(scenes.tokens, LoadedModel.of(pipe).encode_pictures(again.images))


# ---- training


def test_a_batch_of_stage_1_holds_one_shape(pipe, buckets, monkeypatch):
    base = workers.small_pipe()
    stage = Pretrain(base, PretrainConfig(batch=4, adapters=workers.SMALL), buckets)
    grids, velocity = [], type(stage.adapters.backbone).velocity

    def spied(self, transformer, tokens, *rest, **context):
        grids.append((context["image_grid"], tokens.shape[1]))
        return velocity(self, transformer, tokens, *rest, **context)

    monkeypatch.setattr(type(stage.adapters.backbone), "velocity", spied)
    metrics = [stage.step(i) for i in range(8)]
    assert set(grids) == {((6, 12), 72), ((12, 6), 72)}
    assert all(m["skipped"] == 0 and m["attention_loss"] > 0 for m in metrics)


def test_the_configuration_draws_its_shapes(pipe, tmp_path):
    config = PretrainConfig(num_scenes=5, shapes=(WIDE, (64, 64)), world=WORLD)
    found = training_scenes(pipe, config)
    assert [(s.grid, len(s)) for s in found] == [((6, 12), 2), ((8, 8), 3)]
    (one,) = training_scenes(pipe, replace(config, shapes=None, world=replace(WORLD, shape=TALL)))
    assert one.grid == (12, 6)
    run = resolve(recipe="flux1_dev_stage2", changes=["align.shapes=[[512,512],[512,768]]"])
    assert shape_of(run).image == (32, 48)
    assert shape_of(resolve(recipe="tiny_stage1", changes=["pretrain.world.shape=[48,96]"])).image == (6, 12)


@pytest.mark.parametrize("make", [lambda s: PretrainConfig(shapes=s), lambda s: AlignConfig(shapes=s)])
@pytest.mark.parametrize("shapes", [(), ((0, 8),), ((8, 8), (8, 8))])
def test_wrong_shapes_are_refused(make, shapes):
    with pytest.raises(ValueError, match=r"shapes must hold sizes \(height, width\) in pixels, each once, got"):
        make(shapes)


def test_shapes_that_are_no_whole_tokens_are_refused_before_the_first_is_drawn(pipe, monkeypatch):
    monkeypatch.setattr("multicrafter.training.scenes.make_scenes", None)
    with pytest.raises(ValueError, match="shapes must be a positive multiple of 8 pixels, got 60"):
        encode_shaped_scenes(pipe, WORLD, 4, (WIDE, (48, 60)), seed=0)
    with pytest.raises(ValueError, match=r"at most the number of scenes \(1\), got 2"):
        encode_shaped_scenes(pipe, WORLD, 1, (WIDE, TALL), seed=0)
    with pytest.raises(ValueError, match="size must be a positive multiple of 8 pixels, got 60"):
        encode_scenes(pipe, replace(WORLD, size=60), 1, seed=0)
    with pytest.raises(ValueError, match="shape must be a height and a width of at least 16 pixels"):
        replace(WORLD, shape=(48, 8))


def aligned(buckets, *, micro_batch=None, num_steps=4):
    base = workers.small_pipe()
    adapters, generator = Adapters(base.transformer, workers.SMALL), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    online = OnlineConfig(
        window=SlidingWindow(4), group_size=3, policy=PolicyConfig(micro_batch_size=micro_batch), micro_batch_size=micro_batch
    )  # fmt: skip
    config = AlignConfig(num_steps=num_steps, prompts=2, online=online, lr=1e-3, reward_wait_s=0.0)
    seen = []

    class Reward(workers.Brightness):
        def __call__(self, images, prompts, references):
            seen.append({tuple(image.shape[-2:]) for image in images})
            return super().__call__(images, prompts, references)

    return Align(base, adapters, config, buckets, Reward()), seen


def test_an_iteration_of_stage_2_draws_one_shape_from_ratio_one(buckets):
    """Pictures of the bucket's shape reach the reward; the ratio is 1; in parts it is the same iteration, up to rounding."""
    (whole, seen), (parts, _) = aligned(buckets), aligned(buckets, micro_batch=2)
    for index in range(3):
        metrics, split = whole.step(index), parts.step(index)
        assert metrics["initial_log_ratio"] == 0 and metrics["skipped"] == 0 and metrics["reward_spread"] > 0
        assert split["reward"] == pytest.approx(metrics["reward"], abs=1e-4)
    assert all(len(shapes) == 1 for shapes in seen) and {s for shapes in seen for s in shapes} == {WIDE, TALL}
    state, other = whole.adapters.state_dict(), parts.adapters.state_dict()
    assert all(torch.allclose(state[k], other[k], atol=1e-4) for k in state)


@pytest.mark.slow
def test_stage_2_in_two_shapes_goes_on_exactly(buckets, tmp_path):
    (straight, _), (half, _), (resumed, _) = (aligned(buckets) for _ in range(3))
    loop.run(straight, num_steps=3, out=tmp_path / "straight")
    loop.run(half, num_steps=1, out=tmp_path / "half")
    loop.run(resumed, num_steps=3, out=tmp_path / "half", resume=True)
    want, got = straight.adapters.state_dict(), resumed.adapters.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)


@pytest.mark.slow
def test_a_run_of_stage_2_draws_the_scenes_of_its_shapes(tmp_path, monkeypatch):
    base, drawn = workers.small_pipe(), []
    real = encode_shaped_scenes
    monkeypatch.setattr(
        "multicrafter.training.runs.encode_shaped_scenes", lambda *a, **k: drawn.append(real(a[0], a[1], 4, a[3], **k)) or drawn[-1]
    )  # fmt: skip
    config = AlignConfig(
        num_steps=1, shapes=(WIDE, TALL), prompts=1, online=OnlineConfig(window=SlidingWindow(3, size=1), group_size=2), reward_wait_s=0.0
    )  # fmt: skip
    run_align(base, Adapters(base.transformer, workers.SMALL), config, tmp_path, reward=workers.Brightness())
    assert [s.grid for s in drawn[0]] == [(6, 12), (12, 6)]
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["size"] == 8 * round((6 * 12) ** 0.5)


# ---- several references of one person, of any shape

TALL_REFERENCE = (32, 16)


@pytest.fixture(scope="module")
def several(pipe):
    """Two references of each of two people, half as wide as high."""
    world = replace(WORLD, references_per_subject=2, reference_shape=TALL_REFERENCE)
    return encode_scenes(pipe, world, 6, seed=3)


def test_references_of_one_person_show_that_person_anew(several):
    """Side by side, in another pose; of pictures and truth there is what there was."""
    world = replace(WORLD, references_per_subject=2, reference_shape=(48, 32))
    one, two = (make_scenes(8, w, torch.Generator().manual_seed(1)) for w in (WORLD, world))
    assert torch.equal(one.images, two.images) and torch.equal(one.masks, two.masks)
    assert two.references.shape == (8, 4, 3, 48, 32) and not torch.equal(two.references[:, 0], two.references[:, 1])
    found = WorldJudges.load().people.detect_and_embed_references(two.references.flatten(0, 1))
    seen = torch.tensor([list(faces.embeddings[0]) for faces in found]).unflatten(0, (8, 4))
    alike = torch.einsum("nad,nbd->nab", seen, seen).mean(0)
    assert alike[0, 1] > 0.9 and alike[2, 3] > 0.9 and alike[:2, 2:].max() < 0.5
    assert several.references.shape[:2] == (6, 4) and several.reference_grid == (4, 2) and several.num_subjects == 2
    assert several.counts == [2, 2] and several.masks.shape[1] == 2
    shown = several.subject_pictures(slice(1, 3))
    assert torch.equal(torch.stack(shown[1]), several.reference_images[2, [0, 2]])
    with pytest.raises(ValueError, match="references must be 2 of each of the 2 subjects that have masks, got 2"):
        replace(several, references=several.references[:, :2])


def test_attention_on_a_person_is_that_on_all_her_references(pipe, several):
    """Maps and loss of stage 1 are of people: the sum over the references of each, taken apart by hand."""
    apart = replace(several, references_per_subject=1, masks=several.masks.repeat_interleave(2, 1))
    model, maps = LoadedModel.of(pipe), []
    for scenes in (several, apart):
        captured = watch_attention(
            model.transformer, model.backbone, scenes, slice(0, 4), scenes.encode_text(model, slice(0, 4)), sigma=0.6,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        maps.append(captured.maps)
    assert maps[0].shape == (4, 2, 64) and maps[1].shape == (4, 4, 64)
    torch.testing.assert_close(maps[0], maps[1].unflatten(1, (2, 2)).sum(2))


def test_both_stages_and_evaluation_take_several_references(several):
    """Beside a bucket of one square reference each; the reward, which compares people, is shown one reference of each."""
    base = workers.small_pipe()
    stage = Pretrain(
        base, PretrainConfig(batch=2, adapters=workers.SMALL, separation=SeparationConfig()), [several, encode_scenes(base, WORLD, 6, seed=4)]
    )  # fmt: skip
    metrics = [stage.step(i) for i in range(6)]
    assert all(m["skipped"] == 0 and m["attention_loss"] > 0 for m in metrics)
    two, asked = aligned(several)[0], []
    two.config = replace(two.config, separation=BindingConfig(mode="masks"))
    two.reward = lambda images, prompts, references: (
        asked.extend(references) or gspo.Scores([float(i.mean()) for i in images], {})
    )
    two.reward.num_failed = 0
    metrics = two.step(0)
    assert metrics["initial_log_ratio"] == 0 and metrics["skipped"] == 0
    known = [torch.stack(list(row)) for row in several.reference_images[:, ::2]]
    assert all(len(given) == 2 and any(torch.equal(torch.stack(list(given)), k) for k in known) for given in asked)
    config = EvaluateConfig(
        num_cases=2, num_sampling_steps=1, references_per_subject=2, separation=BindingConfig(mode="masks")
    )
    drawn = cases(base, config)
    assert crossing(base, drawn, config, owner_masks(drawn.masks)) == 0
    metrics, _ = evaluate(base, drawn, WorldJudges.load(), config)
    assert (metrics["leakage"] > 0).all()


def test_reference_shapes_are_buckets_too(pipe):
    shapes, small = (WIDE, (64, 64)), ((32, 32), TALL_REFERENCE)
    config = PretrainConfig(num_scenes=6, shapes=shapes, reference_shapes=small, world=WORLD)
    found = training_scenes(pipe, config)
    assert [(s.grid, s.reference_grid) for s in found] == [(g, r) for g in ((6, 12), (8, 8)) for r in ((4, 4), (4, 2))]
    assert sum(map(len, found)) == 6
    with pytest.raises(ValueError, match="reference_shapes must be a positive multiple of 8 pixels, got 20"):
        training_scenes(pipe, replace(config, reference_shapes=((20, 32),)))
    with pytest.raises(ValueError, match=r"reference_shapes must hold sizes \(height, width\)"):
        replace(config, reference_shapes=())
    changes = ["pretrain.reference_shapes=[[320,320],[384,320]]", "pretrain.world.references_per_subject=2"]
    planned = shape_of(resolve(recipe="flux1_dev_stage1", changes=changes))
    assert (planned.reference, planned.references, planned.references_per_subject) == ((24, 20), 4, 2)


# ---- binding


def test_boxes_become_the_tokens_that_they_cover_in_a_grid_that_is_not_square():
    """By hand: 3 rows, 6 columns of 8 pixels; a box of columns 1 to 2 and rows 0 to 1, and one on the right. Transposed they are others."""
    boxes = torch.tensor([[[8.0, 0.0, 24.0, 16.0], [32.0, 8.0, 48.0, 24.0]]])
    masks = masks_of_places(Places(boxes, torch.ones(1, 2)), (3, 6), (24, 48), margin=0.0).view(2, 3, 6)
    want = torch.zeros(2, 3, 6)
    want[0, 0:2, 1:3], want[1, 1:3, 4:6] = 1, 1
    assert torch.equal(masks, want)
    turned = masks_of_places(Places(boxes[..., [1, 0, 3, 2]], torch.ones(1, 2)), (3, 6), (24, 48), margin=0.0)
    assert not torch.equal(turned.view(2, 3, 6), want)


def crossing(pipe, scenes, config, owners, layout=None):
    """How much image tokens look at references that are not theirs, in any block and step."""
    maps = []
    layout = layout or by_subject(backbone_of(pipe).layout(16, scenes.grid, scenes.reference_grids), scenes.counts)
    with capture_subject_attention(pipe.transformer, layout, blocks=lambda _: True) as captured:
        hook = pipe.transformer.register_forward_hook(lambda *_: maps.append(captured.maps.clone()))
        draw_cases(pipe, scenes, config)
        hook.remove()
    return max(float((m * (1 - owners)).abs().max()) for m in maps)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_true_masks_hold_exactly_in_any_shape(pipe, shape):
    config = EvaluateConfig(num_cases=2, num_sampling_steps=2, shape=shape, separation=BindingConfig(mode="masks"))
    scenes = cases(pipe, config)
    owners = owner_masks(scenes.masks)
    assert crossing(pipe, scenes, config, owners) == 0
    rows, columns = scenes.grid
    turned = owners.unflatten(2, (columns, rows)).transpose(2, 3).flatten(2)
    assert crossing(pipe, scenes, config, turned) > 1e-3, "masks whose axes are exchanged are other masks"


@pytest.mark.parametrize("mode", ["draft", "in-flight", "attention", "masks"])
def test_two_references_of_one_person_are_kept_apart_from_the_other_in_any_shape(pipe, mode):
    """Image tokens of the first person see both of her references, of every shape, and not the other's."""
    pictures = [
        Image.new("RGB", size, colour) for size, colour in (((40, 20), "red"), ((20, 40), "orange"), ((30, 30), "blue"))
    ]
    pipeline, maps = MultiCrafterPipeline(pipe), []
    left = torch.zeros(WIDE)
    left[:, :48] = 1
    given = {"masks": [left, 1 - left]} if mode == "masks" else {}
    text = pipeline.backbone.encode_prompts(pipe, ["two people"]).embeds.shape[1]
    layout = pipeline.backbone.layout(text, (6, 12), [(3, 6), (6, 3), (4, 4)])
    with (
        capture_subject_attention(pipe.transformer, layout, blocks=lambda _: True) as captured,
        pytest.MonkeyPatch.context(),
    ):
        hook = pipe.transformer.register_forward_hook(lambda *_: maps.append(captured.maps[0].clone()))
        (picture,) = pipeline(
            "two people", pictures, size=WIDE, reference_size=32, reference_shape="own", references_per_subject=[2, 1], num_steps=3,
            separation=BindingConfig(mode=mode, draft_steps=1, bind_at=0.9), **given,
        )  # fmt: skip
        hook.remove()
    assert picture.size == (96, 48)
    binding, last = pipeline.bindings[0], maps[-1]
    if mode == "attention":
        both = torch.stack([last[0] + last[1], last[2]])
        assert float(both.min(0).values.max()) < float(both.max())
        return
    assert binding.masks.shape == (1, 2, 72)
    first, second = binding.masks[0]
    assert float(((last[0] + last[1]) * (1 - first)).max()) == 0 and float((last[2] * (1 - second)).max()) == 0
    if mode == "masks":
        turned = [left.T, 1 - left.T]
        with pytest.raises(
            ValueError, match=r"masks must have the proportions of the picture, 6 to 12 .*, got 96 x 48"
        ):
            pipeline(
                "two", pictures, size=WIDE, references_per_subject=[2, 1], num_steps=1, separation="masks", masks=turned
            )
        assert torch.equal(first.view(6, 12)[:, :6], torch.ones(6, 6)) and first.sum() == 36
        assert float(last[0][first.bool()].min()) > 0 and float(last[1][first.bool()].min()) > 0


# ---- evaluation and the command line


def test_evaluation_draws_and_scores_in_any_shape(pipe):
    config = EvaluateConfig(num_cases=2, num_sampling_steps=1, shape=WIDE)
    metrics, pictures = evaluate(pipe, cases(pipe, config), WorldJudges.load(), config)
    assert pictures.shape == (2, 3, *WIDE) and (metrics["leakage"] > 0).all()


@pytest.fixture
def references(tmp_path):
    scenes = make_scenes(1, WORLD, torch.Generator().manual_seed(0))
    paths = []
    for index, portrait in enumerate(scenes.references[0]):
        to_image(portrait).resize((40, 24)).save(tmp_path / f"{index}.png")
        paths += ["--reference", str(tmp_path / f"{index}.png")]
    return paths


def asked(tmp_path, references, *more):
    out = tmp_path / "out.png"
    return main(["generate", *references, "--prompt", "two people", "--steps", "1", "--out", str(out), *more]), out


def test_generate_takes_height_and_width_shapes_and_several_references(tmp_path, references):
    more = [
        "--reference",
        references[1],
        "--references-per-subject",
        "2",
        "1",
        "--reference-shape",
        "own",
        "--separation",
        "draft",
    ]
    code, out = asked(tmp_path, references, "--size", "48x96", *more, "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0 and Image.open(out).size == (96, 48)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", "48x"], "must be a side in pixels or HEIGHTxWIDTH, such as 512x768, got '48x'"),
        (["--size", "48x60"], "size must be a positive multiple of 8 pixels, got 60"),
        (["--references-per-subject", "2", "1"], "--references-per-subject must add up to the 2 given --reference, got [2, 1]"),
        (["--references-per-subject", "0", "2"], "must be a whole number of at least 1, got '0'"),
        (["--reference-shape", "round"], "invalid choice: 'round'"),
    ],
)  # fmt: skip
def test_generate_refuses_in_one_sentence(tmp_path, references, capsys, more, sentence):
    try:
        code, out = asked(tmp_path, references, *more)
    except SystemExit as error:
        code, out = error.code, tmp_path / "out.png"
    assert code == 2 and not out.exists()
    assert sentence in capsys.readouterr().err


def test_evaluate_takes_height_and_width(tmp_path):
    out = tmp_path / "found.json"
    assert (
        main(["evaluate", "--cases", "2", "--steps", "1", "--size", "48x96", "--separation", "none", "--out", str(out)])
        == 0
    )
    assert json.loads(out.read_text())["summary"]["identity"]
