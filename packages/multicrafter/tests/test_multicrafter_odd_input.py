"""What strangers handed over and what came of it: each of these was a wrong number, a lost file, a traceback, a hang or a memory bomb once."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch
from multicrafter import UserError, load_into
from multicrafter.cli import main
from multicrafter.cli.options import apart, ours, positive, real, seed, writable
from multicrafter.config import settings
from multicrafter.config.recipes import tiny_stage1
from multicrafter.files import parse_json, read_json
from multicrafter.models.adapters import AdapterConfig, Adapters, check_shapes
from multicrafter.models.binding import BindingConfig
from multicrafter.models.pictures import coverage, lists_of
from multicrafter.models.publish import save_pretrained
from multicrafter.photos.notes import read_notes
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.manifest import read_prompts
from multicrafter.scoring.score import Scores
from multicrafter.training.pretrain_config import PretrainConfig
from PIL import Image

NAN = float("nan")
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def refused(capsys, folder: Path, *argv: object) -> str:
    """The sentence of a command that must refuse and change nothing."""
    before = contents(folder)
    assert main([str(a) for a in argv]) == 2
    assert contents(folder) == before
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


# consent


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,consent,consent\na.png,no,yes\n", "'consent' is there twice"), ("file_name,file_name,consent\na.png,b.png,no\n", "twice"),
        ("a.png,no\n", "must have a column file_name"), ('file_name,caption,consent\na.png,"a,no\nb.png,b,no\n', "must be CSV"),
        ("file_name,consent,minor\na.png,no\n", "as many values as columns"), ("", "must have a column file_name"),
    ],
)  # fmt: skip
def test_a_no_in_a_table_is_not_lost(tmp_path, text, words):
    """Of two columns the last counted, a table without names said nothing, and an open quote swallowed the next photo's answer."""
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_notes(tmp_path)


def test_metadata_that_never_ends_or_is_no_file(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "consent": "no", "source": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1: must be JSON"):
        read_notes(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match="must be a file"):
        read_notes(tmp_path)


# files that are read


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}', "{", ""])
def test_json_that_means_nothing_or_two_things(text, tmp_path):
    with pytest.raises(UserError, match="x must be JSON"):
        parse_json(text, "x")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="must be JSON"):
        read_json(tmp_path / "x.json")


def test_json_with_a_mark_is_read_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]\r\n")
    assert read_json(tmp_path / "x.json") == [1]
    os.mkfifo(tmp_path / "p.json")
    for path in (tmp_path / "p.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="must be a file"):
            read_json(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"references": "r.png"}, "references must be a list, got 'r.png'"), ({"references": {"image": "r.png"}}, "references must be a list"),
        ({"refrences": ["r.png"]}, "'refrences' must be spelled 'references'"), ({"count": True}, "count must be a whole number"),
        ({"references": [{"image": "r.png", "box": ["0", "0", "1", "1"]}]}, "box must be"), ({"key": None}, "key must be"),
        ({"references": [{"image": "r.png", "box": {"a": 1, "b": 2, "c": 3, "d": 4}}]}, "box must be"), ({"key": ["0"]}, "key must be"),
        ({"key": ""}, "every key must name a picture"),
    ],
)  # fmt: skip
def test_entries_of_a_manifest(row, words, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([{"prompt": "a", **row}]))
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / "m.json")


