"""Figures: one call, a PNG that can be read, and pixels that follow the maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from idar import attention_profile
from idar.plot import plot_blocks, plot_maps, plot_profile, short_names

pytest.importorskip("matplotlib", reason="needs idar[plot]")
GRID = (4, 6)


def test_heat_is_where_the_map_is(tmp_path: Path) -> None:
    from matplotlib.image import imread

    maps = torch.zeros(2, 24)
    maps[0, 0], maps[1, 23] = 1, 1
    masks = (maps > 0).float()
    figure = plot_maps(
        torch.full((3, 40, 60), 0.5),
        maps,
        GRID,
        masks=masks,
        names=["A", "B"],
        references=[torch.rand(3, 8, 8)] * 2,
        path=tmp_path / "maps.png",
    )
    assert imread(tmp_path / "maps.png").ndim == 3
    assert [p.name for p in tmp_path.iterdir()] == ["maps.png"]
    shown = [axes for axes in figure.axes if axes.get_title() in ("A", "B")]
    for axes, hot in zip(shown, ((0, 0), (3, 5)), strict=True):
        heat = axes.images[1].get_array()
        assert heat.shape == GRID
        assert tuple(divmod(int(heat.argmax()), 6)) == hot
        assert list(axes.images[1].get_extent()) == [0, 60, 40, 0]
        vertices = (
            axes.collections[0].get_paths()[0].vertices
        )  # the outline surrounds the token, in the picture's pixels
        assert 10 * hot[0] - 2 <= vertices[:, 1].min() <= vertices[:, 1].max() <= 10 * hot[0] + 12
        assert 10 * hot[1] - 2 <= vertices[:, 0].min() <= vertices[:, 0].max() <= 10 * hot[1] + 12


def test_blocks_and_profile(tmp_path: Path) -> None:
    maps = torch.rand(3, 2, 1, 2, 24)
    blocks, sigmas = tuple(f"transformer_blocks.{i}.attn" for i in range(3)), (1.0, 0.5)
    plot_blocks(maps[:, :, 0, 0], GRID, blocks=blocks, sigmas=sigmas, path=tmp_path / "a.png")
    profile = attention_profile(maps, torch.rand(1, 2, 24).round(), blocks=blocks, sigmas=sigmas)
    figure = plot_profile(profile, path=tmp_path / "b.png")
    table = figure.axes[0].images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(table), profile.values["overlap"].mean(-1))
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}
    assert short_names([*blocks[:1], "single_transformer_blocks.7.attn", "x"]) == ["double 0", "single 7", "x"]


def test_bad_sizes_are_named() -> None:
    picture, maps = torch.zeros(3, 8, 8), torch.rand(2, 24)
    with pytest.raises(ValueError, match="grid"):
        plot_maps(picture, maps, (4, 5))
    with pytest.raises(ValueError, match="names"):
        plot_maps(picture, maps, GRID, names=["A"])
    with pytest.raises(ValueError, match="maps"):
        plot_blocks(torch.rand(1, 2, 24), GRID, blocks=("a",), sigmas=(1.0,))
