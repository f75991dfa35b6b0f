"""Tiny random thinkers of Qwen2.5-Omni and Qwen3-Omni, stock and ours, and what their tests share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastlongspeech

stock_module = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
if not hasattr(stock_module, "Qwen2_5OmniThinkerModel"):
    pytest.skip("this transformers has no Qwen2_5OmniThinkerModel, which ours is built on", allow_module_level=True)

MEL_BINS = 8
AUDIO, IMAGE, VIDEO, AUDIO_START, AUDIO_END, VISION_START, VISION_END = range(90, 97)


@dataclass(frozen=True)
class Omni:
    """A host, and how to make it.

    Attributes:
        ours, stock: what the names of the classes begin with.
        audio, vision, text: fields of the tiny configuration that the other host has not, or has otherwise.
        tokens: the names of the fields of the placeholders.
        frames_of: the frames of a recording of so many mel frames (10 ms), as transformers counts them.
        window: mel frames that the encoder reads together.
    """

    ours: str
    stock: str
    audio: dict[str, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    tokens: str
    frames_of: Callable[[int], int]
    window: int

    def fields(self, **fields: Any) -> dict[str, Any]:
        """The fields of a two-layer thinker with a vocabulary of 100; large weights, so that no two logits tie."""
        audio = {
            "num_mel_bins": MEL_BINS,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "max_source_positions": 100,
            "output_dim": 24,
        }
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
            "out_hidden_size": 24,
        }
        text = {
            "vocab_size": 100,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
        }
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}
        own: dict[str, Any] = dict(self.text)
        large = {"initializer_range": 0.3}
        return {
            "audio_config": audio | self.audio | large,
            "vision_config": vision | self.vision | large,
            "text_config": text | {"rope_parameters": rope | own.pop("rope", {})} | own | large,
            self.tokens.format("audio"): AUDIO,
            self.tokens.format("image"): IMAGE,
            self.tokens.format("video"): VIDEO,
            "audio_start_token_id": AUDIO_START,
            "audio_end_token_id": AUDIO_END,
            "vision_start_token_id": VISION_START,
            **large,
            **fields,
        }

    def stock_class(self, suffix: str) -> Any:
        return getattr(transformers, self.stock + suffix)

    def our_class(self, suffix: str) -> Any:
        return getattr(fastlongspeech, self.ours + suffix)

    def make_stock(self) -> Any:
        """Returns the thinker as transformers has it."""
        torch.manual_seed(1)
        config = self.stock_class("ThinkerConfig")(**self.fields())
        model = self.stock_class("ThinkerForConditionalGeneration")(config).eval()
        model.generation_config.eos_token_id = None
        return model

    def make_model(self, stock: Any = None, **fields: Any) -> Any:
        """Returns a tiny random model, always the same, with the weights of `stock` where it is given."""
        torch.manual_seed(0)
        config = self.our_class("Config")(**self.fields(**({"ctc_vocab_size": 12} | fields)))
        model = self.our_class("ForConditionalGeneration")(config).eval()
        model.generation_config.eos_token_id = None
        if stock is not None:
            model.load_state_dict(stock.state_dict(), strict=False)
        return model

    @staticmethod
    def project(tower: Any, normalised: Tensor) -> Tensor:
        """What a stock encoder does after its last LayerNorm."""
        return tower.proj(normalised) if hasattr(tower, "proj") else tower.proj2(tower.act(tower.proj1(normalised)))


OMNIS = {
    "Qwen2.5-Omni": Omni(
        ours="FastLongSpeechQwen2_5Omni",
        stock="Qwen2_5Omni",
        audio={"n_window": 100},
        vision={"window_size": 8, "fullatt_block_indexes": [0]},
        text={},
        tokens="{}_token_index",
        frames_of=lambda mel: ((mel - 1) // 2 + 1) // 2,
        window=200,
    ),
    "Qwen3-Omni": Omni(
        ours="FastLongSpeechQwen3Omni",
        stock="Qwen3OmniMoe",
        audio={"n_window": 50, "n_window_infer": 800, "downsample_hidden_size": 4},
        vision={"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text={
            "head_dim": 12,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rope": {"mrope_interleaved": True},
        },
        tokens="{}_token_id",
        frames_of=lambda mel: mel // 100 * 13 + (mel % 100 + 7) // 8,
        window=800,
    ),
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


def make_prompts(*prompts: Sequence[int]) -> dict[str, Tensor]:
    """Returns prompts, left padded: every number is a recording's placeholders, with text around it."""
    rows = []
    for number, recordings in enumerate(prompts):
        ids = [10 + number, 11]
        for placeholders in recordings:
            ids += [AUDIO_START, *[AUDIO] * placeholders, AUDIO_END]
        rows.append(torch.tensor(ids + [20 + number, 7]))
    return pad_left(rows)


def pad_left(rows: list[Tensor]) -> dict[str, Tensor]:
    """Returns prompts of any length as a batch."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]),
    }
