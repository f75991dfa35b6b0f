"""Configuration of FastLongSpeech: a Qwen2-Audio configuration, the CTC decoder and the iterative fusion."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioConfig

from .settings_fastlongspeech import FastLongSpeechSettings


@strict
class FastLongSpeechConfig(FastLongSpeechSettings, Qwen2AudioConfig):
    """Configuration of a FastLongSpeech model; a Qwen2-Audio configuration (object, dict or `config.json`) is enough.

    Args:
        audio_config, text_config, audio_token_index: as in `Qwen2AudioConfig`; the encoder may be Whisper's of any
            size (80 or 128 mel bins), the language model any causal one of transformers whose head has no bias.
        others: see `FastLongSpeechSettings`.
    """

    model_type = "fastlongspeech"
    vanilla_types = ("qwen2_audio", "long_speech_qwen2audio")
    model_class = "modeling_fastlongspeech.FastLongSpeechForConditionalGeneration"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the dict of a `config.json`, translated where it is Qwen2-Audio's or that of the first release."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if "ctc_embed_num" in config_dict:  # the first release
            config_dict["ctc_vocab_size"] = config_dict.pop("ctc_embed_num")
            config_dict["ctc_projector"] = "projector" in config_dict.pop("ctc_decoder")
        elif config_dict.get("content_density") == "uniform":  # said of untrained CTC decoders before ctc_trained was
            config_dict.setdefault("ctc_trained", False)
        return config_dict, kwargs


FastLongSpeechConfig.register_for_auto_class()

__all__ = ["FastLongSpeechConfig"]