def test_manifests_of_others_and_lines(tmp_path):
    for name, row in (
        ("people", {"prompt": "a", "people": "r.png", "vlm_questions": []}),
        ("image_paths", {"prompt": "a", "image_paths": "r.png", "ori_img_path": "0.png"}),
    ):
        (tmp_path / "m.json").write_text(json.dumps([row]))
        with pytest.raises(UserError, match=f"{name} must be a list, got 'r.png'"):
            read_prompts(tmp_path / "m.json")
    row = {"key": "0", "task_type": "character", "instruction": 5, "input_images": ["r.png"]}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="must be a sentence, got 5"):
        read_prompts(tmp_path / "m.json")
    (tmp_path / "m.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(UserError, match="JSON, JSON lines or Parquet"):
        read_prompts(tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text(
        '{"prompt": "two\u2028people"}\n', encoding="utf-8"
    )  # a line of JSON, whatever else ends lines
    assert read_prompts(tmp_path / "m.jsonl")[1][0].prompt == "two\u2028people"


def scores(**changes):
    case = {"key": "0", "group": "0", "category": "", "metrics": {"aes": 0.5}}
    about = {"judges": {}, "format": "native", "prompts": "x"}
    return {"schema": 1, "name": "a", "about": about, "cases": [case], "missing": [], "problems": [], **changes}


def test_scores_that_are_none(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores()))
    good = Scores.load(path).cases[0]
    for wrong in (
        {"cases": []}, {"cases": {}}, {"about": {}}, {"about": []}, {"about": {**scores()["about"], "judges": "a"}}, {"name": 5}, {"name": " "},
        {"missing": 5}, {"cases": [good, good]},
        *({"cases": [{**good, "metrics": m}]} for m in ({"aes": "high"}, {"aes": [1]}, {"aes": True}, [])),
        {"cases": [{**good, "key": {}}]}, {"cases": [{**good, "group": [1]}]}, {"cases": [{**good, "metrics": {"aes": NAN}}]},
    ):  # fmt: skip
        path.write_text(json.dumps(scores(**wrong)))
        with pytest.raises(UserError, match="must be written by multicrafter evaluate"):
            Scores.load(path)


# files that are written


def test_what_is_read_is_never_written_over(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(scores(name="a")))
    (tmp_path / "b.json").write_text(json.dumps(scores(name="b")))
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "dir.json").mkdir()
    compare = ("compare", tmp_path / "a.json", tmp_path / "b.json", "--out")
    for name, words in (
        ("a.json", "which is read"), ("link.json", "which is read"), ("notes.json", "did not write"), ("dir.json", "must be a file"),
        ("a.json/x.json", "must be writable"), ("x" * 300 + ".json", "a name that a file can have"),
    ):  # fmt: skip
        assert words in refused(capsys, tmp_path, *compare, tmp_path / name)
    assert "must be writable" in refused(
        capsys, tmp_path, "leaderboard", tmp_path / "a.json", "--out", tmp_path / "a.json" / "x.md"
    )
    assert (
        main([str(a) for a in (*compare, tmp_path / "c.json")])
        == main([str(a) for a in (*compare, tmp_path / "c.json")])
        == 0
    )


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(UserError, match="a name that a file can have"):
        writable(tmp_path / "a\0b.png", file=True)


