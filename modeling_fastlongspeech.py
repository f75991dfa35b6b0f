"""FastLongSpeech: Qwen2-Audio that reads recordings of any duration, fused to a length its language model knows.

Follow one recording: 30 s windows -> audio encoder -> frames (25 Hz) -> iterative fusion, guided by the CTC decoder ->
LayerNorm and projector -> the placeholders of the prompt -> language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.models.qwen2_audio.modeling_qwen2_audio import (
    Qwen2AudioCausalLMOutputWithPast,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
    Qwen2AudioMultiModalProjector,
    Qwen2AudioPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_fastlongspeech import FastLongSpeechConfig
from .fusion_fastlongspeech import COMPRESSIONS, content_density

logger = logging.get_logger(__name__)

MEL_FRAME_SECONDS = 0.01
MEL_FRAMES_PER_FRAME = 4
CHUNK_LOGITS = 2**24  # CTC logits held at a time where only a figure per frame is wanted

AUDIO_INPUTS = ("input_features", "feature_attention_mask", "windows_per_audio", "target_length", "compression")

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


class FastLongSpeechEncoder(Qwen2AudioEncoder):
    """Qwen2-Audio's encoder up to its last LayerNorm, which reads no more of a window than there is audio."""

    def forward(self, input_features: Tensor, mel_frames: Tensor) -> BaseModelOutput:
        """Returns pooled frames before the LayerNorm, `(W, T, D)`; those past a window's own frames mean nothing.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`.
            mel_frames: `(W,)` integer on the CPU, valid mel frames of each window, 3 or more.
        """
        conv_frames = (mel_frames - 1) // 2 + 1
        longest = int(conv_frames.max())
        # The last valid position of the convolutions sees two mel frames more.
        input_features = input_features[..., : int(mel_frames.max()) + 2]
        weight = self.conv1.weight  # where it is offloaded, a hook moves the input
        input_features = input_features.to(weight.dtype) if weight.is_meta else input_features.to(weight)

        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2)[:, :longest]
        positions = torch.arange(longest, device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)

        attention_mask = None
        if int(conv_frames.min()) < longest:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=positions < conv_frames.to(positions.device)[:, None],
            )
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=self.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2))


