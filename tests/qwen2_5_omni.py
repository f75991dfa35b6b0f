"""Tiny random Qwen2.5-Omnis, and what their tests share."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

omni = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
if not hasattr(omni, "Qwen2_5OmniThinkerModel"):
    pytest.skip("this transformers has no Qwen2_5OmniThinkerModel, which ours is built on", allow_module_level=True)

MEL_BINS = 8
CHUNK = 100  # mel frames, half as many as in the released models
AUDIO, IMAGE, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(90, 97)


def tiny_fields(**fields: Any) -> dict[str, Any]:
    """The fields of a two-layer thinker with a vocabulary of 100; large weights, so that no two logits tie."""
    return {
        "audio_config": {
            "num_mel_bins": MEL_BINS,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "n_window": CHUNK // 2,
            "max_source_positions": 60,
            "output_dim": 24,
            "initializer_range": 0.3,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
            "window_size": 8,
            "out_hidden_size": 24,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.3,
        },
        "text_config": {
            "vocab_size": 100,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]},
        },
        "audio_token_index": AUDIO,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
        "vision_start_token_id": VISION_START,
        "initializer_range": 0.3,
        **fields,
    }


def make_audio(*mel_frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns recordings of so many mel frames (10 ms), different from each other, and not zero in the padding."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(mel_frames)
    steps = torch.randn(len(mel_frames), MEL_BINS, longest // 20 + 1, generator=generator)
    slow = steps.repeat_interleave(20, dim=2)[..., :longest]
    return {
        "input_features": slow + 0.3 * torch.randn(slow.shape, generator=generator),
        "feature_attention_mask": (torch.arange(longest) < torch.tensor(mel_frames)[:, None]).long(),
    }


def frames_of(mel_frames: int) -> int:
    """Returns the frames of a recording: one for every two positions of a convolution with a stride of 2."""
    return ((mel_frames - 1) // 2 + 1) // 2


def make_prompts(*prompts: Sequence[int]) -> dict[str, Tensor]:
    """Returns prompts, left padded: every number is a recording's placeholders, with text around it."""
    rows = []
    for number, recordings in enumerate(prompts):
        ids = [10 + number, 11]
        for placeholders in recordings:
            ids += [AUDIO_START, *[AUDIO] * placeholders, AUDIO_END]
        rows.append(torch.tensor(ids + [20 + number, 7]))
    width = max(map(len, rows))
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]),
    }
