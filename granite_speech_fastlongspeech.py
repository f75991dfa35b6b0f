"""Granite Speech as a host: a conformer at 50 Hz with its own CTC head, a Q-Former of 3 frames for 15, and Granite.

Its CTC head says how much text a frame carries, so that the fusion weighs frames without stage 1. The Q-Former reads
whole blocks, so its output (10 Hz) is what is fused. A frame carries its content density as its last value, because
the head can't be asked any more after the Q-Former; the density of a fused frame is the weighted mean of its frames'.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoModel
from transformers.models.granite_speech.configuration_granite_speech import GraniteSpeechConfig
from transformers.models.granite_speech.modeling_granite_speech import (
    GraniteSpeechCTCEncoder,
    GraniteSpeechEncoderProjector,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechModel,
    GraniteSpeechPreTrainedModel,
)

from .host_fastlongspeech import KEY_MAPPING, HostForConditionalGeneration, HostModel
from .processor_fastlongspeech import SpeechProcessor
from .settings_fastlongspeech import FastLongSpeechSettings
from .windows_fastlongspeech import Windows

BLOCK = 15  # encoder frames that the Q-Former reads at a time
FRAMES = 3  # that it makes of them
BLANK = 0  # the CTC head's output for it
NO_DECODER = (
    "Granite Speech has a CTC head of its own, which weighs frames and is not trained or asked; leave stage 1 out, "
    "and let the language model transcribe."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|end_of_text|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


class GraniteSpeechWindows(Windows):
    """Granite Speech's geometry; two mel frames of 10 ms are one here."""

    def count_frames(self, mel_frames: Any) -> Any:
        return FRAMES * -(-mel_frames // BLOCK)

    def mel_frames(self, samples: int) -> np.ndarray:
        spectra = [(stop - start) // (self.hop // 2) + 1 for start, stop in self.cut(samples)]
        return np.array(spectra, dtype=np.int64) // 2


@strict
class FastLongSpeechGraniteSpeechConfig(FastLongSpeechSettings, GraniteSpeechConfig):
    """Configuration of FastLongSpeech on Granite Speech; one of Granite Speech is enough."""

    model_type = "fastlongspeech_granite_speech"
    vanilla_types = ("granite_speech",)
    model_class = "granite_speech_fastlongspeech.FastLongSpeechGraniteSpeechForConditionalGeneration"
    # A minute holds whole blocks of the encoder's attention (4 s) and of the Q-Former (0.3 s).
    windows = GraniteSpeechWindows(hop=320, mel_frames_per_frame=BLOCK // FRAMES)

    tie_word_embeddings: bool | None = True  # type: ignore[assignment]
    ctc_trained: bool = False  # there is no CTC decoder of ours to ask; the host's own head weighs frames all the same

    @property
    def audio_config(self: Any) -> Any:
        """The encoder's configuration, as other hosts call it."""
        return self.encoder_config

    @property
    def frame_width(self: Any) -> int:
        """Width of an embedding, and one for its content density."""
        return self.get_text_config().hidden_size + 1


class FastLongSpeechGraniteSpeechModel(HostModel, GraniteSpeechModel):
    """Audio encoder, Q-Former and language model, without a language modelling head."""

    config: FastLongSpeechGraniteSpeechConfig
    _keep_in_fp32_modules: Any = []  # the encoder feeds its CTC head its own dtype; quantised, it weighs alike

    def __init__(self, config: FastLongSpeechGraniteSpeechConfig) -> None:
        GraniteSpeechPreTrainedModel.__init__(self, config)
        self.encoder = GraniteSpeechCTCEncoder(config.encoder_config)  # type: ignore[arg-type]
        self.projector = GraniteSpeechEncoderProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.summary_interval:
            self.add_summary(config.summary_interval)
        self.post_init()

    @property
    def audio_tower(self) -> GraniteSpeechCTCEncoder:
        """The encoder, as other hosts call it."""
        return self.encoder

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        counts = self.windows.count_frames(mel_frames)
        layer: Any = self.encoder.layers[0]
        weight = layer.ff1.pre_norm.weight  # of a norm, which is never quantised
        frames = input_features.new_zeros(len(counts), int(counts.max()), self.config.frame_width, dtype=weight.dtype)
        frames = frames if weight.is_meta else frames.to(weight.device)
        # The encoder knows no padding, so windows of one length are read together.
        for length in mel_frames.unique().tolist():
            rows = (mel_frames == length).nonzero()[:, 0]
            features = input_features[rows.to(input_features.device), :, :length].transpose(1, 2).to(frames)
            hidden_states = self.encoder(features).last_hidden_state
            spoken = 1 - self.encoder.out(hidden_states).softmax(-1, dtype=torch.float32)[..., BLANK]
            spoken = F.pad(spoken, (0, -length % BLOCK)).unflatten(1, (-1, BLOCK // FRAMES)).mean(2)
            embeddings = self.projector(hidden_states)
            made = torch.cat((embeddings, spoken.to(embeddings)[..., None]), dim=2)
            frames[rows.to(frames.device), : made.shape[1]] = made
        return frames

    def density(self, frames: Tensor) -> Tensor:
        """Returns the content density of frames by the encoder's own CTC head, float32 `(...)`."""
        if self.config.content_density == "uniform":
            return torch.ones(frames.shape[:-1], device=frames.device)
        return frames[..., -1].float()

    def normalise(self, frames: Tensor) -> Tensor:
        return frames[..., :-1]

    def project(self, hidden_states: Tensor) -> Tensor:
        return hidden_states  # embeddings already

    def reset_ctc_decoder(self, ctc_vocab_size: int) -> None:
        raise ValueError(NO_DECODER)

    def ctc_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(NO_DECODER)

    def _check_ctc_trained(self) -> None:
        raise ValueError(NO_DECODER)


class FastLongSpeechGraniteSpeechForConditionalGeneration(
    HostForConditionalGeneration, GraniteSpeechForConditionalGeneration
):
    """Answers questions about recordings of any duration."""

    config: FastLongSpeechGraniteSpeechConfig
    _keep_in_fp32_modules: Any = []
    key_mapping = KEY_MAPPING | {r"^encoder\.": "model.encoder.", r"^projector\.": "model.projector."}
    stock_mask = None

    def __init__(self, config: FastLongSpeechGraniteSpeechConfig) -> None:
        GraniteSpeechPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechGraniteSpeechModel(config)
        self.add_head()

    @classmethod
    def stock_inputs(cls, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns inputs as the stock class takes them: a recording of one window, time first, without padding."""
        held = int(inputs["feature_attention_mask"].sum())
        named = super().stock_inputs(inputs)
        return {**named, "input_features": inputs["input_features"][..., :held].transpose(1, 2)}

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Loads a checkpoint of ours or of Granite Speech; an adapter that lies beside it is merged.

        The stock class switches the adapter off for prompts without a recording; here it always holds.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model._hf_peft_config_loaded:
            for name, module in list(model.named_modules()):
                if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
                    module.merge()
                    model.set_submodule(name, module.get_base_layer())
            model._hf_peft_config_loaded = False
            del model.peft_config
        model.config.has_lora_adapter = False
        return (model, info) if output_loading_info else model

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits  # as the stock class has them, whatever Granite's `logits_scaling` is


class FastLongSpeechGraniteSpeechProcessor(SpeechProcessor):
    """Turns prompts and recordings of any duration into the model's inputs; its feature extractor needs torchaudio."""

    config_class = FastLongSpeechGraniteSpeechConfig
    template = CHAT_TEMPLATE
    tokens = {"audio_token": "<|audio|>", "end_of_turn_token": "<|end_of_text|>"}

    @property
    def feature_rows(self) -> int:
        """Rows of a window's features: two mel frames above each other."""
        return 2 * self.feature_extractor.feature_size

    def features(self, samples: np.ndarray, device: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in self.windows.cut(len(samples)):
            features = self.feature_extractor(samples[start:stop], device=device)["input_features"][0].T.cpu().numpy()
            held = features.shape[1]
            missing = self.windows.mel_frames_per_window - held
            mask = np.arange(held + missing) < held
            yield np.pad(features, ((0, 0), (0, missing))), mask.astype(np.int64)


FastLongSpeechGraniteSpeechConfig.register_for_auto_class()
FastLongSpeechGraniteSpeechForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "FastLongSpeechGraniteSpeechConfig",
    "FastLongSpeechGraniteSpeechForConditionalGeneration",
    "FastLongSpeechGraniteSpeechModel",
    "FastLongSpeechGraniteSpeechProcessor",
]
