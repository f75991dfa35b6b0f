"""Configuration of FastLongSpeech: a Qwen2-Audio configuration, the CTC decoder and the iterative fusion."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.dataclasses import strict, validated_field
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioConfig

from .compression_fastlongspeech import check_compression


def _one_of(*choices: str) -> Callable[[str], None]:
    def validate(value: str) -> None:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}; got {value!r}.")

    return validate


def _at_least(least: int) -> Callable[[int], None]:
    def validate(value: int) -> None:
        if value < least:
            raise ValueError(f"expected an integer of {least} or more, got {value}.")

    return validate


def _lengths(values: Sequence[int]) -> None:
    if not values or min(values) < 1:
        raise ValueError(f"expected one or more positive integers, got {list(values)}.")


@strict
class FastLongSpeechConfig(Qwen2AudioConfig):
    """Configuration of a FastLongSpeech model; a Qwen2-Audio configuration (object, dict or `config.json`) is enough.

    Args:
        audio_config, text_config, audio_token_index: as in `Qwen2AudioConfig`; the encoder may be Whisper's of any
            size (80 or 128 mel bins), the language model any causal one of transformers whose head has no bias.
        tie_word_embeddings: whether the head is the token embeddings; absent: as `text_config` says.
        ctc_vocab_size: pieces the CTC decoder tells apart, without the blank, which is one more and comes last;
            0 means the language model's own vocabulary.
        ctc_projector: whether the CTC decoder has a projector of its own to the width of the language model;
            without, it reads the output of the multimodal projector.
        ctc_trained: whether the CTC decoder is trained. As long as it is not, every frame weighs 1.
        content_density: `"ctc"` (Eq. 3) or `"uniform"` (every frame weighs 1).
        compression: what shortens a recording when a call names nothing, see `compression_fastlongspeech.py`:
            `"iterative_fusion"`, a rival (`"random"`, `"average_pooling"`, `"most_similar"`, `"adjacent_merging"`), an
            ablation (`"single_step_fusion"`, `"uniform_density"`), or `"none"` to keep every frame.
        target_length: L, the frames (40 ms each before fusion) a recording is fused to when a call names no other.
        target_lengths: the values L is drawn from in training.
        fusion_schedule: `"halving"` (Eq. 5) or `"ladder"` (the rungs of `fusion_ladder` below the current length,
            then L); the same in training and inference.
        fusion_ladder: the lengths the ladder schedule passes through, in any order.
        windows_per_batch: 30 s windows the audio encoder reads at a time, at most; a CPU reads no more than a minute.

    Raises:
        StrictDataclassError: a value has the wrong type or is out of range, here or when it is assigned later.
    """

    model_type = "fastlongspeech"

    tie_word_embeddings: bool | None = None
    ctc_vocab_size: int = validated_field(_at_least(0), default=10_000)
    ctc_projector: bool = True
    ctc_trained: bool = True
    content_density: str = validated_field(_one_of("ctc", "uniform"), default="ctc")
    compression: str = validated_field(check_compression, default="iterative_fusion")
    target_length: int = validated_field(_at_least(1), default=750)
    target_lengths: list[int] | tuple[int, ...] = validated_field(_lengths, default=(750, 400, 200, 100, 50, 25, 12))
    fusion_schedule: str = validated_field(_one_of("halving", "ladder"), default="halving")
    fusion_ladder: list[int] | tuple[int, ...] = validated_field(_lengths, default=(400, 200, 100, 50, 25, 12))
    windows_per_batch: int = validated_field(_at_least(1), default=8)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # Qwen2-Audio's, when built from one of its configurations
        self.target_lengths = list(self.target_lengths)
        self.fusion_ladder = list(self.fusion_ladder)
        super().__post_init__(**kwargs)
        # transformers ties by the outer configuration, and language models say it in their own.
        text = self.get_text_config()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        text.tie_word_embeddings = self.tie_word_embeddings

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the dict of a `config.json`, translated where it is Qwen2-Audio's or that of the first release."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type == "long_speech_qwen2audio":
            config_dict["ctc_vocab_size"] = config_dict.pop("ctc_embed_num")
            config_dict["ctc_projector"] = "projector" in config_dict.pop("ctc_decoder")
        if model_type in ("long_speech_qwen2audio", "qwen2_audio"):
            config_dict["model_type"] = cls.model_type
        elif config_dict.get("content_density") == "uniform":  # said of untrained CTC decoders before ctc_trained was
            config_dict.setdefault("ctc_trained", False)
        return config_dict, kwargs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes `config.json`, in which every auto class finds the code saved beside it."""
        self.auto_map = {
            "AutoConfig": "configuration_fastlongspeech.FastLongSpeechConfig",
            "AutoModel": "modeling_fastlongspeech.FastLongSpeechForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_fastlongspeech.FastLongSpeechForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_fastlongspeech.FastLongSpeechForConditionalGeneration",  # PEFT asks it
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    def with_ntk_rope(self, window: int = 750) -> "FastLongSpeechConfig":
        """Returns a copy whose rotary positions are stretched from a window to the language model's whole context.

        The paper's NTK-RoPE, a rival that does not compress: the base becomes theta' = theta (context / window)^(d /
        (d - 2)) for recordings of all lengths, where context is `max_position_embeddings` and d the size of a head.
        Load the model with the copy and call it with `compression="iterative_fusion"` and
        `target_length=config.fit_length(...)`: recordings that fit keep every frame, others are fused to fit.

        Args:
            window: the positions to stretch, as many as the model has learnt; 750 are the frames of 30 s.

        Raises:
            ValueError: `window` is no positive number up to the context, or the positions are scaled in another way.
        """
        config = copy.deepcopy(self)
        text = config.get_text_config()
        rope, context = text.rope_parameters, text.max_position_embeddings
        if not 1 <= window <= context:
            raise ValueError(f"window must lie between 1 and the language model's context of {context}, got {window}.")
        if rope["rope_type"] != "default":
            raise ValueError(
                f"text_config.rope_parameters have the type {rope['rope_type']!r}; NTK-RoPE needs those of a model "
                'whose positions are not scaled yet, "default".'
            )
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        theta = rope["rope_theta"] * (context / window) ** (dim / (dim - 2))
        text.rope_parameters = {**rope, "rope_theta": theta}
        return config

    def fit_length(self, other_tokens: int) -> int:
        """Returns the `target_length` of a prompt's recording that fills the language model's context.

        Args:
            other_tokens: tokens of the prompt without its placeholders, and of the answer (`max_new_tokens`).

        Raises:
            ValueError: not one frame fits.
        """
        context = self.get_text_config().max_position_embeddings
        if other_tokens >= context:
            raise ValueError(
                f"other_tokens must leave a frame of the language model's context of {context}, got {other_tokens}; "
                "shorten the prompt or the answer."
            )
        return context - other_tokens

    @property
    def ctc_blank(self) -> int:
        """Index of the CTC blank, the last output of the CTC decoder."""
        return self.ctc_vocab_size or self.get_text_config().vocab_size


FastLongSpeechConfig.register_for_auto_class()
# The server and the pipelines of transformers look classes up in this table of names.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("fastlongspeech", "FastLongSpeechForConditionalGeneration")

__all__ = ["FastLongSpeechConfig"]
