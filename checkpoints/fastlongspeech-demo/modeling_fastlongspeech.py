"""FastLongSpeech: Qwen2-Audio that reads recordings of any duration, fused to a length its language model knows.

Follow one recording: 30 s windows -> audio encoder -> frames (25 Hz) -> iterative fusion, guided by the CTC decoder,
or a rival -> LayerNorm and projector -> the placeholders of the prompt -> language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_audio.modeling_qwen2_audio import (
    Qwen2AudioCausalLMOutputWithPast,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
    Qwen2AudioMultiModalProjector,
    Qwen2AudioPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .compression_fastlongspeech import COMPRESSIONS, check_compression
from .configuration_fastlongspeech import FastLongSpeechConfig
from .encoder_fastlongspeech import (
    MEL_FRAMES_PER_FRAME,
    EncodedRecordings,
    FastLongSpeechCTCDecoder,
    FastLongSpeechEncoder,
)
from .fusion_fastlongspeech import content_density
from .generation_fastlongspeech import FastLongSpeechGenerationMixin
from .placeholders_fastlongspeech import check_placeholders, insert_audio, placeholder_runs

logger = logging.get_logger(__name__)

MEL_FRAME_SECONDS = 0.01

# Names of Qwen2-Audio's parameters that transformers wrote before 5.0, and the first release of FastLongSpeech; some
# versions 5.x write one more `model.`.
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.model\.": "model.language_model.",
    r"^language_model\.model\.(?!model\.)": "model.language_model.",
    r"^language_model\.(?!lm_head\.|model\.)": "model.language_model.",
    r"^audio_tower\.": "model.audio_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^ctc_decoder\.": "model.ctc_decoder.",
}


@dataclass
class FastLongSpeechAudioOutput(ModelOutput):
    """Recordings as the language model reads them, one after the other.

    Attributes:
        pooler_output: `(N, hidden)`, the embeddings of all recordings.
        audio_lengths: `(A,)` int64, how many of them belong to each recording.
        spans: `(N, 2)` float32, the seconds of its recording that each embedding stands for.
    """

    pooler_output: Tensor = cast(Tensor, None)
    audio_lengths: Tensor = cast(Tensor, None)
    spans: Tensor = cast(Tensor, None)


class FastLongSpeechModel(Qwen2AudioModel):
    """Audio encoder, CTC decoder, projector and language model, without a language modelling head."""

    config: FastLongSpeechConfig
    _no_split_modules = ["Qwen2AudioEncoderLayer", "FastLongSpeechCTCDecoder"]

    def __init__(self, config: FastLongSpeechConfig) -> None:
        Qwen2AudioPreTrainedModel.__init__(self, config)
        self.audio_tower = FastLongSpeechEncoder._from_config(config.audio_config)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.ctc_decoder = FastLongSpeechCTCDecoder(config)
        self.post_init()

    def reset_ctc_decoder(self, ctc_vocab_size: int) -> None:
        """Replaces the CTC decoder by an untrained one for `ctc_vocab_size` pieces, blank not counted."""
        self.config.ctc_vocab_size = ctc_vocab_size
        self.config.content_density = "uniform"
        like = self.multi_modal_projector.linear.weight
        self.ctc_decoder = FastLongSpeechCTCDecoder(self.config).to(like.device, like.dtype)
        self.ctc_decoder.apply(self._init_weights)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None,
        windows_per_audio: Tensor | None = None,
        target_length: int | Sequence[int] | Tensor | None = None,
        compression: str | None = None,
    ) -> FastLongSpeechAudioOutput:
        """Returns recordings as embeddings for the language model, with their lengths and the seconds they stand for.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`, those of a recording in temporal order.
            feature_attention_mask: `(W, 3000)`, 1 for mel frames that hold audio.
            windows_per_audio: `(A,)` integer, how many windows each recording has; absent: one each.
            target_length: most frames a recording keeps, 1 or more, one for all or `(A,)`; absent: configured.
            compression: a name of `COMPRESSIONS`, or `"none"` to keep every frame; absent: configured.

        Raises:
            ValueError: an argument is out of range or does not fit the others.
        """
        compression = self.compression_or_default(compression)
        encoded = self.encode_recordings(input_features, feature_attention_mask, windows_per_audio)
        return self.compress(encoded, target_length, compression)

    def encode_recordings(
        self, input_features: Tensor, feature_attention_mask: Tensor | None, windows_per_audio: Tensor | None = None
    ) -> EncodedRecordings:
        """Returns every frame of recordings, the first half of `get_audio_features`, whose arguments it has.

        Raises:
            ValueError: the arguments do not fit each other, or no recording has a frame.
        """
        return self.audio_tower.encode_recordings(
            input_features, feature_attention_mask, windows_per_audio, self.config.windows_per_batch
        )

    def compress(
        self,
        encoded: EncodedRecordings,
        target_length: int | Sequence[int] | Tensor | None = None,
        compression: str | None = None,
    ) -> FastLongSpeechAudioOutput:
        """Returns encoded recordings as embeddings, the second half of `get_audio_features`.

        Raises:
            ValueError: `target_length` or `compression` is out of range.
        """
        compression = self.compression_or_default(compression)
        frames, starts, lengths = encoded
        ends = starts + MEL_FRAMES_PER_FRAME
        targets = self._targets(target_length, len(lengths))
        if compression != "none" and bool((lengths > targets).any()):
            first = lengths.cumsum(0) - lengths
            batch = frames[None]
            if len(lengths) > 1:
                position = first[:, None] + torch.arange(int(lengths.max()))
                batch = frames[position.clamp(max=len(frames) - 1).to(frames.device)]
            fused = COMPRESSIONS[compression](
                batch, lengths, targets, self._density, self.config.fusion_schedule, self.config.fusion_ladder
            )
            lengths = fused.lengths.cpu()
            valid = torch.arange(fused.frames.shape[1]) < lengths[:, None]
            frames = fused.frames[valid.to(frames.device)]
            spans = (fused.spans.cpu() + first[:, None, None])[valid]
            starts, ends = starts[spans[:, 0]], ends[spans[:, 1] - 1]
        return FastLongSpeechAudioOutput(
            pooler_output=self.multi_modal_projector(self.audio_tower.layer_norm(frames)),
            audio_lengths=lengths.to(frames.device),
            spans=(torch.stack((starts, ends), dim=1) * MEL_FRAME_SECONDS).to(frames.device, torch.float32),
        )

    def ctc_loss(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor,
        windows_per_audio: Tensor | None,
        ctc_labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Returns the CTC loss of recordings: nats per label of each, averaged over the recordings.

        Args:
            input_features, feature_attention_mask, windows_per_audio: as in `get_audio_features`.
            ctc_labels: `(A, S)` int64, pieces of the transcripts, padded with -100.
            num_items_in_batch: the labels of all batches one optimizer step accumulates; with it the loss is the
                summed nats of this batch, divided by that number.
        """
        frames, _, lengths = self.encode_recordings(input_features, feature_attention_mask, windows_per_audio)
        if len(lengths) != len(ctc_labels):
            raise ValueError(f"ctc_labels holds {len(ctc_labels)} transcripts for {len(lengths)} recordings.")
        return self.ctc_decoder.loss(self._ctc_input(frames), lengths, ctc_labels, num_items_in_batch)

    @torch.no_grad()
    def ctc_transcribe(
        self, input_features: Tensor, feature_attention_mask: Tensor, windows_per_audio: Tensor | None = None
    ) -> list[list[int]]:
        """Returns the CTC pieces of each recording: the likeliest of every frame, repeats collapsed, blanks dropped.

        Raises:
            ValueError: the CTC decoder is not trained.
        """
        if self.config.content_density != "ctc":
            raise ValueError(
                f'content_density is "{self.config.content_density}": this CTC decoder is not trained and can\'t '
                "transcribe; train it first (fastlongspeech.train.ctc)."
            )
        frames, _, lengths = self.encode_recordings(input_features, feature_attention_mask, windows_per_audio)
        best = self.ctc_decoder.by_frame(frames, self._ctc_input, lambda logits: logits.argmax(-1)).cpu()
        collapsed = [pieces.unique_consecutive() for pieces in best.split(lengths.tolist())]
        return [pieces[pieces != self.config.ctc_blank].tolist() for pieces in collapsed]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        windows_per_audio: Tensor | None = None,
        target_length: int | Sequence[int] | Tensor | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the language model's hidden states for prompts whose placeholders are replaced by recordings.

        Without `target_length` every recording is fused to the number of its placeholders; the other arguments are
        those of `get_audio_features` and of any language model.

        Raises:
            ValueError: placeholders and recordings do not fit.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if input_features is not None:
            if input_ids is not None:
                placeholders = input_ids == self.config.audio_token_id
            else:
                audio_token = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
                placeholders = (inputs_embeds == self.get_input_embeddings()(audio_token)).all(-1)
            recordings = len(input_features if windows_per_audio is None else windows_per_audio)
            runs = placeholder_runs(placeholders, recordings)
            lengths = runs if target_length is None else target_length
            audio = self.get_audio_features(
                input_features, feature_attention_mask, windows_per_audio, lengths, compression, return_dict=True
            )
            check_placeholders(runs, audio.audio_lengths)
            inputs_embeds = insert_audio(inputs_embeds, placeholders, audio.pooler_output)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def compression_or_default(self, compression: str | None) -> str:
        """Returns `compression`, or the configuration's where it is absent; an unknown one is a ValueError."""
        compression = self.config.compression if compression is None else compression
        check_compression(compression)
        return compression

    def _targets(self, target_length: int | Sequence[int] | Tensor | None, recordings: int) -> Tensor:
        """The target length of each recording, `(A,)` int64 on the CPU."""
        targets = torch.as_tensor(self.config.target_length if target_length is None else target_length).cpu()
        if targets.is_floating_point() or targets.dtype == torch.bool or bool((targets < 1).any()):
            raise ValueError(
                f'target_length must be a positive integer, got {target_length}; pass compression="none" to keep '
                "every frame."
            )
        if targets.ndim > 1 or (targets.ndim and len(targets) != recordings):
            raise ValueError(
                f"target_length holds {targets.numel()} lengths for {recordings} recordings; give one for all or one "
                "for each."
            )
        return targets.to(torch.int64).expand(recordings)

    def _ctc_input(self, frames: Tensor) -> Tensor:
        hidden_states = self.audio_tower.layer_norm(frames)
        return hidden_states if self.config.ctc_projector else self.multi_modal_projector(hidden_states)

    def _density(self, frames: Tensor) -> Tensor:
        if self.config.content_density == "uniform":
            return torch.ones(frames.shape[:-1], device=frames.device)
        return self.ctc_decoder.by_frame(frames, self._ctc_input, content_density)


class FastLongSpeechForConditionalGeneration(FastLongSpeechGenerationMixin, Qwen2AudioForConditionalGeneration):
    """Answers questions about recordings of any duration."""

    config: FastLongSpeechConfig

    def __init__(self, config: FastLongSpeechConfig) -> None:
        Qwen2AudioPreTrainedModel.__init__(self, config)
        self.model = FastLongSpeechModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a FastLongSpeech or Qwen2-Audio checkpoint, whatever names its parameters have.

        A checkpoint without a CTC decoder works at once, untrained: `content_density` becomes `"uniform"`.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and config.model_type != FastLongSpeechConfig.model_type:
            kwargs["config"] = FastLongSpeechConfig.from_dict(config.to_dict())
        kwargs["key_mapping"] = KEY_MAPPING | (kwargs.get("key_mapping") or {})
        wants_info = kwargs.pop("output_loading_info", False)
        parent: Any = super()
        model, info = parent.from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model._weight_conversions = []  # it is saved under the names it has, not under those it came with
        if any("ctc_decoder." in name for name in info["missing_keys"]):
            model.config.content_density = "uniform"
            logger.warning(
                f"{pretrained_model_name_or_path} has no CTC decoder: content_density is set to 'uniform', which "
                "gives all frames the same weight in the fusion, until a CTC decoder is trained."
            )
        return (model, info) if wants_info else model

    def get_audio_features(self, *args: Any, **kwargs: Any) -> FastLongSpeechAudioOutput:
        """See `FastLongSpeechModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def ctc_transcribe(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """See `FastLongSpeechModel.ctc_transcribe`."""
        return self.model.ctc_transcribe(*args, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids is among TransformersKwargs as well
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        windows_per_audio: Tensor | None = None,
        target_length: int | Sequence[int] | Tensor | None = None,
        compression: str | None = None,
        ctc_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Qwen2AudioCausalLMOutputWithPast:
        """Returns logits and, with labels, the loss; with `ctc_labels` the CTC loss alone.

        Args:
            labels: `(B, S)` int64, -100 where nothing is learnt; shifted inside.
            ctc_labels: `(A, S)` int64 padded with -100, see `FastLongSpeechModel.ctc_loss`; no `input_ids` then.
            logits_to_keep: logits of the last so many positions (0: all), or of the positions in a tensor.
            others: see `FastLongSpeechModel.forward`.

        Raises:
            ValueError: `labels` with `logits_to_keep`, `ctc_labels` with `input_ids`, or see
                `FastLongSpeechModel.forward`.
        """
        if ctc_labels is not None:
            if input_ids is not None:
                raise ValueError("ctc_labels train the CTC decoder alone; leave input_ids out.")
            return Qwen2AudioCausalLMOutputWithPast(
                loss=self.model.ctc_loss(
                    input_features,
                    feature_attention_mask,
                    windows_per_audio,
                    ctc_labels,
                    kwargs.get("num_items_in_batch"),
                )
            )
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError(
                f"labels need the logits of all positions, got logits_to_keep={logits_to_keep}; leave it 0."
            )
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            attention_mask=attention_mask,
            feature_attention_mask=feature_attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            windows_per_audio=windows_per_audio,
            target_length=target_length,
            compression=compression,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, kept] if not isinstance(kept, int) else hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size, **kwargs
            )
        return Qwen2AudioCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


FastLongSpeechForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["FastLongSpeechForConditionalGeneration", "FastLongSpeechModel"]
