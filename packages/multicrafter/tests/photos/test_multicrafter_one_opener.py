"""One opener for every picture: `id_reward.images`, also for the files of a dataset and for the drawn world's judges."""

from __future__ import annotations

import ast
from pathlib import Path

import multicrafter
import numpy as np
import pytest
import torch
from id_reward.images import as_array
from multicrafter.photos.pictures import open_planes
from multicrafter.photos.store import Store
from multicrafter.world.judges.people import as_tensor
from PIL import Image

SOURCE = Path(multicrafter.__file__).parent
MAY_OPEN = {
    "models/pictures.py": "_opened",  # masks, whose numbers count and not their colours
    "photos/pictures.py": "open_planes",  # masks of a dataset, one bit a subject
    "photos/stages.py": "_copyright",  # metadata only
    "photos/store.py": "open",  # a JPEG decoded smaller, then `to_rgb`
}
GRADIENT = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


def odd_pictures(folder: Path) -> dict[str, Path]:
    """Pictures that a bare ``Image.open(...).convert("RGB")`` misreads: turned, transparent, deep, with a palette."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(GRADIENT).save(folder / "turned.png", exif=exif)
    alpha = np.dstack([GRADIENT, np.full((4, 4), 100, np.uint8)])
    Image.fromarray(alpha).save(folder / "clear.png")
    Image.fromarray(GRADIENT[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    Image.fromarray(GRADIENT).quantize(8).save(folder / "palette.png", transparency=0)
    return {name: folder / f"{name}.png" for name in ("turned", "clear", "deep", "palette")}


@pytest.mark.parametrize("kind", ["turned", "clear", "deep", "palette"])
def test_a_dataset_is_read_by_the_one_opener(kind, tmp_path):
    path = odd_pictures(tmp_path)[kind]
    want = as_array(path)
    with Image.open(path) as bare:
        assert not np.array_equal(np.asarray(bare.convert("RGB")), want), "the case is one that a bare open misreads"
    store = Store(tmp_path, {}, [], {})
    assert np.array_equal(np.asarray(store.open(path.name)), want)
    assert np.array_equal(np.asarray(store.open(path.name, box=(1, 0, 3, 2))), want[:2, 1:3])


@pytest.mark.parametrize("kind", ["turned", "clear", "deep", "palette"])
def test_the_judges_of_the_drawn_world_see_what_everybody_sees(kind, tmp_path):
    path = odd_pictures(tmp_path)[kind]
    want = as_array(path).transpose(2, 0, 1) / np.float32(255)
    with Image.open(path) as opened:
        (seen,) = as_tensor([opened])
    assert torch.equal(seen, torch.from_numpy(np.ascontiguousarray(want)))
    (by_path,) = as_tensor([str(path)])
    assert torch.equal(by_path, seen)


def test_floats_in_0_1_and_tensors_stay_as_they_are_and_what_is_no_picture_is_refused():
    exact = np.full((2, 2, 3), 0.3003, np.float32)
    assert torch.equal(as_tensor([exact])[0], torch.full((3, 2, 2), 0.3003))
    tensor = torch.rand(3, 2, 2)
    assert as_tensor([tensor])[0] is tensor
    assert as_tensor([exact * 255])[0].max() <= 1, "0 to 255 is scaled, not taken for bright"
    for wrong in (np.full((2, 2, 3), np.nan), np.full((2, 2, 3), -3.0)):
        with pytest.raises(ValueError, match="must"):
            as_tensor([wrong])


def test_masks_of_a_dataset_are_not_made_pictures(tmp_path):
    planes = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(planes).save(tmp_path / "masks.png")
    store = Store(tmp_path, {}, [], {})
    assert np.array_equal(np.asarray(store.planes("masks.png")), planes)
    assert np.array_equal(np.asarray(open_planes((tmp_path / "masks.png").read_bytes())), planes)


def test_nothing_else_opens_pictures():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if name.endswith("Image.open"):
                    found.setdefault(path.relative_to(SOURCE).as_posix(), set()).add(function.name)
    assert found == {name: {function} for name, function in MAY_OPEN.items()}
