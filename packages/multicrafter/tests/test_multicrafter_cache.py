"""Encoded texts and pictures on disk: the same numbers, computed once, never stale."""

from __future__ import annotations

from dataclasses import replace

import multicrafter_workers as workers
import pytest
import torch
from multicrafter.models import placing
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.loaded import LoadedModel
from multicrafter.training import distributed, precision, runs
from multicrafter.training.checkpoint import CheckpointError
from multicrafter.training.encoding_cache import (
    CachedPictures,
    CachedText,
    TensorCache,
    content_key,
    free_encoders,
    model_key,
)
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import WorldConfig
from multicrafter.world.tiny_backbones import tiny_qwen

CAPTIONS = ["two people in a park", "one person", "two people in a park"]


def test_cached_text_equals_fresh_text_and_survives_the_encoders(pipe, tmp_path):
    fresh = backbone_of(pipe).encode_prompts(pipe, CAPTIONS)
    memory, disk = CachedText(pipe, CAPTIONS), CachedText(pipe, CAPTIONS, tmp_path)
    assert memory.num_tokens == disk.num_tokens == fresh.embeds.shape[1]
    free_encoders(pipe, vae=True)
    assert pipe.text_encoder is None and pipe.text_encoder_2 is None and pipe.vae is None
    for text in (memory(CAPTIONS), disk(CAPTIONS)):
        assert torch.allclose(text.embeds, fresh.embeds, atol=1e-6) and torch.allclose(
            text.pooled, fresh.pooled, atol=1e-6
        )
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # one caption came twice


def test_nothing_is_encoded_twice(pipe, tmp_path, monkeypatch):
    calls, backbone = [], type(backbone_of(pipe))
    real = backbone.encode_pictures
    monkeypatch.setattr(backbone, "encode_pictures", lambda *a: calls.append(len(a[2])) or real(*a))
    pictures = torch.rand(3, 3, 32, 32)
    first = CachedPictures(pipe, tmp_path)(pictures)
    assert sum(calls) == 3
    assert torch.equal(CachedPictures(pipe, tmp_path)(pictures), first)  # another run
    assert sum(calls) == 3
    CachedPictures(pipe, tmp_path)(torch.cat([pictures[:1], torch.rand(1, 3, 32, 32)]))
    assert sum(calls) == 4
    assert torch.allclose(first, real(backbone_of(pipe), pipe, pictures), atol=1e-6)


def test_other_weights_or_tokenizers_make_other_entries(pipe, tmp_path):
    CachedText(pipe, CAPTIONS, tmp_path)
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).add_(0.1)
    fresh = backbone_of(pipe).encode_prompts(pipe, CAPTIONS)
    assert torch.allclose(CachedText(pipe, CAPTIONS, tmp_path)(CAPTIONS).embeds, fresh.embeds, atol=1e-6)
    pipe.tokenizer_2.model_max_length -= 2
    assert CachedText(pipe, CAPTIONS, tmp_path).num_tokens == fresh.embeds.shape[1] - 2


def test_text_that_sees_references_is_kept_with_its_scenes(tmp_path, monkeypatch):
    """From disk and from memory: what encoding the prompts with their references gives; another reference is another entry."""
    pipe = tiny_qwen()
    backbone, world = backbone_of(pipe), WorldConfig(numbers=(2,), shared_attributes=4)
    memory, disk = (encode_scenes(pipe, world, 3, seed=1, cache=folder) for folder in (None, tmp_path))
    calls, real = [], type(backbone).encode_prompts_with
    monkeypatch.setattr(type(backbone), "encode_prompts_with", lambda *a: calls.append(a[2]) or real(*a))
    again = encode_scenes(pipe, world, 4, seed=1, cache=tmp_path, chunk=4)
    assert len(calls) == 1 + sum(a != b for a, b in zip(disk.captions, again.captions, strict=False))
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        fresh = real(
            backbone, pipe, [memory.captions[2], memory.captions[0]], [list(memory.reference_images[r]) for r in rows]
        )
    for scenes in (memory, disk):
        text = scenes.encode_text(LoadedModel.of(pipe), rows)
        assert torch.equal(text.embeds, fresh.embeds)
        assert (text.mask is None) == (fresh.mask is None) and (text.mask is None or torch.equal(text.mask, fresh.mask))
        assert torch.equal(
            scenes.encode_text(LoadedModel.of(pipe), slice(0, 1)).embeds,
            text.embeds[1:, : (scenes.text([0]).embeds.shape[1])],
        )
    stage = CachedText(pipe, [], tmp_path)
    assert stage.num_tokens == 0, "nothing else is encoded"
    with pytest.raises(ValueError, match="scenes must hold their text for qwen_image_edit"):
        replace(memory, text=None).encode_text(LoadedModel.of(pipe), rows)


