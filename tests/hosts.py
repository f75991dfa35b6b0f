"""Tiny random models of every host but Qwen2-Audio for `test_hosts.py`: what each is called, its sizes, its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, Qwen2Tokenizer

from fastlongspeech.app.hosts import HOSTS, Host

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}
TEXT = {**SIZES, "hidden_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 4096, "pad_token_id": 0}
WHISPER = {**SIZES, "num_mel_bins": 80, "hidden_size": 16}
QWEN3_ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
CHATML = ("<|im_start|>", "<|im_end|>")
THINKER = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}


@dataclass(frozen=True)
class TinyHost:
    """A tiny host.

    Attributes:
        model_type: its own, which names it in `HOSTS`.
        stock: the name of its class in transformers.
        audio, text: the sizes of its encoder and of its language model.
        tokens: special tokens, the placeholder first.
        fields: what else its configuration says.
        extractor: the name of the class of its feature extractor.
        mask: what its own class calls `feature_attention_mask`; None: it takes none.
        joined: whether its own class takes the windows of a recording in one row.
        frames: its frames of 30 s.
        released: sizes of its released model, where the defaults of its configuration are of none.
    """

    model_type: str
    stock: str
    audio: Mapping[str, Any]
    text: Mapping[str, Any]
    tokens: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    extractor: str = "WhisperFeatureExtractor"
    mask: str | None = "input_features_mask"
    joined: bool = False
    frames: int = 750
    released: Mapping[str, Any] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return next(host for host in HOSTS if self.model_type in host.vanilla_types)

    def skip_if_missing(self) -> None:
        """Skips the test where the transformers that is installed lacks the host."""
        try:
            getattr(transformers, self.stock)
            self.host.load()
        except (AttributeError, ValueError) as error:
            pytest.skip(f"transformers {transformers.__version__} has no {self.stock} as ours needs it: {error}")

    def tokenizer(self) -> Qwen2Tokenizer:
        """One token per byte and the special tokens."""
        vocab = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        end = "<|im_end|>" if "<|im_end|>" in self.tokens else "</s>"
        others = [token for token in self.tokens if token != end]
        return Qwen2Tokenizer(
            vocab=vocab, merges=[], pad_token="<pad>", eos_token=end, bos_token="<s>", extra_special_tokens=others
        )

    def feature_extractor(self) -> Any:
        return getattr(transformers, self.extractor)(feature_size=80)

    def config(self, **more: Any) -> dict[str, Any]:
        """The fields of its own configuration."""
        tokenizer = self.tokenizer()
        return {
            "audio_config": dict(self.audio),
            "text_config": {**self.text, "vocab_size": len(tokenizer)},
            "audio_token_id": tokenizer.convert_tokens_to_ids(self.tokens[0]),
            **self.fields,
            **more,
        }

    def make_stock(self) -> PreTrainedModel:
        """Its own class, always the same."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.stock)
        return kind(kind.config_class(**self.config())).eval()

    def stock_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Our inputs of one recording as its own class takes them."""
        taken = {"input_features": inputs["input_features"]}
        if self.mask is not None:
            taken[self.mask] = inputs["feature_attention_mask"]
        return {name: torch.cat(list(of), dim=-1)[None] if self.joined else of for name, of in taken.items()}


TINY_HOSTS = (
    TinyHost(
        model_type="audioflamingo3",
        stock="AudioFlamingo3ForConditionalGeneration",
        audio={"model_type": "audioflamingo3_encoder", **WHISPER},
        text={"model_type": "qwen2", **TEXT},
        tokens=("<sound>", *CHATML),
    ),
    TinyHost(
        model_type="voxtral",
        stock="VoxtralForConditionalGeneration",
        audio={"model_type": "voxtral_encoder", **WHISPER, "intermediate_size": 64},
        text={"model_type": "llama", **TEXT, "head_dim": 12},
        tokens=("[AUDIO]", "[BEGIN_AUDIO]", "[INST]", "[/INST]", "</s>"),
        mask=None,
        frames=375,
    ),
    TinyHost(
        model_type="qwen3_asr",
        stock="Qwen3ASRForConditionalGeneration",
        audio={
            "model_type": "qwen3_asr_encoder",
            "num_mel_bins": 80,
            **QWEN3_ENCODER,
            "output_dim": 24,
            "downsample_hidden_size": 4,
            "initializer_range": 0.3,
        },
        text={"model_type": "qwen3", **TEXT, "head_dim": 12},
        tokens=("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>", *CHATML),
        fields={"pad_token_id": 0, "eos_token_id": 1},
        extractor="Qwen3ASRFeatureExtractor",
        joined=True,
        frames=390,
    ),
    TinyHost(
        model_type="qwen2_5_omni_thinker",
        stock="Qwen2_5OmniThinkerForConditionalGeneration",
        audio={"num_mel_bins": 80, **QWEN3_ENCODER, "output_dim": 24, "initializer_range": 0.3},
        text=THINKER,
        tokens=("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", *CHATML),
        fields={"vision_config": {**VISION, "fullatt_block_indexes": [0]}, "vision_start_token_id": 3},
        mask="feature_attention_mask",
        joined=True,
    ),
    TinyHost(
        model_type="qwen3_omni_moe_thinker",
        stock="Qwen3OmniMoeThinkerForConditionalGeneration",
        audio={
            "num_mel_bins": 80,
            **QWEN3_ENCODER,
            "output_dim": 24,
            "downsample_hidden_size": 4,
            "initializer_range": 0.3,
        },
        text={**THINKER, "head_dim": 12, "moe_intermediate_size": 16, "num_experts": 11, "num_experts_per_tok": 2},
        tokens=("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>", *CHATML),
        fields={"vision_config": {**VISION, "deepstack_visual_indexes": [0]}, "vision_start_token_id": 3},
        mask="feature_attention_mask",
        joined=True,
        frames=390,
        released={
            "text_config": {"num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128, "vocab_size": 152_064}
        },
    ),
)
