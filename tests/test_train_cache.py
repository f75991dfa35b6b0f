"""The feature cache: the encoder hears every recording once, and a run learns the same whatever the cache holds."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RATE, speech
from test_train import arguments
from transformers.utils import logging as transformers_logging

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder
from fastlongspeech.train import cache as feature_cache
from fastlongspeech.train import ctc, dct
from fastlongspeech.train.cache import MISSING, FeatureCache, describe_encoder


@pytest.fixture
def model(checkpoint: Path) -> FastLongSpeechForConditionalGeneration:
    return FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint).eval().requires_grad_(False)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(transformers_logging._get_library_root_logger(), "propagate", True)
    monkeypatch.setattr(feature_cache, "logger", logging.getLogger("fastlongspeech.cache"))
    return caplog


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows the encoder has read, batch by batch."""
    windows: list[int] = []
    forward = FastLongSpeechEncoder.forward

    def spy(self, input_features, mel_frames):
        windows.append(len(input_features))
        return forward(self, input_features, mel_frames)

    monkeypatch.setattr(FastLongSpeechEncoder, "forward", spy)
    return windows


@pytest.fixture
def hear(model, processor) -> Callable[..., torch.Tensor]:
    """Frames of recordings by way of a cache."""

    def frames(cache: FeatureCache, *recordings) -> torch.Tensor:
        of_processor, of_model = cache.listen(processor, list(recordings))
        batch = cache.complete(model.model, {"more": 1, **of_model})
        assert set(batch) == {"more", "recordings"} and MISSING not in batch
        assert torch.equal(batch["recordings"].lengths, of_processor["recordings"].lengths)
        return batch["recordings"].frames

    return frames


def opened(folder: Path, limit_bytes: float = 1e9) -> FeatureCache:
    return FeatureCache(folder, "encoder", 16, limit_bytes)


CLIPS = [speech(seconds, seed=number) for number, seconds in enumerate((1.0, 31.0, 2.3))]


def as_audio(samples: np.ndarray) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": RATE}


def test_frames_come_back_as_the_encoder_made_them_and_are_encoded_once(tmp_path, model, processor, encoded, hear):
    recordings = [as_audio(clip) for clip in CLIPS]
    expected = model.encode(**processor(audio=recordings))
    del encoded[:]
    cache = opened(tmp_path)
    first = hear(cache, *recordings[:2])
    third = hear(cache, recordings[1], recordings[2])[-len(expected[2].frames) :]  # one of each kind
    assert sum(encoded) == 4  # the clip of 31 s has two windows
    cache.flush()
    again = opened(tmp_path)
    everything = hear(again, *recordings)
    assert sum(encoded) == 4 and (again.read, again.encoded) == (3, 0)
    torch.testing.assert_close(everything, expected.frames.bfloat16().float(), rtol=0.01, atol=0.01)
    assert torch.equal(everything, torch.cat((first, third)))


def test_the_times_of_cached_frames_are_those_of_the_encoder(tmp_path, model, processor):
    of_processor, _ = opened(tmp_path).listen(processor, [as_audio(clip) for clip in CLIPS])
    expected = model.encode(**processor(audio=[as_audio(clip) for clip in CLIPS]))
    for name in ("starts", "ends", "lengths"):
        assert torch.equal(getattr(of_processor["recordings"], name), getattr(expected, name))


