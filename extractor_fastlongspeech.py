"""The paper's speech extractor (section 3.1): recordings to frames, their content density, and frames fused to length.

Follow one recording: windows -> the host's encoder -> frames (`encode`) -> fused by their density (`density`,
`compress`) -> the host's normalisation and projector -> embeddings that the language model reads. The CTC decoder
beside it says how much text a frame carries, and transcribes.

A host is a model of transformers that hears. It mixes `SpeechExtractor` in and brings three things of its own:
`encode_windows`, `normalise` and `project`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compression_fastlongspeech import COMPRESSIONS, check_compression
from .ctc_fastlongspeech import FastLongSpeechCTCDecoder
from .fusion_fastlongspeech import FusionSettings, check_target_length, content_density
from .recordings_fastlongspeech import EncodedRecordings, fingerprint_audio, fingerprint_weights
from .windows_fastlongspeech import FramePlaces, Windows


@dataclass
class FastLongSpeechAudioOutput(BaseModelOutputWithPooling):
    """Recordings as the language model reads them, one after the other.

    Attributes:
        last_hidden_state: `(N, D)`, the frames that are left of all recordings, normalised: what the projector reads.
        pooler_output: `(N, hidden)`, the same as embeddings of the language model.
        audio_lengths: `(A,)` int64, how many of them belong to each recording.
        spans: `(N, 2)` float32, the seconds of its recording that each stands for.
    """

    last_hidden_state: Tensor = cast(Tensor, None)
    pooler_output: Tensor = cast(Tensor, None)
    audio_lengths: Tensor = cast(Tensor, None)
    spans: Tensor = cast(Tensor, None)


class SpeechExtractor:
    """What a host model gets: `encode`, `density`, `compress`, the CTC loss and the CTC transcript.

    Attributes:
        config: the host's configuration, with the fields that `FastLongSpeechSettings` adds.
        audio_tower: the host's encoder.
        ctc_decoder: the CTC decoder, which the host makes with the configuration.
    """

    config: Any
    audio_tower: Any
    ctc_decoder: FastLongSpeechCTCDecoder

    @property
    def windows(self) -> Windows:
        """How the host cuts recordings."""
        return self.config.windows

    def encode_windows(self, input_features: Tensor, mel_frames: Tensor) -> Tensor:
        """Returns the frames of windows before the encoder's last normalisation, `(W, T, D)`. The host's own.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`.
            mel_frames: `(W,)` integer on the CPU, mel frames of each window that hold audio.
        """
        raise NotImplementedError

    def normalise(self, frames: Tensor) -> Tensor:
        """Returns frames `(..., D)` after the encoder's last normalisation. The host's own."""
        raise NotImplementedError

    def project(self, hidden_states: Tensor) -> Tensor:
        """Returns normalised frames `(..., D)` as embeddings of the language model `(..., hidden)`. The host's own."""
        raise NotImplementedError

    def encode(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None = None,
        windows_per_audio: Tensor | None = None,
    ) -> EncodedRecordings:
        """Returns every frame of recordings, to be asked about any number of times: `encode(**processor(audio=...))`.

        Args:
            input_features: log-mel windows `(W, mels, 3000)`, those of a recording in temporal order.
            feature_attention_mask: `(W, 3000)`, 1 for mel frames that hold audio.
            windows_per_audio: `(A,)` integer, how many windows each recording has; absent: one each.

        Raises:
            ValueError: the arguments do not fit each other, or no recording has a frame.
        """
        return self._encode(input_features, feature_attention_mask, windows_per_audio, fingerprints=True)

    def fingerprint(self) -> str:
        """Returns the text that marks what this model's encoder has encoded; other weights give another."""
        return fingerprint_weights(self.audio_tower)

    def density(self, frames: Tensor) -> Tensor:
        """Returns the content density (Eq. 3), float32 `(...)`, of frames `(..., D)` as `encode` returns them.

        Every frame weighs 1 with `content_density="uniform"`, and as long as the CTC decoder is not trained.
        """
        if self.config.content_density == "uniform" or not self.config.ctc_trained:
            return torch.ones(frames.shape[:-1], device=frames.device)
        return self.ctc_decoder.by_frame(frames, self._ctc_input, content_density)

    def compress(
        self,
        recordings: EncodedRecordings,
        target_length: int | Sequence[int] | Tensor | None = None,
        compression: str | None = None,
    ) -> FastLongSpeechAudioOutput:
        """Returns encoded recordings as embeddings for the language model.

        Args:
            recordings: as `encode` returns them.
            target_length: most frames a recording keeps, 1 or more, one for all or `(A,)`; absent: configured.
            compression: a name of `COMPRESSIONS`, or `"none"` to keep every frame; absent: configured. `"summary"`
                gives what the language model reads before it sums up: `target_length` frames for every 30 s.

        Raises:
            ValueError: `target_length` or `compression` is out of range, or another encoder made the recordings.
        """
        compression = self.compression_or_default(compression)
        target_length = self.config.target_length if target_length is None else target_length
        targets = check_target_length(target_length, len(recordings))
        recordings = self._received(recordings)
        if compression == "summary":
            targets = torch.from_numpy(self.windows.share(recordings.lengths.numpy(), targets.numpy()))
            compression = "iterative_fusion"
        frames, starts, ends, lengths = recordings.frames, recordings.starts, recordings.ends, recordings.lengths
        if compression != "none" and bool((lengths > targets).any()):
            first = lengths.cumsum(0) - lengths
            batch = frames[None]
            if len(lengths) > 1:
                # From one after the other to a padded batch; places past a recording's end read some frame, unused.
                position = first[:, None] + torch.arange(int(lengths.max()))
                batch = frames[position.clamp(max=len(frames) - 1).to(frames.device)]
            settings = FusionSettings(self.density, self.config.fusion_schedule, self.config.fusion_ladder)
            fused = COMPRESSIONS[compression](batch, lengths, targets, settings)
            lengths = fused.lengths.cpu()
            valid = torch.arange(fused.frames.shape[1]) < lengths[:, None]
            frames = fused.frames[valid.to(frames.device)]
            # A span counts frames of its own recording; its seconds are those of its first and of its last frame.
            spans = (fused.spans.cpu() + first[:, None, None])[valid]
            starts, ends = starts[spans[:, 0]], ends[spans[:, 1] - 1]
        hidden_states = self.normalise(frames)
        return FastLongSpeechAudioOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.project(hidden_states),
            audio_lengths=lengths.to(frames.device),
            spans=torch.stack((starts, ends), dim=1).to(frames.device, torch.float32),
        )

    def ctc_loss(
        self,
        input_features: Tensor | None,
        feature_attention_mask: Tensor | None,
        windows_per_audio: Tensor | None,
        ctc_labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        recordings: EncodedRecordings | None = None,
    ) -> Tensor:
        """Returns the CTC loss of recordings: nats per label of each, averaged over the recordings.

        Args:
            input_features, feature_attention_mask, windows_per_audio: as in `encode`.
            ctc_labels: `(A, S)` int64, pieces of the transcripts, padded with -100.
            num_items_in_batch: the labels of all batches one optimizer step accumulates; with it the loss is the
                summed nats of this batch, divided by that number.
            recordings: what `encode` returned, instead of features.

        Raises:
            ValueError: there are more or fewer transcripts than recordings.
        """
        if recordings is None:
            recordings = self._encode(input_features, feature_attention_mask, windows_per_audio)
        recordings = self._received(recordings)
        if len(recordings) != len(ctc_labels):
            raise ValueError(f"ctc_labels holds {len(ctc_labels)} transcripts for {len(recordings)} recordings.")
        hidden_states = self._ctc_input(recordings.frames)
        return self.ctc_decoder.loss(hidden_states, recordings.lengths, ctc_labels, num_items_in_batch)

    @torch.no_grad()
    def ctc_transcribe(
        self,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        windows_per_audio: Tensor | None = None,
        recordings: EncodedRecordings | None = None,
    ) -> list[list[int]]:
        """Returns the CTC pieces of each recording: the likeliest of every frame, repeats collapsed, blanks dropped.

        Args:
            input_features, feature_attention_mask, windows_per_audio: as in `encode`.
            recordings: what `encode` returned, instead of these.

        Raises:
            ValueError: the CTC decoder is not trained, or neither features nor recordings are given.
        """
        if recordings is None:
            self._check_ctc_trained()
            recordings = self._encode(input_features, feature_attention_mask, windows_per_audio)
        pieces = self.ctc_pieces(recordings)
        collapsed = [of_one.unique_consecutive() for of_one in pieces.split(recordings.lengths.tolist())]
        return [of_one[of_one != self.config.ctc_blank].tolist() for of_one in collapsed]

    @torch.no_grad()
    def ctc_pieces(self, recordings: EncodedRecordings) -> Tensor:
        """Returns the likeliest CTC piece of every frame, `(N,)` int64 on the CPU; `config.ctc_blank` where none is.

        `recordings.starts` and `recordings.ends` say when each frame is heard.

        Args:
            recordings: as `encode` returns them.

        Raises:
            ValueError: the CTC decoder is not trained, or another encoder made the recordings.
        """
        self._check_ctc_trained()
        frames = self._received(recordings).frames
        return self.ctc_decoder.by_frame(frames, self._ctc_input, lambda logits: logits.argmax(-1)).cpu()

    def _check_ctc_trained(self) -> None:
        if not self.config.ctc_trained:
            raise ValueError(
                "ctc_trained is false: this CTC decoder can't transcribe; train it first (fastlongspeech.train.ctc)."
            )

    def compression_or_default(self, compression: str | None) -> str:
        """Returns `compression`, or the configuration's where it is absent; an unknown one is a ValueError."""
        compression = self.config.compression if compression is None else compression
        check_compression(compression)
        return compression

    def _encode(
        self,
        input_features: Tensor | None,
        feature_attention_mask: Tensor | None,
        windows_per_audio: Tensor | None,
        fingerprints: bool = False,
    ) -> EncodedRecordings:
        """As `encode`; fingerprints cost a look at the weights and are left out where nothing is kept."""
        if input_features is None:
            raise ValueError("input_features are missing: give those of the processor, or encoded recordings.")
        if feature_attention_mask is None:
            raise ValueError("feature_attention_mask is missing: it says how much of each window is audio.")
        mel_frames = feature_attention_mask.to(torch.int64).sum(-1).cpu().numpy()
        windows = np.ones_like(mel_frames) if windows_per_audio is None else windows_per_audio.cpu().numpy()
        total = len(input_features)
        if not total == len(mel_frames) == int(windows.sum()) or bool((windows < 1).any()):
            raise ValueError(
                f"windows_per_audio {windows.tolist()} does not share out the {total} windows of input_features and "
                f"{len(mel_frames)} of feature_attention_mask; call a pipeline with batch_size=1 for recordings of "
                "several windows, as its batches lose all but the first."
            )
        places = self.windows.place(mel_frames, windows)
        if not places.counts.any():
            raise ValueError(
                f"input_features hold no recording as long as one frame ({1000 * self.windows.frame_seconds:.0f} ms)."
            )
        return EncodedRecordings(
            frames=self._encode_batches(input_features, mel_frames, places),
            starts=torch.from_numpy(self.windows.seconds(places.starts)),
            ends=torch.from_numpy(self.windows.seconds(places.ends)),
            lengths=torch.from_numpy(places.lengths),
            encoder=self.fingerprint() if fingerprints else None,
            audio=fingerprint_audio(input_features, mel_frames, windows) if fingerprints else (),
        )

    def _encode_batches(self, input_features: Tensor, mel_frames: np.ndarray, places: FramePlaces) -> Tensor:
        """Returns the frames of all windows `(N, D)`, each window's own in the place that the geometry gives it."""
        weights = list(self.audio_tower.parameters())
        windows = torch.from_numpy(mel_frames)
        skipped, counts = torch.from_numpy(places.first), torch.from_numpy(places.counts)
        begins = counts.cumsum(0) - counts
        frames = None
        # A frozen encoder keeps nothing for the backward pass, though the language model behind it trains.
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
            for batch in self.windows.batches(mel_frames, self.config.windows_per_batch, weights[0].is_cpu):
                hidden = self.encode_windows(input_features[batch], windows[batch])
                place = torch.arange(hidden.shape[1]) - skipped[batch, None]
                own = (place >= 0) & (place < counts[batch, None])
                if frames is None:
                    frames = hidden.new_empty(int(counts.sum()), hidden.shape[2])
                frames[(begins[batch, None] + place)[own]] = hidden[own]
        return cast(Tensor, frames)

    def _received(self, recordings: EncodedRecordings) -> EncodedRecordings:
        """Returns recordings that a user hands in where this model can read them; those of another one are refused."""
        if recordings.encoder is None:
            return recordings
        if recordings.encoder != self.fingerprint():
            raise ValueError(
                "recordings were encoded by another model, whose frames mean nothing to this one; encode them again."
            )
        like = next(self.audio_tower.parameters())
        return recordings if like.is_meta else recordings.to(like.device, like.dtype)

    def _ctc_input(self, frames: Tensor) -> Tensor:
        hidden_states = self.normalise(frames)
        return hidden_states if self.config.ctc_projector else self.project(hidden_states)


__all__ = ["FastLongSpeechAudioOutput", "SpeechExtractor"]
