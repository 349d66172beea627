"""Which picture answers which prompt, and which runs may be compared."""

from __future__ import annotations

import copy

import pytest
from multicrafter.scoring.leaderboard import compare_runs, leaderboard
from multicrafter.scoring.manifest import Prompt, Reference, find_cases
from multicrafter.scoring.score import Scores, asked

DOG, PARK = Prompt(key="dog", prompt="a dog", references=()), Prompt(key="dog_park", prompt="a dog park", references=())


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def matched(prompts, folder):
    found = find_cases(prompts, folder)
    pictures = {}
    for case in found.cases:
        pictures.setdefault(case.group, []).append(case.picture.relative_to(folder).as_posix())
    return pictures, found.missing


@pytest.mark.parametrize(
    ("names", "pictures"),
    [
        (["dog_0.png", "dog_park_0.png"], {"dog": ["dog_0.png"], "dog_park": ["dog_park_0.png"]}),
        (["dog.png", "dog_park.png"], {"dog": ["dog.png"], "dog_park": ["dog_park.png"]}),
        (["dog_park_0.png", "dog_park_1.png"], {"dog_park": ["dog_park_0.png", "dog_park_1.png"]}),
        (["dog_2.png", "dog_10.png", "dog_1.png"], {"dog": ["dog_1.png", "dog_2.png", "dog_10.png"]}),
        (["dog_seed3.png", "dogs_0.png", "dog_old.png"], {"dog": ["dog_seed3.png"]}),
        (["dog.png", ".thumbs/dog.png", ".dog.png", "drawn/dog.png"], {"dog": ["dog.png"]}),
        (["dog_park.png", "drawn/dog.png", ".thumbs/dog.png"], {"dog_park": ["dog_park.png"]}),
        (["dog/out.png", "dog/ref_1.png"], {"dog": ["dog/out.png"]}),
        (
            ["images/dog.png", "images/dog_park_0.png"],
            {"dog": ["images/dog.png"], "dog_park": ["images/dog_park_0.png"]},
        ),
    ],
)
def test_a_picture_belongs_to_one_key(tmp_path, names, pictures):
    touch(tmp_path, *names)
    assert matched([DOG, PARK], tmp_path) == (pictures, [k for k in ("dog", "dog_park") if k not in pictures])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/dog.png", "b/dog.png"], "one run, but a and b both"),
        (["a/dog.png", "b/dog_park.png"], "one run, but a and b both"),
        (["dog.png", "dog.jpg"], "one picture of that name"),
        ([".thumbs/dog.png"], "but holds none"),
        (["dog_old.png", "dogs.png"], "but holds none"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(tmp_path, names, words):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=words):
        find_cases([DOG, PARK], tmp_path)


def test_what_is_asked_has_a_digest(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)

    def of(text="two people", name="a", **more):
        return asked(Prompt(key="0", prompt=text, references=(Reference(tmp_path / name, **more),)))

    assert of() == of(name="c"), "the bytes count, not the path"
    assert len({of(), of("three people"), of(name="b"), of(kind="object"), of(box=(0, 0, 0.5, 1))}) == 5


def scores(name, texts):
    cases = [
        {
            "key": k,
            "group": k,
            "category": "",
            "asked": t,
            "picture": "",
            "references": [],
            "faces": None,
            "metrics": {"aes": 0.5},
        }
        for k, t in texts.items()
    ]
    return Scores(name, {"judges": {}, "format": "native", "prompts": "".join(sorted(texts))}, cases)


def test_runs_of_different_prompts_are_not_ranked():
    a, b = scores("a", {"0": "x", "1": "y"}), scores("b", {"0": "x", "1": "y"})
    assert leaderboard([a, b]).rows
    assert compare_runs(a, b)[0]
    other = scores("other", {"0": "x", "1": "z"})
    for compared in (
        lambda: compare_runs(a, other),
        lambda: leaderboard([a, other]),
        lambda: compare_runs(a, other, strict=False),
    ):
        with pytest.raises(ValueError, match="'1' asks for something else"):
            compared()
    longer = scores("longer", {"0": "x", "1": "y", "2": "w"})
    with pytest.raises(ValueError, match="different prompt lists"):
        leaderboard([a, longer])
    assert any("2 cases are in both" in note for note in compare_runs(a, longer)[1])
    old = copy.deepcopy(b)
    for case in old.cases:
        del case["asked"]
    assert compare_runs(a, old)[0], "files of before say nothing about it"
