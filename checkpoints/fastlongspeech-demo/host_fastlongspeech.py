"""A host: a model of transformers that hears, as FastLongSpeech. What all hosts do alike, in two classes to mix in.

`HostModel` goes before the host's class without a head, `HostForConditionalGeneration` before the one with a head.
Their docstrings say what a host brings of its own. The shortest example is `audioflamingo3_fastlongspeech.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .ctc_fastlongspeech import FastLongSpeechCTCDecoder
from .extractor_fastlongspeech import FastLongSpeechAudioOutput, SpeechExtractor
from .prompts_fastlongspeech import FastLongSpeechGenerationMixin, hear, insert_audio
from .recordings_fastlongspeech import EncodedRecordings
from .summarised_fastlongspeech import SummaryGenerationMixin
from .summary_fastlongspeech import SpeechSummary

logger = logging.get_logger(__name__)

# Names that checkpoints of transformers before 5.0 have; some versions 5.x write one more `model.`.
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.model\.": "model.language_model.",
    r"^language_model\.model\.(?!model\.)": "model.language_model.",
    r"^language_model\.(?!lm_head\.|model\.)": "model.language_model.",
    r"^audio_tower\.": "model.audio_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^ctc_decoder\.": "model.ctc_decoder.",
}


class HostModel(SpeechExtractor, SpeechSummary):
    """Encoder, CTC decoder, projector and language model of a host, without a head.

    The host brings `encode_windows`, `normalise` and `project` (see `SpeechExtractor`), and its `__init__`, which
    makes `audio_tower` and the host's other parts and ends with `add_ctc_decoder`.
    """

    # A quantised CTC decoder gives densities that mean nothing, and answers do not show it.
    _keep_in_fp32_modules: Any = ["ctc_decoder"]
    get_input_embeddings: Any
    language_model: Any
    post_init: Any
    _init_weights: Any

    def add_ctc_decoder(self) -> None:
        """Makes the CTC decoder and, where configured, summary projections, and ends the host's `__init__`."""
        self.ctc_decoder = FastLongSpeechCTCDecoder(self.config)
        if self.config.summary_interval:
            self.add_summary(self.config.summary_interval)
        self.post_init()

    def reset_ctc_decoder(self, ctc_vocab_size: int) -> None:
        """Replaces the CTC decoder by an untrained one for `ctc_vocab_size` pieces, blank not counted."""
        self.config.ctc_vocab_size = ctc_vocab_size
        self.config.ctc_trained = False
        like = next(self.audio_tower.parameters())
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

        The arguments are those of `encode` and `compress`, one after the other.

        Raises:
            ValueError: an argument is out of range or does not fit the others.
        """
        compression = self.compression_or_default(compression)
        recordings = self._encode(input_features, feature_attention_mask, windows_per_audio)
        return self.compress(recordings, target_length, compression)

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
        compression_ratio: int | Sequence[int] | Tensor | None = None,
        recordings: EncodedRecordings | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the language model's hidden states for prompts whose placeholders are replaced by recordings.

        Without `target_length` every recording is fused to the number of its placeholders. `recordings`, what `encode`
        returned, stand for features; the other arguments are those of `get_audio_features` and of any language model.
        With `compression="summary"`, prompts are read in one pass, see `read_in_one_pass`; `compression_ratio` is one
        for all intervals of every recording, or one for each.

        Raises:
            ValueError: placeholders and recordings do not fit, or a cache is given to a pass that sums up.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if input_features is not None or recordings is not None:
            if input_ids is not None:
                placeholders = input_ids == self.config.audio_token_id
            else:
                audio_token = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
                placeholders = (inputs_embeds == self.get_input_embeddings()(audio_token)).all(-1)
            ratio = self.summary_ratio(compression, compression_ratio)
            if ratio is not None and target_length is None:
                compression = "iterative_fusion"  # to the number of placeholders, before it is summed up
            audio = hear(
                self,
                placeholders,
                resize=False,
                input_features=input_features,
                feature_attention_mask=feature_attention_mask,
                windows_per_audio=windows_per_audio,
                recordings=recordings,
                target_length=target_length,
                compression=compression,
            )
            inputs_embeds = insert_audio(inputs_embeds, placeholders, audio.pooler_output)
            if ratio is not None:
                if past_key_values is not None:
                    raise ValueError("past_key_values can't be read when recordings are summed up; leave it out.")
                return self.read_in_one_pass(inputs_embeds, attention_mask, placeholders, ratio, **kwargs)
        return self.read(
            inputs_embeds,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def read(self, inputs_embeds: Tensor, input_ids: Tensor | None, **kwargs: Any) -> Any:
        """Returns the language model's output for prompts whose recordings are in place, `(B, S, hidden)`.

        `input_ids`, where the caller has given them, say what else a host looks for in the prompts.
        """
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class HostForConditionalGeneration(SummaryGenerationMixin, FastLongSpeechGenerationMixin):
    """Answers questions about recordings of any duration.

    The host brings its `__init__`, which makes `model`, the `HostModel`, and ends with `add_head`.

    Attributes:
        key_mapping: names of parameters in older checkpoints, by regular expression, and what they are called here.
        lora_targets: a regular expression for the modules that stage 2 adapts.
        stock_mask: what the host's own class calls `feature_attention_mask`; None: it has none, and hears padding.
    """

    # The whole path: a bare name would not keep quantisers off.
    _keep_in_fp32_modules: Any = ["model.ctc_decoder"]
    _tp_plan: Any = Qwen2ForCausalLM._tp_plan  # of the head
    key_mapping: dict[str, str] = KEY_MAPPING
    # Anchored: the bare names would match the audio tower's projections too.
    lora_targets = r"model\.language_model\.(.+\.)?layers\.\d+\.self_attn\.[qkvo]_proj"
    stock_mask: str | None = "input_features_mask"
    _tied_weights_keys: Any
    config_class: Any
    device: torch.device
    get_encoder: Any
    loss_function: Any
    post_init: Any

    def add_head(self) -> None:
        """Makes the head of the language model and ends the host's `__init__`."""
        text_config = self.config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        # The head may be tied to the token embeddings, which language models give different names.
        embeddings = self.model.get_input_embeddings().weight
        name = next(name for name, weight in self.model.named_parameters() if weight is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}"}
        self._weight_conversions: list[Any] = []  # it is saved under the names it has
        self.post_init()

    @classmethod
    def stock_inputs(cls, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs of one recording, all its frames kept, as the host's own class takes them."""
        names = {"feature_attention_mask": cls.stock_mask, "windows_per_audio": None}
        renamed = {names.get(name, name): value for name, value in inputs.items()}
        return {name: value for name, value in renamed.items() if name is not None}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint of ours or of the host, whatever names its parameters have.

        A checkpoint without a CTC decoder works at once, with `ctc_trained` false: all frames weigh the same.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and config.model_type != cls.config_class.model_type:
            kwargs["config"] = cls.config_class.from_dict(config.to_dict())
        kwargs["key_mapping"] = cls.key_mapping | (kwargs.get("key_mapping") or {})
        wants_info = kwargs.pop("output_loading_info", False)
        parent: Any = super()
        model, info = parent.from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model._weight_conversions = []  # not under the names that it came with, see `add_head`
        if any("summary_" in name for name in info["missing_keys"]):  # a model that was never trained to sum up
            model.model.add_summary(model.config.summary_interval)
        if any("ctc_decoder." in name for name in info["missing_keys"]):
            model.config.ctc_trained = False
            logger.warning(
                f"{pretrained_model_name_or_path} has no CTC decoder: ctc_trained is set to false, and all frames "
                "have the same weight in the fusion until a CTC decoder is trained."
            )
        return (model, info) if wants_info else model

    def get_audio_features(self, *args: Any, **kwargs: Any) -> FastLongSpeechAudioOutput:
        """See `HostModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    @torch.no_grad()
    def encode(self, *args: Any, **kwargs: Any) -> EncodedRecordings:
        """See `SpeechExtractor.encode`; no gradients are kept."""
        return self.model.encode(*args, **kwargs)

    @torch.no_grad()
    def density(self, frames: Tensor) -> Tensor:
        """See `SpeechExtractor.density`; no gradients are kept."""
        return self.model.density(frames)

    @torch.no_grad()
    def compress(self, *args: Any, **kwargs: Any) -> FastLongSpeechAudioOutput:
        """See `SpeechExtractor.compress`; no gradients are kept."""
        return self.model.compress(*args, **kwargs)

    def fingerprint(self) -> str:
        """See `SpeechExtractor.fingerprint`."""
        return self.model.fingerprint()

    def ctc_transcribe(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """See `SpeechExtractor.ctc_transcribe`."""
        return self.model.ctc_transcribe(*args, **kwargs)

    def ctc_pieces(self, recordings: EncodedRecordings) -> Tensor:
        """See `SpeechExtractor.ctc_pieces`."""
        return self.model.ctc_pieces(recordings)

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
        compression_ratio: int | Sequence[int] | Tensor | None = None,
        recordings: EncodedRecordings | None = None,
        ctc_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Returns logits and, with labels, the loss; with `ctc_labels` the CTC loss alone.

        Args:
            labels: `(B, S)` int64, -100 where nothing is learnt; shifted inside.
            ctc_labels: `(A, S)` int64 padded with -100, see `SpeechExtractor.ctc_loss`; no `input_ids` then.
            logits_to_keep: logits of the last so many positions (0: all), or of the positions in a tensor.
            others: see `HostModel.forward`.

        Raises:
            ValueError: `labels` with `logits_to_keep`, `ctc_labels` with `input_ids`, or see
                `HostModel.forward`.
        """
        if ctc_labels is not None:
            if input_ids is not None:
                raise ValueError("ctc_labels train the CTC decoder alone; leave input_ids out.")
            return CausalLMOutputWithPast(
                loss=self.model.ctc_loss(
                    input_features,
                    feature_attention_mask,
                    windows_per_audio,
                    ctc_labels,
                    kwargs.get("num_items_in_batch"),
                    recordings,
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
            compression_ratio=compression_ratio,
            recordings=recordings,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden_states = outputs.last_hidden_state
        logits = self._scaled(self.lm_head(hidden_states[:, kept] if not isinstance(kept, int) else hidden_states))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scaled(self, logits: Tensor) -> Tensor:
        """Returns logits as the language model's own class would, which some scale or cap after the head."""
        text = self.config.get_text_config()
        if cap := getattr(text, "final_logit_softcapping", None):  # Gemma 2 and later
            logits = torch.tanh(logits / cap) * cap
        if scale := getattr(text, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(text, "logits_scaling", None):  # Granite
            logits = logits / divisor
        return logits


__all__ = ["HostForConditionalGeneration", "HostModel"]
