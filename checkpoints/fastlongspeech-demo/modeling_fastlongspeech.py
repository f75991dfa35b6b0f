"""FastLongSpeech: Qwen2-Audio that reads recordings of any duration, fused to a length its language model knows.

Follow one recording: 30 s windows -> audio encoder -> frames (25 Hz) -> iterative fusion, guided by the CTC decoder,
or a rival -> LayerNorm and projector -> the placeholders of the prompt -> language model. What any host does alike is
in `extractor_fastlongspeech.py` (windows to embeddings), `prompts_fastlongspeech.py` (embeddings to answers) and
`host_fastlongspeech.py` (both around the host's own classes).
"""

from torch import Tensor
from transformers import AutoModel
from transformers.models.qwen2_audio.modeling_qwen2_audio import (
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
    Qwen2AudioMultiModalProjector,
    Qwen2AudioPreTrainedModel,
)

from .configuration_fastlongspeech import FastLongSpeechConfig
from .encoder_fastlongspeech import WindowEncoder
from .extractor_fastlongspeech import FastLongSpeechAudioOutput
from .host_fastlongspeech import HostForConditionalGeneration, HostModel


class FastLongSpeechEncoder(WindowEncoder, Qwen2AudioEncoder):
    """Qwen2-Audio's encoder up to its last LayerNorm, which reads no more of a window than there is audio."""


class FastLongSpeechModel(HostModel, Qwen2AudioModel):
    """Audio encoder, CTC decoder, projector and language model, without a language modelling head."""

    config: FastLongSpeechConfig
    _no_split_modules = ["Qwen2AudioEncoderLayer", "FastLongSpeechCTCDecoder"]

    def __init__(self, config: FastLongSpeechConfig) -> None:
        Qwen2AudioPreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechEncoder._from_config(config.audio_config)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.add_ctc_decoder()

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state

    def normalise(self, frames: Tensor) -> Tensor:
        return self.audio_tower.layer_norm(frames)

    def project(self, hidden_states: Tensor) -> Tensor:
        return self.multi_modal_projector(hidden_states)


class FastLongSpeechForConditionalGeneration(HostForConditionalGeneration, Qwen2AudioForConditionalGeneration):
    """Answers questions about recordings of any duration."""

    config: FastLongSpeechConfig
    stock_mask = "feature_attention_mask"

    def __init__(self, config: FastLongSpeechConfig) -> None:
        Qwen2AudioPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechModel(config)
        self.add_head()


FastLongSpeechForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["FastLongSpeechAudioOutput", "FastLongSpeechForConditionalGeneration", "FastLongSpeechModel"]
