"""The processor of any host: prompts and recordings of any duration -> what FastLongSpeech takes.

Follow one recording: `load_recording` (decode, mono, 16 kHz) -> `SpeechProcessor.get_audio_inputs` (windows, log-mel
features, placeholder counts) -> `SpeechProcessor.__call__` (text with as many placeholders).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, ProcessorMixin, TextKwargs
from transformers.utils import CONFIG_NAME, cached_file

from .audio_fastlongspeech import list_recordings, load_recording
from .chats_fastlongspeech import plain_chats
from .compression_fastlongspeech import check_compression
from .fusion_fastlongspeech import check_target_length
from .recordings_fastlongspeech import EncodedRecordings
from .settings_fastlongspeech import FastLongSpeechSettings
from .windows_fastlongspeech import Windows

CTC_MODEL_NAME = "ctc.model"
TOKENIZER_DEFAULTS = {
    "padding": True,
    "padding_side": "left",
    "return_token_type_ids": False,
    "return_tensors": "pt",
}
PADDING_OPTIONS = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
# What `apply_chat_template` hands on to `__call__`; `return_tensors` is an argument of both.
CALL_OPTIONS = {
    "target_length",
    "compression",
    "answers",
    "recordings",
    *TextKwargs.__annotations__,
    *AudioKwargs.__annotations__,
}
CALL_OPTIONS -= {"return_tensors"}


def _pop_sampling_rate(kwargs: dict[str, Any]) -> float | None:
    """Takes the sampling rate of arrays out of call arguments, flat or in `audio_kwargs`."""
    kwargs["audio_kwargs"] = dict(kwargs.get("audio_kwargs") or {})
    rates = (kwargs.pop("sampling_rate", None), kwargs["audio_kwargs"].pop("sampling_rate", None))
    return rates[1] if rates[0] is None else rates[0]


def _configured_length(source: str, hub_kwargs: dict[str, Any]) -> int | None:
    """Returns the `target_length` in the `config.json` of a folder or repository; None where there is none."""
    path = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("target_length")


class SpeechProcessor(ProcessorMixin):
    """Turns prompts and recordings of any duration into the inputs of FastLongSpeech.

    A host's class brings the attributes.

    Args:
        feature_extractor: the host's; `features` reads it.
        tokenizer: the language model's.
        chat_template: None for the host's.
        audio_token: the placeholder; a prompt holds one for every recording and gets one for every fused frame.
        audio_bos_token: written before a recording's placeholders by the chat template, where the host has it.
        audio_eos_token: written after them.
        end_of_turn_token: written after every turn by the chat template, and after answers in training.
        target_length: L, the frames a recording is fused to unless a call says otherwise; absent: the default of
            the configuration. A processor that is loaded from a folder takes what the configuration there says.
        ctc_model: the path of the SentencePiece model of the CTC labels; None when the CTC decoder uses the
            tokenizer's own vocabulary. It is saved as `ctc.model` beside the tokenizer and found there again.

    Attributes:
        config_class: the host's configuration, which knows the windows.
        tokens: what the tokens above are where neither a call nor the tokenizer says so.
        template: the host's chat template.
        whole_recordings: whether the feature extractor reads a recording whole, and its features are cut into
            windows; otherwise it reads each window alone, padded to its whole length.
    """

    config_class: type[FastLongSpeechSettings]
    tokens: dict[str, str]
    template: str | None = None
    whole_recordings = False

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        audio_token=None,
        audio_bos_token=None,
        audio_eos_token=None,
        end_of_turn_token=None,
        target_length=None,
        ctc_model=None,
    ):
        given = {"audio_token": audio_token, "audio_bos_token": audio_bos_token, "audio_eos_token": audio_eos_token}
        found = {name: getattr(tokenizer, name, token or self.tokens.get(name)) for name, token in given.items()}
        self.audio_token = str(found["audio_token"])
        self.audio_bos_token, self.audio_eos_token = found["audio_bos_token"], found["audio_eos_token"]
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        self.end_of_turn_token = end_of_turn_token or self.tokens["end_of_turn_token"]
        target_length = self.config_class.target_length if target_length is None else target_length
        self.target_length = int(check_target_length(target_length, 1)[0])
        self.ctc_tokenizer = None
        if ctc_model is not None:
            if not Path(ctc_model).is_file():
                raise FileNotFoundError(
                    f"ctc_model must be the path of a SentencePiece model, but {ctc_model} is no file."
                )
            try:
                self.ctc_tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.fspath(ctc_model))
            except RuntimeError as error:
                raise ValueError(f"ctc_model {ctc_model} is no SentencePiece model; name another file.") from error
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or self.template)
        # Pipelines batch by these, and refuse two that differ. Calls of the processor pad on the left all the same.
        tokenizer.padding_side = feature_extractor.padding_side

    @property
    def ctc_vocab_size(self) -> int:
        """Pieces of the CTC vocabulary without the blank; 0 when it is the tokenizer's own."""
        return 0 if self.ctc_tokenizer is None else self.ctc_tokenizer.vocab_size()

    @property
    def windows(self) -> Windows:
        """How the host cuts recordings."""
        return self.config_class.windows

    @property
    def feature_rows(self) -> int:
        """Mel bins of the features."""
        return self.feature_extractor.feature_size

    def get_vocab(self) -> dict[str, int]:
        """Returns the tokenizer's vocabulary: servers hand the processor out as the tokenizer of stop strings."""
        return self.tokenizer.get_vocab()

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_attention_mask", "windows_per_audio"]

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        answers: str | list[str] | None = None,
        ctc_text: str | list[str] | None = None,
        compression: str | None = None,
        recordings: EncodedRecordings | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Returns the model's inputs for prompts, recordings or both.

        Args:
            text: prompts with one audio token for every recording, in order.
            audio: recordings as `load_recording` takes them, one or a list.
            answers: for training, one for every prompt; each is appended with the end-of-turn token.
            ctc_text: for CTC training, the transcript of every recording.
            compression: "none" for a placeholder per frame; "summary" for the frames that the language model reads and
                sums up, `target_length` for every 30 s of a recording; every other way to shorten a recording (see
                `compression_fastlongspeech.py`) needs the same placeholders, at most `target_length`.
            recordings: what the model's `encode` returned, instead of `audio`: those that the prompts ask about, one
                for each audio token in order, or one for all.
            sampling_rate: hertz of arrays that do not bring their own.
            target_length: L, frames to fuse a recording to; one for all or a list of one per recording; by default
                the processor's `target_length`.
            kwargs: options of the tokenizer, such as `padding` (True), `padding_side` ("left") and
                `return_tensors` ("pt").

        Returns:
            `input_ids`, `attention_mask` `(B, S)` when there is text; `input_features` `(W, mels, 3000)` float32,
            `feature_attention_mask` `(W, 3000)` and `windows_per_audio` `(A,)` when there is audio, the windows of all
            recordings in order; `labels` `(B, S)` with -100 on prompt, audio and padding when there are answers;
            `ctc_labels` `(A, C)` padded with -100 when there is CTC text.

        Raises:
            ValueError: the numbers of recordings and audio tokens (or answers, or transcripts) differ,
                `target_length` is not positive, or anything `load_recording` refuses.
        """
        if "audios" in kwargs:
            raise ValueError(f"audios= is not an argument of {type(self).__name__}; pass the recordings as audio=...")
        sources = [] if audio is None else list_recordings(audio)
        if text is None and not sources and (recordings is None or ctc_text is None):
            raise ValueError("pass text, audio or both, got neither.")
        if sources and recordings is not None:
            raise ValueError("pass either audio or recordings that are encoded already, got both.")
        if text is None and answers is not None:
            raise ValueError("answers need the prompts they answer; pass them as text.")
        text = [text] if isinstance(text, str) else text
        if text is not None and not all(isinstance(prompt, str) for prompt in text):
            raise TypeError("text must be a string or a list of strings.")

        sampling_rate = _pop_sampling_rate(kwargs)
        target_length = kwargs.pop("target_length", None)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # transformers annotates an instance of it
            tokenizer_init_kwargs={k: v for k, v in self.tokenizer.init_kwargs.items() if k != "padding_side"},
            **kwargs,
        )
        options = {**TOKENIZER_DEFAULTS, **merged["text_kwargs"]}
        return_tensors = options.pop("return_tensors")

        placeholders = [] if text is None else self._count_placeholders(text)
        asked, heard = sum(placeholders), len(sources if recordings is None else recordings)
        shared = recordings is not None and heard == 1 and asked > 0
        if text is not None and asked != heard and not shared:
            raise ValueError(
                f"the number of {self.audio_token} tokens in the prompts should be the same as the number of "
                f"recordings passed, got {asked} and {heard}."
            )
        for number, prompt in enumerate(text or ()):
            if 2 * self.audio_token in prompt:
                raise ValueError(
                    f"prompt {number} holds {self.audio_token} tokens side by side, which would pass for one; "
                    f"write {self.audio_bos_token or ''}{self.audio_token}{self.audio_eos_token or ' '} for each."
                )
        if recordings is None:
            device = merged["audio_kwargs"].get("device")
            audio_inputs = self.get_audio_inputs(sources, sampling_rate, target_length, compression, device)
        else:
            frames = recordings.lengths.numpy().repeat(asked if shared else 1)
            audio_inputs = {"num_audio_tokens": self._count_tokens(frames, target_length, compression)}
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._tokenize(text, answers, placeholders, audio_inputs, options))
        if sources:
            data.update((name, value) for name, value in audio_inputs.items() if name != "num_audio_tokens")
        if ctc_text is not None:
            transcripts = [ctc_text] if isinstance(ctc_text, str) else ctc_text
            data["ctc_labels"] = self._encode_ctc(transcripts, heard)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def get_audio_inputs(
        self,
        recordings: list,
        sampling_rate: float | None = None,
        target_length: int | Sequence[int] | None = None,
        compression: str | None = None,
        device: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the windows of recordings, as in `__call__`, and `num_audio_tokens` `(A,)`, int64."""
        geometry = self.windows
        samples = [load_recording(recording, sampling_rate, geometry.sampling_rate) for recording in recordings]
        sizes = np.array([len(geometry.cut(len(of_one))) for of_one in samples], dtype=np.int64)
        shape = (int(sizes.sum()), geometry.mel_frames_per_window)
        features = np.empty((shape[0], self.feature_rows, shape[1]), dtype=np.float32)
        masks = np.empty(shape, dtype=np.int64)
        windows = (window for of_one in samples for window in self.features(of_one, device or "cpu"))
        for index, (window, mask) in enumerate(windows):
            features[index], masks[index] = window, mask
        frames = geometry.place(masks.sum(1), sizes).lengths
        return {
            "input_features": features,
            "feature_attention_mask": masks,
            "windows_per_audio": sizes,
            "num_audio_tokens": self._count_tokens(frames, target_length, compression),
        }

    def features(self, samples: np.ndarray, device: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the log-mel features of every window of a recording, `(mels, T)`, and which hold audio, `(T,)`."""
        extractor, cuts = self.feature_extractor, self.windows.cut(len(samples))
        options = {"sampling_rate": extractor.sampling_rate, "return_attention_mask": True, "return_tensors": "np"}
        if self.whole_recordings:
            extracted = extractor(samples, padding=True, truncation=False, device=device, **options)
            mel, mask = extracted["input_features"][0], extracted["attention_mask"][0]
            length = self.windows.mel_frames_per_window
            missing = max(0, length * len(cuts) - len(mask))
            mel, mask = np.pad(mel, ((0, 0), (0, missing))), np.pad(mask, (0, missing))
            for start in range(0, length * len(cuts), length):
                yield mel[:, start : start + length], mask[start : start + length]
        else:
            for start, stop in cuts:
                extracted = extractor(samples[start:stop], device=device, **options)
                yield extracted["input_features"][0], extracted["attention_mask"][0]

    def _count_tokens(self, frames: np.ndarray, target_length: Any, compression: str | None) -> np.ndarray:
        """Returns the placeholders of recordings of so many frames `(A,)`, int64."""
        target_length = self.target_length if target_length is None else target_length
        lengths = check_target_length(target_length, len(frames)).numpy()
        if compression is not None:
            check_compression(compression)
        if compression == "summary":  # the language model reads so many, and keeps fewer
            return self.windows.share(frames, lengths)
        return frames if compression == "none" else np.minimum(frames, lengths)

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        """Returns the placeholders of one recording."""
        return self.audio_token * int(audio_inputs["num_audio_tokens"][audio_idx])

    def _count_placeholders(self, text: list[str]) -> list[int]:
        """Returns the audio tokens of every prompt, one for each of its recordings."""
        as_they_are = [self.audio_token] * sum(prompt.count(self.audio_token) for prompt in text)
        _, replaced = self.get_text_with_replacements(list(text), audio_replacements=as_they_are)
        return [len(of_prompt) for of_prompt in replaced]

    def _tokenize(
        self,
        text: list[str],
        answers: str | list[str] | None,
        placeholders: list[int],
        audio_inputs: dict[str, np.ndarray],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask` and, with answers, `labels`, as lists of one row per prompt."""
        with_types = options.pop("return_mm_token_type_ids", False)
        with_offsets = options.pop("return_text_replacement_offsets", False)
        recordings = range(len(audio_inputs["num_audio_tokens"]))
        replacements = [self.replace_audio_token(audio_inputs, index) for index in recordings]
        text, offsets = self.get_text_with_replacements(list(text), audio_replacements=replacements)
        if answers is None:
            encoded = dict(self.tokenizer(text, **options))
        else:
            encoded = self._tokenize_with_answers(text, [answers] if isinstance(answers, str) else answers, options)

        counts = iter(audio_inputs["num_audio_tokens"].tolist())
        for row, (ids, recordings_of_row) in enumerate(zip(encoded["input_ids"], placeholders, strict=True)):
            wanted, found = sum(islice(counts, recordings_of_row)), ids.count(self.audio_token_id)
            if wanted != found:
                raise ValueError(
                    f"prompt {row} must hold {wanted} {self.audio_token} tokens for its recordings, but tokenizing "
                    f"left {found}; check truncation, max_length and the answer."
                )
        if with_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if with_offsets:
            encoded["text_replacement_offsets"] = offsets
        return encoded

    def _tokenize_with_answers(self, text: list[str], answers: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """As `_tokenize`. Prompt and answer are tokenized apart, as in inference."""
        if len(answers) != len(text):
            raise ValueError(f"answers must hold one answer per prompt, got {len(answers)} for {len(text)} prompts.")
        prompts = self.tokenizer(text, **{**options, "padding": False})["input_ids"]
        endings = self.tokenizer([answer + self.end_of_turn_token for answer in answers], add_special_tokens=False)[
            "input_ids"
        ]
        rows = [prompt + ending for prompt, ending in zip(prompts, endings, strict=True)]
        padding = {name: options[name] for name in PADDING_OPTIONS if name in options}
        encoded = dict(self.tokenizer.pad({"input_ids": rows}, **padding))
        encoded["labels"] = [
            [
                token if real and position > len(prompt) else -100
                for token, real, position in zip(ids, mask, accumulate(mask), strict=True)
            ]
            for prompt, ids, mask in zip(prompts, encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]
        return encoded

    def _encode_ctc(self, transcripts: list[str], recordings: int) -> np.ndarray:
        """Returns the CTC labels of transcripts `(A, C)`, int64, padded with -100."""
        if len(transcripts) != recordings:
            raise ValueError(
                f"ctc_text must hold one transcript per recording, got {len(transcripts)} for {recordings} recordings."
            )
        if self.ctc_tokenizer is not None:
            rows = self.ctc_tokenizer.encode(list(transcripts))
        else:
            rows = self.tokenizer(list(transcripts), add_special_tokens=False)["input_ids"]
        labels = np.full((len(rows), max(map(len, rows), default=0)), -100, dtype=np.int64)
        for label, row in zip(labels, rows, strict=True):
            label[: len(row)] = row
        return labels

    def ctc_decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of rows of CTC ids, blanks and repeats already dropped; negative ids are padding."""
        rows = [[int(token) for token in row if token >= 0] for row in ids]
        if self.ctc_tokenizer is not None:
            return [self.ctc_tokenizer.decode(row) for row in rows]
        return self.tokenizer.batch_decode(rows)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns a conversation as a prompt or, with `tokenize=True`, as the inputs of the model.

        As in transformers; an audio part is `{"type": "audio", "audio" | "path" | "url": ...}` with anything
        `load_recording` takes, or OpenAI's, of the type "input_audio" or "audio_url". `{"type": "audio"}` alone is
        the place of one of `recordings`. `__call__`'s arguments (`target_length`, `recordings`, ...) may be given
        directly or in `processor_kwargs`.

        Raises:
            ValueError: a part of the chat is neither audio nor text, or anything `__call__` refuses.
        """

        def load(part: Mapping) -> Any:
            if encoded and set(part) == {"type"}:
                return None  # the place of one of `recordings`
            return load_recording(part, sampling_rate, rate) if kwargs.get("tokenize") else part

        rate, sampling_rate, encoded = self.feature_extractor.sampling_rate, None, False
        if kwargs.get("tokenize"):
            call_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
            call_kwargs.update({name: kwargs.pop(name) for name in CALL_OPTIONS & kwargs.keys()})
            sampling_rate = _pop_sampling_rate(call_kwargs)
            encoded = call_kwargs.get("recordings") is not None
            kwargs["processor_kwargs"] = {**call_kwargs, "sampling_rate": rate}
        return super().apply_chat_template(plain_chats(conversation, load), *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `processor_config.json` holds, with the class to load by `trust_remote_code`."""
        here = type(self).__module__.rpartition(".")[2]
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"{here}.{type(self).__name__}"}}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes tokenizer, feature extractor, chat template, CTC vocabulary and the code into a folder."""
        files = super().save_pretrained(save_directory)
        custom_object_save(self, save_directory)
        if self.ctc_tokenizer is not None:
            Path(save_directory, CTC_MODEL_NAME).write_bytes(self.ctc_tokenizer.serialized_model_proto())
        else:
            Path(save_directory, CTC_MODEL_NAME).unlink(missing_ok=True)  # of what was saved there before
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Returns the arguments of `__init__` a folder or repository holds, with its configuration's `target_length`
        and the place of its `ctc.model`."""
        where = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in where if name in kwargs}
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not os.path.isfile(pretrained_model_name_or_path):
            configured = _configured_length(str(pretrained_model_name_or_path), hub_kwargs)
            if configured is not None:  # L is the configuration's to say; a processor saved alone says it itself
                processor_dict["target_length"] = configured
            processor_dict["ctc_model"] = cached_file(
                str(pretrained_model_name_or_path),
                CTC_MODEL_NAME,
                _raise_exceptions_for_missing_entries=False,
                **hub_kwargs,
            )
        return processor_dict, kwargs


__all__ = ["SpeechProcessor"]