def test_a_damaged_entry_is_made_anew_and_a_lost_one_is_named(tmp_path):
    cache = TensorCache(tmp_path, "m")
    key = content_key("a")
    cache.fill({key: "a"}, lambda texts: {"x": torch.ones(len(texts), 2)})
    cache.path(key).write_bytes(b"half")
    assert cache.fill({key: "a"}, lambda texts: {"x": torch.ones(len(texts), 2)}) == 1
    assert torch.equal(cache.stack([key])["x"], torch.ones(1, 2))
    cache.path(key).unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        cache.stack([key])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be writable"):
        TensorCache(tmp_path / "file", "m").write(key, {"x": torch.ones(1)})


def test_keys_tell_apart_what_differs():
    a = torch.zeros(2, 3)
    keys = [content_key(a), content_key(a.T.contiguous()), content_key(a.half()), content_key(a + 1), content_key("a")]
    assert len(set(keys)) == len(keys)
    linear = torch.nn.Linear(2, 2)
    assert model_key(linear) == model_key(linear) != model_key(linear, note="x")


def shared_fill(folder):
    cache = TensorCache(folder, "m")
    contents = {content_key(str(i)): str(i) for i in range(7)}
    made = cache.fill(contents, lambda texts: {"x": torch.tensor([[float(t)] for t in texts])}, batch=2)
    assert sum(distributed.gather_objects(made)) == 7 and made in (3, 4)
    assert cache.stack(list(contents))["x"].flatten().tolist() == [float(i) for i in range(7)]


def test_ranks_share_the_work(tmp_path):
    workers.run(shared_fill, str(tmp_path / "cache"), world=2, tmp=tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_trains_from_the_cache_without_text_encoders(number, tmp_path):
    plain = workers.make_stage(number)
    cached = workers.make_stage(number, execution={"cache": str(tmp_path)})
    if number == 2:
        free_encoders(cached.model.pipe)
    for stage in (plain, cached):
        for index in range(2):
            stage.step(index)
    for (name, a), (_, b) in zip(plain.adapters.named_parameters(), cached.adapters.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_text_encoders_leave_the_card_before_the_transformer_comes(number, cached, tmp_path, monkeypatch):
    """Before the first step, as `multicrafter plan` counts; without a cache they come back when a prompt is to be encoded."""
    model, moved = LoadedModel.of(workers.small_pipe()), []
    encoders, tensors = list(model.text_encoders), placing._tensors
    for encoder in encoders:
        monkeypatch.setattr(encoder, "to", lambda device, encoder=encoder: moved.append((encoder, device)))
    there = [torch.ones(1, device="meta")]
    monkeypatch.setattr(placing, "_tensors", lambda m: there if any(m is e for e in encoders) else tensors(m))
    place = precision.place_transformer
    monkeypatch.setattr(precision, "place_transformer", lambda *a, **k: (moved.append("transformer"), place(*a, **k)))
    monkeypatch.setattr(runs.loop, "run", lambda stage, **_: pytest.fail("seen"))
    cache = str(tmp_path / "cache") if cached else None
    scenes = encode_scenes(model, WorldConfig(numbers=(2,), shared_attributes=4), 4, seed=3, cache=cache)
    if number == 1:
        config = runs.with_execution(workers.STAGE1, cache=cache)

        def run():
            runs.run_pretrain(model, config, tmp_path / "out", scenes=scenes)
    else:
        config, adapters = (
            runs.with_execution(workers.STAGE2, cache=cache),
            Adapters(model.transformer, workers.SMALL),
        )

        def run():
            runs.run_align(model, adapters, config, tmp_path / "out", scenes=scenes, reward=workers.Brightness())

    with pytest.raises(pytest.fail.Exception, match="seen"):
        run()
    assert moved[-3:] == [*((encoder, torch.device("cpu")) for encoder in encoders), "transformer"]