def test_many_writers_share_a_folder_and_see_what_the_others_wrote(tmp_path, encoded, hear):
    one, other = opened(tmp_path), opened(tmp_path)
    hear(one, as_audio(CLIPS[0]))
    hear(other, as_audio(CLIPS[0]))
    hear(other, as_audio(CLIPS[2]))
    one.flush()
    other.flush()
    del encoded[:]
    hear(one, as_audio(CLIPS[2]))
    hear(other, as_audio(CLIPS[0]), as_audio(CLIPS[2]))
    assert not encoded
    assert len(list(tmp_path.glob("encoder/*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "another's"])
def test_a_damaged_shard_is_set_aside_with_a_warning_and_encoded_again(tmp_path, encoded, hear, warnings, damage):
    cache = opened(tmp_path)
    expected = hear(cache, as_audio(CLIPS[0]))
    cache.flush()
    (shard,) = tmp_path.glob("encoder/*.safetensors")
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[:-100])
    elif damage == "flipped":
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        shard.write_text("not a shard")
    del encoded[:]
    cache = opened(tmp_path)
    assert torch.equal(hear(cache, as_audio(CLIPS[0])), expected)
    assert encoded == [1]
    assert "The feature cache has a damaged shard" in warnings.text and "encoded again" in warnings.text
    assert [path.suffix for path in tmp_path.glob("encoder/*")] == [".damaged"]
    cache.flush()
    assert torch.equal(hear(opened(tmp_path), as_audio(CLIPS[0])), expected) and encoded == [1]


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path, warnings):
    opened(tmp_path)
    old, new = (tmp_path / "encoder" / f"{name}.unfinished" for name in ("old", "new"))
    old.touch(), new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    opened(tmp_path)
    assert not old.exists() and new.exists()
    assert "a process that was killed has left" in warnings.text


def test_a_full_folder_stays_as_it_is_and_says_so(tmp_path, encoded, hear, warnings):
    cache = opened(tmp_path, limit_bytes=2000)
    hear(cache, as_audio(CLIPS[0]))  # 25 frames of 32 bytes
    cache.flush()
    assert not warnings.text
    hear(cache, as_audio(CLIPS[1]))
    cache.flush()
    assert len(list(tmp_path.glob("encoder/*"))) == 1
    assert "raise feature_cache_gb" in warnings.text
    del encoded[:]
    hear(cache, as_audio(CLIPS[1]))
    hear(cache, as_audio(CLIPS[0]))
    assert len(encoded) == 2


def test_other_weights_mel_features_or_precision_are_another_encoder(model, processor):
    def described(precision: str = "float32") -> str:
        return describe_encoder(model.model, processor, precision)

    names = [described(), described("bfloat16")]
    processor.feature_extractor.dither = 0.5
    names.append(described())
    model.model.audio_tower.layers[0].fc1.weight += 0.01
    names.append(described())
    model.model.ctc_decoder.linear.weight += 1
    assert len(set(names)) == 4 and described() == names[-1]
    model.model.audio_tower.layer_norm.requires_grad_(True)
    with pytest.raises(ValueError, match="feature_cache needs a frozen encoder"):
        described()


@pytest.mark.parametrize("stage", [ctc, dct])
def test_a_stage_learns_the_same_with_a_cache_and_encodes_every_clip_once(stage, checkpoint, data, tmp_path, encoded):
    more = ["--dtype", "bfloat16", "--bf16", "--max_steps", 6, "--logging_steps", 1]
    more += ["--per_device_train_batch_size", 2]  # two epochs of six clips, seven windows
    kept = ["--feature_cache", tmp_path / "cache"]
    if stage is ctc:
        more += ["--eval_data", data / "asr.jsonl", "--eval_strategy", "steps", "--eval_steps", 6]
    losses, windows = {}, {}
    runs = {"without": [], "cold": kept, "warm": [*kept, "--dataloader_num_workers", 1]}
    for name, settings in runs.items():
        del encoded[:]
        stage.main(arguments(stage, checkpoint, data, tmp_path / name, *more, *settings))
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name], windows[name] = [entry["loss"] for entry in log if "loss" in entry], sum(encoded)
        assert stage is dct or any("eval_wer" in entry for entry in log)
    # Evaluation encodes twice without a cache: for the loss and for the transcripts.
    assert windows == {"without": 28 if stage is ctc else 14, "cold": 7, "warm": 0}
    assert losses["cold"] == losses["warm"]
    assert losses["cold"] == pytest.approx(losses["without"], rel=1e-3)
