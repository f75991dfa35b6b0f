"""Generation from prompts that hold recordings, fused to any length when it is called."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .placeholders_fastlongspeech import check_placeholders, insert_audio, placeholder_runs, resize_placeholders

AUDIO_INPUTS = ("input_features", "feature_attention_mask", "windows_per_audio", "target_length", "compression")


class FastLongSpeechGenerationMixin(GenerationMixin):
    """`generate` of `FastLongSpeechForConditionalGeneration`."""

    config: Any  # what the class mixed with has
    model: Any
    get_audio_features: Any
    get_input_embeddings: Any

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Returns the caller's `input_ids` followed by the answers, as any `generate` of transformers.

        `target_length` (any) and `compression` overrule what the processor prepared: the prompt's placeholders are
        resized inside. Without, every recording is fused to the number of its placeholders.

        Raises:
            ValueError: placeholders and recordings do not fit, or the prefill is to be chunked.
        """
        parent: Any = super()
        audio_inputs = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        if audio_inputs["input_features"] is None:
            return parent.generate(inputs, *args, **kwargs)

        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size cannot split prompts that hold recordings; leave it out.")
        input_ids = kwargs.pop("input_ids", inputs)
        attention_mask = kwargs.pop("attention_mask", None)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        placeholders = input_ids == self.config.audio_token_id
        windows = audio_inputs["windows_per_audio"]
        runs = placeholder_runs(placeholders, len(audio_inputs["input_features"] if windows is None else windows))
        compression = self.model.compression_or_default(audio_inputs["compression"])
        if audio_inputs["target_length"] is None and compression != "none":
            audio = self.get_audio_features(**(audio_inputs | {"target_length": runs}), return_dict=True)
            check_placeholders(runs, audio.audio_lengths)
            ids = input_ids
        else:
            audio = self.get_audio_features(**audio_inputs, return_dict=True)
            ids, attention_mask = resize_placeholders(input_ids, attention_mask, placeholders, audio.audio_lengths)
        device = audio.pooler_output.device
        ids = ids.to(device)
        inputs_embeds = insert_audio(
            self.get_input_embeddings()(ids), ids == self.config.audio_token_id, audio.pooler_output
        )
        return parent.generate(
            input_ids.to(device),
            *args,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.to(device),
            **kwargs,
        )

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:
        """Lets `max_length` and `min_length` count the caller's ids, with embeddings handed on beside them."""
        if kwargs["input_ids_length"]:
            kwargs["model_input_name"] = "input_ids"
        parent: Any = super()
        return parent._prepare_generated_length(*args, **kwargs)


__all__ = ["FastLongSpeechGenerationMixin"]
