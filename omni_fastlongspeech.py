"""What the thinkers of Qwen2.5-Omni and Qwen3-Omni have in common as hosts.

They hear, see images and videos, and give tokens positions on three axes (time, height, width). Their encoders read a
recording of any duration in short windows without padding, of mel features that are normalised over all of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .host_fastlongspeech import HostForConditionalGeneration, HostModel
from .mel_fastlongspeech import log_mel
from .processor_fastlongspeech import SpeechProcessor
from .prompts_fastlongspeech import placeholder_runs
from .recordings_fastlongspeech import EncodedRecordings
from .settings_fastlongspeech import FastLongSpeechSettings


class OmniSettings(FastLongSpeechSettings):
    """FastLongSpeech's settings for a thinker, which is also found inside the configuration of a full Omni model."""

    @classmethod
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the configuration of a thinker, or of the thinker in a full Omni model."""
        if "thinker_config" in config_dict:
            outer = {name: config_dict[name] for name in ("dtype", "torch_dtype") if config_dict.get(name)}
            config_dict = {**config_dict["thinker_config"], **outer, "model_type": cls.model_type}
        parent: Any = super()
        return parent.from_dict(config_dict, **kwargs)


class PositionsByPlaceholders:
    """Positions of prompts in which a recording takes as many as it has placeholders, whatever it lasts."""

    config: Any

    def get_rope_index(
        self,
        input_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_audio_in_video: bool = False,
        audio_seqlens: Tensor | None = None,
        second_per_grids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns positions `(3, B, S)` and what has to be added to count on behind each prompt, `(B, 1)`.

        The arguments are those of transformers; `audio_seqlens`, the mel frames of recordings, are not read.

        Raises:
            ValueError: `use_audio_in_video` is true.
        """
        if use_audio_in_video:
            raise ValueError(
                "use_audio_in_video=True asks for sound between a video's frames, which fused sound does not follow; "
                "leave it out, and give the sound as a recording of its own."
            )
        if input_ids is not None and not (image_grid_thw is None and video_grid_thw is None):
            placeholders = input_ids == self.config.audio_token_id
            if attention_mask is not None:
                placeholders = placeholders & attention_mask.bool()
            # transformers counts a recording's positions by its mel frames
            audio_seqlens = self.config.windows.frame_start(placeholder_runs(placeholders))
        parent: Any = super()
        return parent.get_rope_index(
            input_ids, image_grid_thw, video_grid_thw, attention_mask, False, audio_seqlens, second_per_grids
        )


