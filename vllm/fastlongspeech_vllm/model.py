"""The model in vLLM: our encoder, CTC decoder and fusion before vLLM's own language model."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.qwen2_audio import Qwen2AudioForConditionalGeneration, Qwen2AudioMultiModalProjector
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from fastlongspeech.ctc_fastlongspeech import FastLongSpeechCTCDecoder
from fastlongspeech.extractor_fastlongspeech import SpeechExtractor
from fastlongspeech.modeling_fastlongspeech import FastLongSpeechEncoder

from .processing import DummyInputsBuilder, MultiModalProcessor, ProcessingInfo

# Our names of the parameters, and vLLM's.
NAMES = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model.", "model.": ""}


@MULTIMODAL_REGISTRY.register_processor(MultiModalProcessor, info=ProcessingInfo, dummy_inputs=DummyInputsBuilder)
class FastLongSpeechForConditionalGeneration(SpeechExtractor, Qwen2AudioForConditionalGeneration):
    """Answers questions about recordings of any duration, each at most L positions of the cache."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=NAMES)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.quant_config = vllm_config.quant_config
        with self._mark_tower_model(vllm_config, "audio"):
            self.audio_tower = FastLongSpeechEncoder._from_config(config.audio_config)
            self.multi_modal_projector = Qwen2AudioMultiModalProjector(
                config.audio_config.d_model, config.get_text_config().hidden_size
            )
            self.ctc_decoder = FastLongSpeechCTCDecoder(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state

    def normalise(self, frames: Tensor) -> Tensor:
        return self.audio_tower.layer_norm(frames)

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.multi_modal_projector(hidden_states)

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...] | list[Tensor]:
        """Returns the embeddings of each recording, `(tokens, hidden)`, as many as its prompt has placeholders."""
        features = kwargs.get("input_features")
        if features is None:
            return []
        features, mask = _joined(features), _joined(kwargs["feature_attention_mask"])
        windows, tokens = _joined(kwargs["windows_per_audio"]).flatten(), _joined(kwargs["num_audio_tokens"]).flatten()
        recordings = self._encode(features, mask, windows)
        audio = self.compress(recordings, tokens.cpu())
        return audio.pooler_output.split(audio.audio_lengths.tolist())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _joined(value: object) -> Tensor:
    """Returns what vLLM hands on of several requests, a tensor or a list of one for each, as one."""
    return value if isinstance(value, Tensor) else torch.cat([part.reshape(-1, *part.shape[1:]) for part in value])  # type: ignore[attr-defined]


__all__ = ["FastLongSpeechForConditionalGeneration", "SupportsMultiModal", "SupportsPP"]
