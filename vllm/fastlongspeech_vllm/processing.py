"""How a recording enters vLLM's prompts: windows of any number, and as many placeholders as frames are left.

vLLM's own Qwen2-Audio keeps one window of 30 s for each recording and cuts the rest. Here `input_features` has the
windows of all recordings one after the other, and `windows_per_audio` says how many are whose.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_audio import (
    Qwen2AudioDummyInputsBuilder,
    Qwen2AudioMultiModalDataParser,
    Qwen2AudioMultiModalProcessor,
    Qwen2AudioProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.processor import HFMultiModalInputs

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechProcessor
from fastlongspeech.windows_fastlongspeech import WINDOWS


def count_tokens(mask: torch.Tensor, windows: torch.Tensor, target_length: int) -> torch.Tensor:
    """Returns the placeholders of recordings, `(A,)` int64: their frames, at most L.

    Args:
        mask: `(W, 3000)`, 1 for mel frames that hold audio, the windows of all recordings in order.
        windows: `(A,)`, how many of them each recording has.
        target_length: L.
    """
    frames = WINDOWS.place(mask.sum(-1).numpy(), windows.numpy()).lengths
    return torch.from_numpy(frames).clamp(max=target_length)


class ProcessingInfo(Qwen2AudioProcessingInfo):
    """What vLLM asks about the model before it runs."""

    def get_hf_config(self) -> FastLongSpeechConfig:
        return self.ctx.get_hf_config(FastLongSpeechConfig)

    def get_hf_processor(self, **kwargs: object) -> FastLongSpeechProcessor:
        return self.ctx.get_hf_processor(FastLongSpeechProcessor)  # L is an argument of its calls

    def get_data_parser(self) -> Any:
        return Qwen2AudioMultiModalDataParser(
            target_sr=self.get_feature_extractor().sampling_rate, target_channels=self.get_target_channels()
        )

    def get_target_length(self) -> int:
        """Returns L: that of `--mm-processor-kwargs '{"target_length": L}'`, or the configuration's."""
        given = self.ctx.get_merged_mm_kwargs({}).get("target_length")
        return int(given or self.get_hf_config().target_length)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int] | None = None
    ) -> Mapping[str, int]:
        """Returns the most placeholders that a recording can have. It is L however long the recording is, so vLLM
        plans its memory for L and never for hours."""
        return {"audio": self.get_target_length()}


class DummyInputsBuilder(Qwen2AudioDummyInputsBuilder):
    """What vLLM measures its memory with."""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Returns recordings just long enough for L frames."""
        seconds = self.info.get_target_length() * WINDOWS.frame_seconds + WINDOWS.seconds(4)
        length = round(seconds * self.info.get_feature_extractor().sampling_rate)
        count, overrides = mm_counts.get("audio", 0), mm_options.get("audio")
        return {"audio": self._get_dummy_audios(length=length, num_audios=count, overrides=overrides)}


class MultiModalProcessor(Qwen2AudioMultiModalProcessor):
    """From recordings to the model's inputs and a prompt with their placeholders."""

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> HFMultiModalInputs:
        inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        rate = self.info.get_feature_extractor().sampling_rate
        options = {name: value for name, value in inputs.hf_kwargs.items() if name != "truncation"}
        return inputs._replace(hf_kwargs={**options, "sampling_rate": rate})

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Returns the processor's outputs, and `num_audio_tokens` `(A,)` beside them.

        Raises:
            ValueError: `target_length` is more than the one that vLLM has planned its memory for.
        """
        planned = self.info.get_target_length()
        given: Any = hf_kwargs.get("target_length")
        length = int(given or planned)
        if not 1 <= length <= planned:
            raise ValueError(
                f"target_length must lie between 1 and {planned}, got {length}; start vLLM with "
                f"--mm-processor-kwargs '{{\"target_length\": {length}}}' to plan its memory for more."
            )
        outputs = super()._call_hf_processor(hf_data, {**hf_kwargs, "target_length": length})
        if "windows_per_audio" in outputs:
            tokens = count_tokens(outputs["feature_attention_mask"], outputs["windows_per_audio"], length)
            outputs["num_audio_tokens"] = tokens
        return outputs

    def _get_mm_fields_config(
        self, hf_inputs: Mapping[str, Any], hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        windows = hf_inputs.get("windows_per_audio", torch.empty(0, dtype=torch.int64))
        return {
            "input_features": MultiModalFieldConfig.flat_from_sizes("audio", windows),
            "feature_attention_mask": MultiModalFieldConfig.flat_from_sizes("audio", windows),
            "windows_per_audio": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
            "num_audio_tokens": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        placeholder = self.info.get_hf_processor().audio_token_id
        tokens = out_mm_kwargs.get_data().get("num_audio_tokens")

        def replace(item: int) -> list[int]:
            assert tokens is not None  # there is a recording, so it was counted
            return [placeholder] * int(tokens[item])

        return [PromptReplacement(modality="audio", target=[placeholder], replacement=replace)]


__all__ = ["DummyInputsBuilder", "MultiModalProcessor", "ProcessingInfo", "count_tokens"]