class OmniModel(PositionsByPlaceholders, HostModel):
    """A thinker without a head; mix it in before the host's own class, which brings what `HostModel` says."""

    rope_deltas: Tensor | None

    def normalise(self, frames: Tensor) -> Tensor:
        return self.audio_tower.ln_post(frames)

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        return self.audio_tower(input_features, mel_frames).last_hidden_state

    def _encode(
        self,
        input_features: Tensor | None,
        feature_attention_mask: Tensor | None,
        windows_per_audio: Tensor | None,
        fingerprints: bool = False,
    ) -> EncodedRecordings:
        """As in `SpeechExtractor`; features without `windows_per_audio` have a row for each recording, of any length.

        These are what transformers' own processor makes, which prepares images and videos too.
        """
        if not (windows_per_audio is not None or input_features is None or feature_attention_mask is None):
            size = self.windows.mel_frames_per_window
            features = F.pad(input_features, (0, -input_features.shape[-1] % size))
            mask = F.pad(feature_attention_mask, (0, -feature_attention_mask.shape[-1] % size))
            windows_per_audio = (-(-feature_attention_mask.sum(-1).cpu() // size)).clamp(min=1)
            held = torch.arange(features.shape[-1] // size) < windows_per_audio[:, None]
            input_features = features.unflatten(2, (-1, size)).transpose(1, 2)[held.to(features.device)]
            feature_attention_mask = mask.unflatten(1, (-1, size))[held.to(mask.device)]
            # Behind a recording its last window holds zeros, as our processor makes it.
            input_features = input_features * feature_attention_mask[:, None].to(input_features)
        return super()._encode(input_features, feature_attention_mask, windows_per_audio, fingerprints)

    def read(self, inputs_embeds: Tensor, input_ids: Tensor | None, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Returns the language model's output for prompts whose recordings are in place; images and videos follow."""
        cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        # transformers leaves the offset of the last prompt on the model; here each cache keeps that of its own.
        self.rope_deltas = getattr(past_key_values, "rope_deltas", None) if cached else None
        parent: Any = super(HostModel, self)
        outputs = parent.forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        if outputs.past_key_values is not None and not cached:
            outputs.past_key_values.rope_deltas = self.rope_deltas
        return outputs

    def compute_3d_position_ids(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Returns the positions of the tokens that are read; transformers returns those of the whole cache as well."""
        parent: Any = super()
        positions = parent.compute_3d_position_ids(*args, **kwargs)
        return None if positions is None else positions[..., -kwargs["inputs_embeds"].shape[1] :]


class OmniForConditionalGeneration(PositionsByPlaceholders, HostForConditionalGeneration):
    """A thinker; mix it in before the host's own class."""

    # Names in a full Omni model, and those of all checkpoints before transformers had a thinker without a head.
    key_mapping = {
        r"^(?:thinker\.)?(?:model\.)?(audio_tower|visual)\.": r"model.\1.",
        r"^(?:thinker\.)?model\.(?!(?:language_model|audio_tower|visual|ctc_decoder)\.)": "model.language_model.",
        r"^thinker\.": "",
    }
    stock_mask = "feature_attention_mask"

    @classmethod
    def stock_inputs(cls, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns inputs as the stock class takes them: the windows of the recording in one row."""
        named = super().stock_inputs(inputs)
        for name in ("input_features", "feature_attention_mask"):
            named[name] = torch.cat(list(named[name]), dim=-1)[None]
        return named

    def forward(  # type: ignore[override, misc]  # what generate may be given stands by name
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_second_per_grid: Tensor | None = None,
        use_audio_in_video: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """See `HostForConditionalGeneration.forward`; images and videos are those of transformers' own thinker.

        Raises:
            ValueError: `use_audio_in_video` is true, or see `HostForConditionalGeneration.forward`.
        """
        seen = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "video_second_per_grid": video_second_per_grid,
            "use_audio_in_video": use_audio_in_video,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **{name: value for name, value in seen.items() if value is not None},
            **kwargs,
        )

    def prompt_positions(self, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> Tensor | None:
        """Returns the positions of prompts with images or videos, `(4, B, S)`; None: they have none.

        The first row counts tokens, as transformers has it in generation.
        """
        grids = {name: options.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        if all(grid is None for grid in grids.values()):
            return None
        axes, _ = self.get_rope_index(
            input_ids,
            attention_mask=attention_mask,
            use_audio_in_video=bool(options.get("use_audio_in_video")),
            second_per_grids=options.get("video_second_per_grid"),
            **grids,
        )
        tokens = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.cat((tokens[None].to(axes), axes))


class OmniProcessor(SpeechProcessor):
    """Turns prompts and recordings of any duration into a thinker's inputs; see `SpeechProcessor`."""

    def features(self, samples: np.ndarray, device: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the log-mel features of every window of a recording, `(mels, T)`, and which hold audio, `(T,)`.

        They are cut out of those of the whole recording, and hold zeros behind it.
        """
        whole, size = log_mel(samples, self.feature_extractor, device), self.windows.mel_frames_per_window
        for first in range(0, whole.shape[1], size):
            window = whole[:, first : first + size]
            held = window.shape[1]
            yield np.pad(window, ((0, 0), (0, size - held))), (np.arange(size) < held).astype(np.int64)


__all__ = ["OmniForConditionalGeneration", "OmniModel", "OmniProcessor", "OmniSettings", "PositionsByPlaceholders"]
