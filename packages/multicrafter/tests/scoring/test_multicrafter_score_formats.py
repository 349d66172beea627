"""Manifests, published prompt lists, and finding their pictures. The entries are made up, in the benchmarks' own fields."""

from __future__ import annotations

import json

import pytest
from multicrafter.scoring.manifest import find_cases, read_prompts


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


XVERSE = [
    {
        "index": 7, "input_images": [], "position_delta": [0, -32], "prompt": "A man polishes a lamp.",
        "modulation": [{"type": "adapter", "use_words": [], "src_inputs": [
            {"image_path": "assets/XVerseBench/human/05_man.jpg", "caption": "a man"},
            {"image_path": "assets/XVerseBench/object/09_lamp.jpg", "caption": "a lamp"},
        ]}],
    }
]  # fmt: skip
MULTIHUMAN = [
    {
        "people": ["data/faces/a.jpg", "data/faces/b.jpg"],
        "prompt": "Two people row a boat.",
        "attributes": [[1, 2, 1]],
        "vlm_questions": ["?"],
    }
]
MULTIID = [
    {
        "prompt": "Two women wave.",
        "image_paths": ["0004_1.jpg", "0004_2.jpg"],
        "ori_img_path": "num_2/0004.jpg",
        "name": ["person_1", "person_2"],
    }
]
OMNI = [
    {
        "key": "k1",
        "task_type": "multiple_character",
        "instruction": "Both sit on a bench.",
        "instruction_language": "en",
        "input_images": ["i/1.png", "i/2.png"],
    },
    {
        "key": "k2",
        "task_type": "single_object",
        "instruction": "The cup in snow.",
        "instruction_language": "en",
        "input_images": ["i/3.png"],
    },
]


def test_xverse(tmp_path):
    kind, (prompt,) = read_prompts(write(tmp_path / "x.json", XVERSE), root=tmp_path / "repo")
    assert (kind, prompt.key, prompt.people) == ("xverse", "7", 1)
    assert [r.kind for r in prompt.references] == ["human", "object"]
    assert prompt.references[0].image == tmp_path / "repo" / "assets/XVerseBench/human/05_man.jpg"
    touch(tmp_path / "out", "7_0.png", "7_1.png", "71.png", "8_0.png")
    found = find_cases([prompt], tmp_path / "out", format=kind)
    assert [c.picture.name for c in found.cases] == ["7_0.png", "7_1.png"]
    assert {c.group for c in found.cases} == {"7"} and len({c.key for c in found.cases}) == 2


def test_multihuman(tmp_path):
    kind, prompts = read_prompts(write(tmp_path / "m.json", MULTIHUMAN * 1501))
    assert kind == "multihuman" and (prompts[0].key, prompts[1500].key) == ("0", "1500")
    assert (prompts[0].category, prompts[1500].category) == ("simple, 2 people", "complex, 2 people")
    touch(tmp_path / "out", "0.png", "1500.png")
    found = find_cases(prompts, tmp_path / "out")
    assert [c.key for c in found.cases] == ["0", "1500"] and len(found.missing) == 1499


def test_multiid_index_and_layout(tmp_path):
    kind, (prompt,) = read_prompts(write(tmp_path / "v.json", MULTIID))
    assert (kind, prompt.key, prompt.people, prompt.target) == ("multiid", "0004", 2, tmp_path / "num_2/0004.jpg")
    layout = tmp_path / "layout"
    touch(layout / "a", "out.jpg", "ref_1.jpg", "ref_2.jpg", "ref_10.jpg", "ori.jpg")
    (layout / "a" / "meta.json").write_text('{"prompt": "three people"}')
    kind, prompts = read_prompts(layout)
    assert [r.image.name for r in prompts[0].references] == ["ref_1.jpg", "ref_2.jpg", "ref_10.jpg"]
    assert find_cases(prompts, layout).cases[0].picture == layout / "a" / "out.jpg"


def test_omnicontext_json_lines_parquet_and_its_folders(tmp_path):
    kind, prompts = read_prompts(write(tmp_path / "o.jsonl", OMNI))
    assert kind == "omnicontext" and [p.people for p in prompts] == [2, 0]
    touch(
        tmp_path / "out",
        "fullset/multiple_character/k1.png",
        "fullset/single_object/k1.png",
        "fullset/single_object/k2.png",
    )
    found = find_cases(prompts, tmp_path / "out")
    assert [c.picture.relative_to(tmp_path / "out").parts[1] for c in found.cases] == [
        "multiple_character",
        "single_object",
    ]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{**row, "input_images": [{"bytes": b"png", "path": None} for _ in row["input_images"]]} for row in OMNI]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "o.parquet")
    _, again = read_prompts(tmp_path / "o.parquet")
    assert again[0].references[0].image == b"png" and again[0].prompt == prompts[0].prompt


def test_our_manifest(tmp_path):
    rows = [
        {
            "picture": "a b.png",
            "prompt": "two friends",
            "references": ["r/1.png", {"image": "r/2.png", "kind": "object"}],
            "target": "t.png",
            "count": 3,
        },
        {"key": "x", "prompt": "nobody", "category": "empty"},
    ]
    kind, prompts = read_prompts(write(tmp_path / "m.jsonl", rows), root=tmp_path)
    assert kind == "native" and [p.key for p in prompts] == ["a b", "x"]
    assert prompts[0].people == 3 and prompts[0].target == tmp_path / "t.png" and prompts[1].references == ()
    touch(tmp_path / "out", "a b.png", "x.webp")
    assert [c.picture.name for c in find_cases(prompts, tmp_path / "out").cases] == ["a b.png", "x.webp"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": " "}], "prompt"),
        ([{"prompt": "x", "references": [3]}], "reference"),
        ([{"prompt": "x", "references": [{"image": "a", "kind": "dog"}]}], "human or object"),
        ([{"prompt": "x", "references": [{"image": "a", "box": [0, 0, 100, 50]}]}], "shares"),
        ([{"prompt": "x", "count": -1}], "count"),
        ([{"key": "a", "prompt": "x"}, {"key": "a", "prompt": "y"}], "twice"),
        ([{"text": "x"}], "fields"),
        ([], "at least one"),
        ("text", "list of objects"),
        ([{"prompt": "x", "modulation": [{"src_inputs": [{"caption": "a"}]}]}], "image_path"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        read_prompts(write(tmp_path / "m.json", rows))


def test_files_that_are_no_manifest(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="manifest"):
            read_prompts(path)


def test_pictures_that_answer_nothing(tmp_path):
    _, prompts = read_prompts(write(tmp_path / "m.json", [{"key": "a", "prompt": "x"}]))
    touch(tmp_path / "out", "b.png")
    with pytest.raises(ValueError, match=r"a\.png"):
        find_cases(prompts, tmp_path / "out")
    with pytest.raises(ValueError, match="folder"):
        find_cases(prompts, tmp_path / "nowhere")
