"""The processor: prompts and recordings of any duration -> what FastLongSpeech takes.

Follow one recording: `load_recording` (decode, mono, 16 kHz) -> `FastLongSpeechProcessor.get_audio_inputs` (30 s
windows, log-mel features, placeholder counts) -> `FastLongSpeechProcessor.__call__` (text with as many placeholders).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, ProcessorMixin, TextKwargs
from transformers.utils import CONFIG_NAME, cached_file

from .audio_fastlongspeech import SOURCE_KEYS, list_recordings, load_recording
from .compression_fastlongspeech import check_compression
from .configuration_fastlongspeech import FastLongSpeechConfig
from .fusion_fastlongspeech import check_target_length
from .recordings_fastlongspeech import EncodedRecordings
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
AUDIO_TYPES = ("audio", "input_audio", "audio_url")

# Qwen2-Audio's: every recording is announced as "Audio 1:", "Audio 2:", ... and has one placeholder.
CHAT_TEMPLATE = (
    "{% set audio = namespace(count=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
    "{% set audio.count = audio.count + 1 %}"
    "Audio {{ audio.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in part %}"
    "{{ part['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)


def _pop_sampling_rate(kwargs: dict[str, Any]) -> float | None:
    """Takes the sampling rate of arrays out of call arguments, flat or in `audio_kwargs`."""
    kwargs["audio_kwargs"] = dict(kwargs.get("audio_kwargs") or {})
    rates = (kwargs.pop("sampling_rate", None), kwargs["audio_kwargs"].pop("sampling_rate", None))
    return rates[1] if rates[0] is None else rates[0]


def _configured_length(source: str, hub_kwargs: dict[str, Any]) -> int | None:
    """Returns the `target_length` in the `config.json` of a folder or repository; None where there is none."""
    path = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("target_length")


def _plain_part(part: Any, load: Callable) -> dict[str, Any]:
    """Returns a part of a chat as transformers writes it, `load`ed if it is audio; None of `load` is just a place."""
    got = f"a {type(part).__name__}"
    if isinstance(part, Mapping):
        kind, has_source = part.get("type"), any(part.get(key) is not None for key in SOURCE_KEYS)
        if kind in AUDIO_TYPES or (kind is None and has_source):
            loaded = load(part)
            return {"type": "audio"} if loaded is None else {"type": "audio", "audio": loaded}
        if kind in ("text", None) and isinstance(part.get("text"), str) and not has_source:
            return {"type": "text", "text": part["text"]}
        got = f"{kind!r} with the keys {sorted(part)}"
    raise ValueError(f'a part of a chat must be of the type "text" or {", ".join(AUDIO_TYPES)}, got {got}.')


def _plain_message(message: Mapping, load: Callable) -> Mapping:
    if not isinstance(message.get("content"), (list, tuple)):
        return message
    return {**message, "content": [_plain_part(part, load) for part in message["content"]]}


class FastLongSpeechProcessor(ProcessorMixin):
    """Turns prompts and recordings of any duration into the inputs of FastLongSpeech.

    Args:
        feature_extractor: a `WhisperFeatureExtractor` of 30 s windows.
        tokenizer: the language model's.
        chat_template: None for Qwen2-Audio's.
        audio_token: the placeholder; a prompt holds one for every recording and gets one for every fused frame.
        audio_bos_token: written before a recording's placeholders by the chat template.
        audio_eos_token: written after them.
        end_of_turn_token: written after every turn by the chat template, and after answers in training.
        target_length: L, the frames a recording is fused to unless a call says otherwise; absent: the default of
            `FastLongSpeechConfig`. A processor that is loaded from a folder takes what the configuration there says.
        ctc_model: the path of the SentencePiece model of the CTC labels; None when the CTC decoder uses the
            tokenizer's own vocabulary. It is saved as `ctc.model` beside the tokenizer and found there again.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        audio_token="<|AUDIO|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
        end_of_turn_token="<|im_end|>",
        target_length=None,
        ctc_model=None,
    ):
        self.audio_token = getattr(tokenizer, "audio_token", audio_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        self.audio_bos_token = getattr(tokenizer, "audio_bos_token", audio_bos_token)
        self.audio_eos_token = getattr(tokenizer, "audio_eos_token", audio_eos_token)
        self.end_of_turn_token = end_of_turn_token
        target_length = FastLongSpeechConfig.target_length if target_length is None else target_length
        self.target_length = int(check_target_length(target_length, 1)[0])
        self.ctc_tokenizer = None
        if ctc_model is not None:
            if not Path(ctc_model).is_file():
                raise FileNotFoundError(
                    f"ctc_model must be the path of a SentencePiece model, but {ctc_model} is no file."
                )
            self.ctc_tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.fspath(ctc_model))
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        # Pipelines batch by these, and refuse two that differ. Calls of the processor pad on the left all the same.
        tokenizer.padding_side = feature_extractor.padding_side

    @property
    def ctc_vocab_size(self) -> int:
        """Pieces of the CTC vocabulary without the blank; 0 when it is the tokenizer's own."""
        return 0 if self.ctc_tokenizer is None else self.ctc_tokenizer.vocab_size()

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
            compression: "none" for a placeholder per frame; every other way to shorten a recording (see
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
            raise ValueError("audios= is not an argument of FastLongSpeechProcessor; pass the recordings as audio=...")
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
                    f"write {self.audio_bos_token}{self.audio_token}{self.audio_eos_token} for each."
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
        """Returns the windows of recordings, as in `__call__`, and `num_audio_tokens` `(A,)`, int64.

        Each window is what the feature extractor makes of its samples alone: 30 s, the last one of a recording padded.
        """
        extractor = self.feature_extractor
        geometry = Windows(extractor.sampling_rate, extractor.hop_length, extractor.nb_max_frames)
        options = {"sampling_rate": extractor.sampling_rate, "return_attention_mask": True, "device": device or "cpu"}
        windows, windows_per_audio = [], []
        for recording in recordings:
            samples = load_recording(recording, sampling_rate, extractor.sampling_rate)
            cuts = geometry.cut(len(samples))
            windows += [samples[start:stop] for start, stop in cuts]
            windows_per_audio.append(len(cuts))
        features = np.empty((len(windows), extractor.feature_size, extractor.nb_max_frames), dtype=np.float32)
        masks = np.empty((len(windows), extractor.nb_max_frames), dtype=np.int64)
        for index, window in enumerate(windows):
            extracted = extractor(window, return_tensors="np", **options)
            features[index], masks[index] = extracted["input_features"][0], extracted["attention_mask"][0]
        sizes = np.array(windows_per_audio, dtype=np.int64)
        frames = geometry.place(masks.sum(1), sizes).lengths
        return {
            "input_features": features,
            "feature_attention_mask": masks,
            "windows_per_audio": sizes,
            "num_audio_tokens": self._count_tokens(frames, target_length, compression),
        }

    def _count_tokens(self, frames: np.ndarray, target_length: Any, compression: str | None) -> np.ndarray:
        """Returns the placeholders of recordings of so many frames `(A,)`, int64."""
        target_length = self.target_length if target_length is None else target_length
        lengths = check_target_length(target_length, len(frames)).numpy()
        if compression is not None:
            check_compression(compression)
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
        if isinstance(conversation[0], Mapping):
            conversation = [_plain_message(message, load) for message in conversation]
        else:
            conversation = [[_plain_message(message, load) for message in messages] for messages in conversation]
        return super().apply_chat_template(conversation, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `processor_config.json` holds, with the class to load by `trust_remote_code`."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}}

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