class FastLongSpeechCTCDecoder(nn.Module):
    """Two linear maps from an encoder frame to the CTC vocabulary, the blank last."""

    def __init__(self, config: FastLongSpeechConfig) -> None:
        super().__init__()
        width = config.get_text_config().hidden_size
        frame_width = cast(PreTrainedConfig, config.audio_config).d_model
        self.projector = nn.Linear(frame_width, width) if config.ctc_projector else None
        self.linear = nn.Linear(width, config.ctc_blank + 1, bias=False)
        self._product: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns the logits `(..., V + 1)`, or what `reduce` makes of them, `(...)`.

        With `reduce` the logits are made a chunk of frames at a time and, unless the decoder trains, from the product
        of both matrices: a third of the work, as there is nothing between them.
        """
        linear, projector = self.linear, self.projector
        hidden_states = hidden_states.to(linear.weight.dtype)
        if reduce is None:
            return linear(hidden_states if projector is None else projector(hidden_states))
        trains = self.training and linear.weight.requires_grad
        chunks = hidden_states.flatten(0, -2).split(max(1, CHUNK_LOGITS // linear.out_features))
        if projector is None:
            figures = [reduce(linear(chunk)) for chunk in chunks]
        elif trains or linear.weight.is_meta:  # meta: offloaded, there when the layer runs
            figures = [reduce(linear(projector(chunk))) for chunk in chunks]
        else:
            weight, bias = self._multiplied(projector)
            figures = [reduce(F.linear(chunk, weight, bias)) for chunk in chunks]
        return torch.cat(figures).view(hidden_states.shape[:-1])

    def train(self, mode: bool = True) -> "FastLongSpeechCTCDecoder":
        self._product = None  # fused optimizers change weights without a trace
        return super().train(mode)

    @torch.no_grad()
    def _multiplied(self, projector: nn.Linear) -> tuple[Tensor, Tensor]:
        """Both maps as one, multiplied again only where a weight has changed."""
        state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()]
        if self._product is None or self._product[0] != state:
            linear = self.linear.weight
            weight = (linear.float() @ projector.weight.float()).to(linear.dtype)
            bias = (linear.float() @ projector.bias.float()).to(linear.dtype)
            self._product = (state, weight, bias)
        return self._product[1:]


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
            compression: `"iterative_fusion"`, or `"none"` to keep every frame; absent: configured.

        Raises:
            ValueError: an argument is out of range or does not fit the others.
        """
        compression = self.compression_or_default(compression)
        frames, mel_starts, lengths = self._encode(input_features, feature_attention_mask, windows_per_audio)
        targets = self._targets(target_length, len(lengths))
        starts = mel_starts
        ends = mel_starts + MEL_FRAMES_PER_FRAME
        if compression != "none" and bool((lengths > targets).any()):
            first = lengths.cumsum(0) - lengths
            position = first[:, None] + torch.arange(int(lengths.max()))
            padded = frames[position.clamp(max=len(frames) - 1).to(frames.device)]
            fused = COMPRESSIONS[compression](
                padded, lengths, targets, self._density, self.config.fusion_schedule, self.config.fusion_ladder
            )
            lengths = fused.lengths
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
        frames, _, lengths = self._encode(input_features, feature_attention_mask, windows_per_audio)
        if len(lengths) != len(ctc_labels):
            raise ValueError(f"ctc_labels holds {len(ctc_labels)} transcripts for {len(lengths)} recordings.")
        log_probs = self.ctc_decoder(self._ctc_input(frames)).log_softmax(dim=-1, dtype=torch.float32)
        log_probs = nn.utils.rnn.pad_sequence(list(log_probs.split(lengths.tolist())))
        ctc_labels = ctc_labels.to(log_probs.device)
        label_lengths = (ctc_labels != -100).sum(-1)
        losses = F.ctc_loss(
            log_probs,
            ctc_labels.clamp(min=0),
            lengths.to(log_probs.device),
            label_lengths,
            blank=self.config.ctc_blank,
            reduction="none",
            zero_infinity=True,  # a transcript too long for its frames
        )
        if num_items_in_batch is None:
            return (losses / label_lengths.clamp(min=1)).mean()
        return losses.sum() / num_items_in_batch

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
        frames, _, lengths = self._encode(input_features, feature_attention_mask, windows_per_audio)
        best = self.ctc_decoder(self._ctc_input(frames), reduce=lambda logits: logits.argmax(-1)).cpu()
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
            runs = placeholder_runs(placeholders, _recordings(input_features, windows_per_audio))
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
        if compression not in (*COMPRESSIONS, "none"):
            raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}, none; got {compression!r}.")
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

    def _encode(
        self, input_features: Tensor, feature_attention_mask: Tensor | None, windows_per_audio: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the valid frames of all recordings before the LayerNorm, one after the other.

        `(N, D)`; the mel frame of its recording that each begins with, `(N,)`, and the frames of each recording,
        `(A,)`, both int64 on the CPU.
        """
        if feature_attention_mask is None:
            raise ValueError("feature_attention_mask is missing: it says how much of each window is audio.")
        mel_frames = feature_attention_mask.to(torch.int64).sum(-1).cpu()
        windows = torch.ones_like(mel_frames) if windows_per_audio is None else windows_per_audio.cpu()
        total = len(input_features)
        if not total == len(mel_frames) == int(windows.sum()) or bool((windows < 1).any()):
            raise ValueError(
                f"windows_per_audio {windows.tolist()} does not share out the {total} windows of input_features and "
                f"{len(mel_frames)} of feature_attention_mask."
            )
        counts = ((mel_frames - 1) // 2 + 1) // 2

        # Windows of similar length are encoded together, so that each costs what its audio costs.
        waiting = counts.argsort(descending=True, stable=True)
        waiting = waiting[counts[waiting] > 0]
        encoded, window_of = [], []
        trains = any(p.requires_grad for p in self.audio_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            while len(waiting):
                batch = waiting[: self.config.windows_per_batch]
                batch = batch[2 * counts[batch] > counts[batch[0]]]
                waiting = waiting[len(batch) :]
                hidden = self.audio_tower(input_features[batch], mel_frames[batch]).last_hidden_state
                valid = torch.arange(hidden.shape[1]) < counts[batch, None]
                encoded.append(hidden[valid.to(hidden.device)])
                window_of.append(batch.repeat_interleave(counts[batch]))
            if not encoded:
                raise ValueError("input_features hold no recording as long as one frame (40 ms).")
            in_order = torch.cat(window_of).argsort(stable=True)
            frames = torch.cat(encoded)[in_order.to(encoded[0].device)]

        recording_of = torch.arange(len(windows)).repeat_interleave(windows)
        lengths = torch.zeros_like(windows).scatter_add(0, recording_of, counts)
        mel_starts = mel_frames.cumsum(0) - mel_frames
        mel_starts = mel_starts - mel_starts[windows.cumsum(0) - windows][recording_of]
        index = torch.arange(len(frames)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return frames, mel_starts.repeat_interleave(counts) + MEL_FRAMES_PER_FRAME * index, lengths

    def _ctc_input(self, frames: Tensor) -> Tensor:
        hidden_states = self.audio_tower.layer_norm(frames)
        return hidden_states if self.config.ctc_projector else self.multi_modal_projector(hidden_states)

    def _density(self, frames: Tensor) -> Tensor:
        if self.config.content_density == "uniform":
            return torch.ones(frames.shape[:-1], device=frames.device)
        return self.ctc_decoder(self._ctc_input(frames), reduce=content_density)


class FastLongSpeechForConditionalGeneration(Qwen2AudioForConditionalGeneration):
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
        runs = placeholder_runs(placeholders, _recordings(**audio_inputs))
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


def placeholder_runs(placeholders: Tensor, recordings: int) -> Tensor:
    """Returns the length of every run of placeholders, `(A,)`, in reading order.

    Args:
        placeholders: `(B, S)` bool, True where a prompt holds an audio placeholder.
        recordings: A.

    Raises:
        ValueError: there are more or fewer runs than recordings.
    """
    run = _run_starts(placeholders).flatten().cumsum(0)[placeholders.flatten()] - 1
    runs = run.bincount()
    if len(runs) != recordings:
        raise ValueError(
            f"The prompts have {len(runs)} runs of audio placeholders for {recordings} recordings; give every "
            "recording a run of its own, and pass windows_per_audio where one has several windows."
        )
    return runs


def check_placeholders(runs: Tensor, audio_lengths: Tensor) -> None:
    """Raises a ValueError unless every recording has as many embeddings as placeholders, both `(A,)`."""
    runs, audio_lengths = runs.cpu(), audio_lengths.cpu()
    if not torch.equal(runs, audio_lengths):
        wrong = int((runs != audio_lengths).nonzero()[0])
        raise ValueError(
            f"Recording {wrong} has {int(runs[wrong])} audio placeholders for {int(audio_lengths[wrong])} frames; "
            "prepare the prompt with the same target_length and compression as the model is called with."
        )


def resize_placeholders(
    input_ids: Tensor, attention_mask: Tensor, placeholders: Tensor, audio_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns prompts, left padded, and their mask, in which every run of placeholders has the length given.

    Args:
        input_ids, attention_mask: `(B, S)`.
        placeholders: `(B, S)` bool, True where `input_ids` holds an audio placeholder.
        audio_lengths: `(A,)`, the new length of every run in reading order.
    """
    repeats = (~placeholders).long().masked_scatter(_run_starts(placeholders), audio_lengths.to(input_ids.device))
    totals = repeats.sum(1)
    width = int(totals.max())
    valid = torch.arange(width, device=input_ids.device) >= width - totals[:, None]

    def resize(values: Tensor) -> Tensor:
        resized = values.flatten().repeat_interleave(repeats.flatten())
        return values.new_zeros(valid.shape).masked_scatter(valid, resized)

    input_ids, attention_mask = resize(input_ids), resize(attention_mask)
    padding = int(attention_mask.any(0).long().argmax())  # columns that no prompt needs any more
    return input_ids[:, padding:], attention_mask[:, padding:]


def insert_audio(inputs_embeds: Tensor, placeholders: Tensor, embeddings: Tensor) -> Tensor:
    """Returns `inputs_embeds (B, S, hidden)` with the placeholders `(B, S)` replaced by `embeddings (N, hidden)`."""
    mask = placeholders[..., None].to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(mask, embeddings.to(inputs_embeds.device, inputs_embeds.dtype))


def _run_starts(placeholders: Tensor) -> Tensor:
    follows = torch.zeros_like(placeholders)
    follows[:, 1:] = placeholders[:, :-1]
    return placeholders & ~follows


def _recordings(input_features: Tensor, windows_per_audio: Tensor | None = None, **_: Any) -> int:
    return len(input_features if windows_per_audio is None else windows_per_audio)


FastLongSpeechForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["FastLongSpeechForConditionalGeneration", "FastLongSpeechModel"]