def test_runs_without_a_common_metric_and_names_that_end_a_cell(tmp_path, capsys):
    """Nothing was compared, and said nothing; a bar in a run's name moved the numbers into other columns."""
    (tmp_path / "a.json").write_text(json.dumps(scores(name="a|b\nc")))
    (tmp_path / "b.json").write_text(
        json.dumps(scores(name="b", cases=[{**scores()["cases"][0], "metrics": {"clip_t": 0.2}}]))
    )
    assert "must share a metric, got aes and " in refused(
        capsys, tmp_path, "compare", tmp_path / "a.json", tmp_path / "b.json"
    )
    assert main(["leaderboard", str(tmp_path / "a.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith(r"| a\|b c | **0.50") and len(table) == 3


def test_a_plan_does_not_take_the_place_of_its_configuration(tmp_path):
    for wrong in (tmp_path / "run.yaml", tmp_path / "sub" / ".." / "run.yaml"):
        with pytest.raises(UserError, match="which is read"):
            apart(wrong, tmp_path / "run.yaml")
    (tmp_path / "x.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        ours(tmp_path / "x.txt", "run")


def test_reports_of_others_stay(tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "0.png")
    (tmp_path / "m.json").write_text('[{"prompt": "a"}]')
    for name in ("report.html", "scores.json"):
        (tmp_path / name.replace(".", "_")).mkdir()
        (tmp_path / name.replace(".", "_") / name).write_text("mine")
        words = refused(
            capsys, tmp_path, "evaluate", "--pictures", tmp_path, "--manifest", tmp_path / "m.json", "--out", tmp_path / name.replace(".", "_")
        )  # fmt: skip
        assert "would overwrite" in words
    (tmp_path / "notes.json").write_text("[1]")
    assert "would overwrite" in refused(capsys, tmp_path, "evaluate", "--cases", 1, "--out", tmp_path / "notes.json")


def test_a_sheet_is_no_reference_and_no_picture(tmp_path, capsys):
    """``--sheet`` could be one of the references, which was then gone."""
    for name in ("a", "b", "m"):
        Image.fromarray(PIXELS if name != "m" else HALF).save(tmp_path / f"{name}.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    given = (
        "generate",
        "--prompt",
        "x",
        "--steps",
        1,
        "--reference",
        tmp_path / "a.png",
        "--reference",
        tmp_path / "b.png",
    )
    for more in (["b.png"], ["link.png"], ["m.png", "--separation", "masks", "--mask", tmp_path / "m.png"]):
        assert "--sheet must be" in refused(
            capsys, tmp_path, *given, "--out", tmp_path / "o.png", "--sheet", tmp_path / more[0], *more[1:]
        )
    assert "--sheet must be" in refused(
        capsys, tmp_path, *given, "--out", tmp_path / "o.png", "--num-images", 2, "--sheet", tmp_path / "o_1.png"
    )


def test_people_are_drawn_where_they_can_be_and_over_nothing(tmp_path, capsys):
    (tmp_path / "f").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "a.png").symlink_to(tmp_path / "nowhere" / "x")
    for name in ("f", "f/x", "half", "x" * 300):
        refused(capsys, tmp_path, "draw-references", "--out", tmp_path / name)
    assert not (tmp_path / "nowhere").exists()
    for wrong in ("1" + "0" * 30, "x", "1.5", "1_000", "٣", "--1", "+1", ""):
        with pytest.raises(ArgumentTypeError, match="whole number"):
            seed(wrong)
    assert seed("-7") == -7 and real("-1e3") == -1000
    for wrong in ("1_0.5", "٣", "1e400", "nan"):
        with pytest.raises(ArgumentTypeError, match="finite number"):
            real(wrong)
    with pytest.raises(ArgumentTypeError, match="whole number of at least 1"):
        positive("²")


def test_a_folder_of_somebody_else_keeps_its_readme(tmp_path, pipe):
    pipeline = MultiCrafterPipeline(pipe, Adapters(pipe.transformer, AdapterConfig(rank=2, num_experts=0)))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    for folder, words in (
        (tmp_path / "project", "README.md of somebody else"),
        (tmp_path / "project" / "README.md" / "x", "can be made"),
    ):
        with pytest.raises(UserError, match=words):
            save_pretrained(pipeline, folder)
    assert [p.name for p in (tmp_path / "project").iterdir()] == ["README.md"]
    save_pretrained(pipeline, tmp_path / "new")
    save_pretrained(pipeline, tmp_path / "new")


def test_a_guidance_of_nought_is_nought(monkeypatch):
    """It was taken for none and replaced by the adapter's."""
    import multicrafter.scoring.evaluate as scoring

    asked = []
    monkeypatch.setattr(
        scoring,
        "EvaluateConfig",
        lambda **given: asked.append(given["guidance"]) or (_ for _ in ()).throw(LookupError),
    )
    for guidance in (["--guidance", "0"], [], ["--guidance", "3"]):
        with pytest.raises(LookupError):
            main(["evaluate", "--cases", "1", *guidance])
    assert asked[0] == 0 and asked[1] > 0 and asked[2] == 3


# configurations


@pytest.mark.parametrize(
    "text",
    [
        "pretrain:\n  num_steps: 7\n  num_steps: 8\n", "pretrain: {num_steps: 7}\npretrain: {batch: 2}\n", "pretrain: {num_steps: 010}\n",
        "pretrain: {num_steps: 1:30}\n", "pretrain: {lr: 1:30.5}\n", "pretrain: " + "[" * 4_000, "pretrain: !!python/name:os.system x\n",
        "pretrain: {num_steps: " + "9" * 5000 + "}\n",
    ],
)  # fmt: skip
def test_yaml_that_is_not_what_it_looks_like(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="must be YAML"):
        settings.read(tmp_path / "c.yaml")


def test_what_stays_readable(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1_000, y: -3, z: 1.5e-3, w: 0}\nb: {<<: *a, x: 2}\n")
    assert settings.read(tmp_path / "c.yaml") == {
        "a": {"x": 1000, "y": -3, "z": 1.5e-3, "w": 0},
        "b": {"x": 2, "y": -3, "z": 1.5e-3, "w": 0},
    }
    os.mkfifo(tmp_path / "p.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        settings.read(tmp_path / "p.yaml")


def test_a_few_lines_that_stand_for_gigabytes_are_named_in_a_few_words(tmp_path):
    lines = [
        "- &a [x,x,x,x,x,x,x,x,x]",
        *(f"- &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(12)),
    ]
    (tmp_path / "c.yaml").write_text("num_steps:\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="num_steps must be int") as caught:
        settings.from_dict(PretrainConfig, settings.read(tmp_path / "c.yaml"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("num_steps=010", "readable YAML"), ("num_steps=" + "9" * 400, "64 bits"), ("pretrain.num_steps=" + "[" * 4_000, "readable YAML"),
        ("pretrain.idar.kind=[dice]", "must be one of"),
    ],
)  # fmt: skip
def test_overrides_that_are_not_what_they_look_like(change, words):
    with pytest.raises(UserError, match=words):
        settings.override(tiny_stage1(), [change])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 1.5}, "num_steps"), ({"num_steps": "2"}, "num_steps"), ({"num_steps": True}, "num_steps"), ({"batch": None}, "batch"),
        ({"seed": 1.5}, "seed"), ({"seed": 10**30}, "seed"), ({"lr": "0.1"}, "lr"), ({"lr": True}, "lr"), ({"shapes": 3}, "shapes"),
        ({"shapes": [64]}, r"shapes\[0\]"), ({"schedule": None}, "schedule"), ({"adapters": {"rank": 2}}, "adapters"), ({"data": 5}, "data"),
    ],
)  # fmt: skip
def test_every_setting_is_of_its_type(options, words):
    with pytest.raises(UserError, match=f"{words} must be"):
        PretrainConfig(**options)


def test_settings_of_numpy_are_written_down_as_numbers(tmp_path):
    made = PretrainConfig(
        num_steps=np.int64(3), lr=np.float32(0.5), data=tmp_path, shapes=[[64, np.int32(32)]], seed=torch.tensor(2)
    )
    assert (type(made.num_steps), type(made.lr), made.shapes, made.seed, made.data) == (
        int,
        float,
        ((64, 32),),
        2,
        str(tmp_path),
    )
    assert json.loads(json.dumps(settings.to_dict(made)))["num_steps"] == 3


# pictures, masks, prompts


def test_masks_are_upright_opaque_and_one(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    mask = Image.fromarray(HALF)
    mask.save(tmp_path / "turned.png", exif=turned)
    mask.rotate(-90, expand=True).save(tmp_path / "upright.png")
    assert torch.equal(coverage(tmp_path / "turned.png"), coverage(tmp_path / "upright.png"))
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(coverage(opened), coverage(tmp_path / "upright.png"))
    Image.fromarray(np.dstack([HALF] * 4)).save(tmp_path / "clear.png")
    palette = mask.convert("P")
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png")
    mask.save(tmp_path / "two.gif", save_all=True, append_images=[Image.fromarray(255 - HALF)])
    (tmp_path / "bad.png").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("clear.png", "palette.png", "two.gif", "bad.png", "none.png", ".", "pipe.png"):
        with pytest.raises(UserError):
            coverage(tmp_path / name)
    labels = np.zeros((8, 8), np.uint8)
    labels[:, :4] = 2
    for wrong in (
        labels,
        labels.astype(np.uint16) * 100,
        np.dstack([HALF] * 4),
        np.ma.array(HALF, mask=True),
        torch.zeros(2, 2, device="meta"),
    ):
        with pytest.raises(UserError):
            coverage(wrong)
    assert coverage(labels == 2).mean() == 0.5


def test_a_mask_of_the_command_line_is_that_of_python(tmp_path, capsys):
    for name in ("a", "b"):
        Image.fromarray(PIXELS).save(tmp_path / f"{name}.png")
    Image.fromarray(np.dstack([HALF] * 4)).save(tmp_path / "clear.png")
    message = refused(
        capsys, tmp_path, "generate", "--prompt", "x", "--reference", tmp_path / "a.png", "--out", tmp_path / "o.png", "--separation", "masks",
        "--mask", tmp_path / "clear.png",
    )  # fmt: skip
    assert "opaque" in message


@pytest.fixture
def pipeline(pipe):
    return MultiCrafterPipeline(pipe)


def draw(pipeline, **options):
    given = {
        "prompt": "two people",
        "references": [Image.fromarray(PIXELS)] * 2,
        "num_steps": 1,
        "output_type": "latent",
        "size": 32,
        **options,
    }
    return pipeline(given.pop("prompt"), given.pop("references"), **{"reference_size": 16, **given})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "prompt must be a text"), ({"prompt": 3}, "prompt must be a text"), ({"prompt": {"a": 1}}, "prompt must be a text"),
        ({"prompt": {"a"}}, "prompt must be a text"), ({"prompt": "a \udcff b"}, "UTF-8"), ({"negative_prompt": 5}, "negative_prompt must be"),
        ({"num_steps": 10**9}, "num_steps must be at most 10,000"), ({"references_per_subject": 2}, "references_per_subject must be a list"),
        ({"references": {"a": PIXELS}}, "references must be pictures"), ({"references": {"a.png"}}, "references must be pictures"),
        ({"separation": "masks", "masks": 5}, "masks must be pictures"), ({"progress": 5}, "progress must be a function"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function"), ({"callback_on_step_end": lambda *a: [1]}, "a dictionary"),
        ({"callback_on_step_end": lambda *a: {"latents": torch.zeros(1)}}, "latents of shape"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_meant(pipeline, options, words):
    with pytest.raises(UserError, match=words):
        draw(pipeline, **options)


def test_no_negative_prompt_is_an_empty_one(pipeline):
    """None is what diffusers' own pipelines have."""
    assert torch.equal(
        draw(pipeline, negative_prompt=None, true_guidance=2.0)[0],
        draw(pipeline, negative_prompt="", true_guidance=2.0)[0],
    )


@pytest.mark.parametrize(
    "options",
    [
        {"draft_steps": 1.5},
        {"draft_steps": "3"},
        {"draft_steps": 10**9},
        {"bind_at": "a"},
        {"strength": "1"},
        {"sigmas": (0,)},
        {"sigmas": 0.5},
        {"arrows": 5},
    ],
)  # fmt: skip
def test_bindings_that_cannot_be_meant(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}.* must be"):
        BindingConfig(mode="draft", **options)


def test_pictures_of_data_sets_are_pictures(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    given = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert lists_of([given, (tmp_path / "a.png").read_bytes()], 1, name="references") == [
        [given, (tmp_path / "a.png").read_bytes()]
    ]


# adapters


class Other:
    """No pipeline."""


@pytest.mark.parametrize("wrong", [None, "a", Other(), torch.nn.Linear(2, 2)])
def test_an_adapter_goes_on_a_pipeline(wrong, pipe):
    with pytest.raises(UserError, match="pipe must be a pipeline of diffusers with a transformer"):
        load_into(wrong, "adapter")
    for adapter in (None, 5):
        with pytest.raises(UserError, match="adapter must be a folder or a hub id"):
            load_into(pipe, adapter)


def test_experts_that_are_not_there_cost_no_memory():
    """``num_experts`` of a plain adapter's adapter.json was believed: 512 GB were asked for."""
    plain = {"transformer_blocks.0.attn.to_q.lora_A.default.weight": torch.zeros(2, 4)}
    with pytest.raises(UserError, match="must hold tensors of 1000000000 experts"):
        check_shapes("adapter", plain, AdapterConfig(rank=2, num_experts=10**9))


def test_half_an_adapter_does_not_stay(pipe, monkeypatch):
    import multicrafter.models.adapters as adapters

    def full(*_, **__):
        raise MemoryError

    before = dict(pipe.transformer.state_dict())
    monkeypatch.setattr(adapters, "inject", full)
    with pytest.raises(MemoryError):
        Adapters(pipe.transformer, AdapterConfig(rank=2))
    assert not getattr(pipe.transformer, "peft_config", None)
    assert {n.replace("base_layer.", "") for n in pipe.transformer.state_dict()} == set(before)
