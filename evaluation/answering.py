"""How a question about a recording is answered: by the frames of the recording, or by its transcript.

Follow one batch: recordings -> embeddings, of each recording once -> prompts with as many placeholders -> greedy
answers. A batch answers as its questions would one by one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..audio_fastlongspeech import FRAME_SECONDS, load_recording
from ..cli import TRANSCRIBE
from ..compression_fastlongspeech import COMPRESSIONS
from ..placeholders_fastlongspeech import insert_audio

METHODS = {
    "ntk_rope": "every frame, positions stretched to the language model's context; fused where even that is too short",
    "vanilla": "every frame, clips of one window only: the base model as it is",
    "cascade": "the transcript by the language model, window by window, given to it as text",
    "ctc_cascade": "the transcript by the CTC decoder, given to the language model as text",
    "ctc": "no language model: the transcript by the CTC decoder",
}
CASCADE = "This is the transcript of a recording: {transcript}\n\n{question}"
TRANSCRIPT_TOKENS = 256  # of one 30 s window: 75 words at 150 a minute, and room


class Answer(NamedTuple):
    """``text``, and whether it ``ended`` by itself before the limit of tokens."""

    text: str
    ended: bool


def make_prompt(processor: Any, question: str, audio: bool) -> str:
    """Returns a question in the chat template, about a recording (one placeholder) or about nothing."""
    recording = [{"type": "audio"}] if audio else []
    turn = [{"role": "user", "content": [*recording, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def ask(
    model: Any, processor: Any, questions: Sequence[str], heard: Sequence[Tensor | None], max_new_tokens: int
) -> list[Answer]:
    """Returns the greedy answers to questions in one batch.

    Args:
        model, processor: a FastLongSpeech and its processor.
        questions: one for every answer.
        heard: what each question is about: the embeddings of a recording, `(frames, hidden)`, or None for nothing.
        max_new_tokens: of every answer.
    """
    token = processor.audio_token
    prompts = []
    for question, embeddings in zip(questions, heard, strict=True):
        prompt = make_prompt(processor, question, embeddings is not None)
        prompts.append(prompt if embeddings is None else prompt.replace(token, token * len(embeddings)))
    inputs = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    embeds = model.get_input_embeddings()(inputs.input_ids)
    audio = [embeddings for embeddings in heard if embeddings is not None]
    if audio:
        embeds = insert_audio(embeds, inputs.input_ids == processor.audio_token_id, torch.cat(audio))
    ids = model.generate(
        inputs_embeds=embeds, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    ends = model.generation_config.eos_token_id
    ended = torch.isin(ids, torch.tensor([] if ends is None else ends).to(ids)).any(1) | (
        ids.shape[1] < max_new_tokens
    )
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [Answer(text, end) for text, end in zip(texts, ended.tolist(), strict=True)]


class Answerer:
    """Answers questions by one method.

    Args:
        model, processor: a FastLongSpeech and its processor.
        method: a compression, `"none"`, or one of `METHODS`.
        target_length: L, for a compression; None: the model's.
        max_new_tokens: of every answer.
    """

    def __init__(
        self, model: Any, processor: Any, method: str, target_length: int | None, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.method = model, processor, method
        self.max_new_tokens = max_new_tokens
        self.compression = method if method in COMPRESSIONS else "none"
        self.target_length = (target_length or model.config.target_length) if method in COMPRESSIONS else None
        self._heard: dict[str, Any] = {}

    def prepare(self, questions: Sequence[str], durations: Sequence[float]) -> None:
        """Fits the method to all questions and the durations of their recordings, in seconds.

        Raises:
            ValueError: the method can't hear one of the recordings, or has no room for one of the questions.
        """
        window = self.processor.feature_extractor.chunk_length
        if self.method == "vanilla" and max(durations) > window:
            count = sum(duration > window for duration in durations)
            raise ValueError(
                f"vanilla hears clips of up to {window} s, but {count} rows have longer ones, up to "
                f"{max(durations):.1f} s; take another compression, or clips."
            )
        if self.method == "ntk_rope":
            prompts = self.processor.tokenizer([make_prompt(self.processor, question, True) for question in questions])
            longest = max(map(len, prompts.input_ids))
            self.compression = "iterative_fusion"
            self.target_length = self.model.config.fit_length(longest + self.max_new_tokens)

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], names: Sequence[str], recordings: Sequence[Any]) -> list[Answer]:
        """Returns the answers to questions, each about the recording beside it.

        Args:
            questions: one for every answer.
            names: of the recordings; the same name is the same recording, which is heard once.
            recordings: as `load_recording` takes them.
        """
        self._heard = {name: self._heard[name] for name in names if name in self._heard}
        new = {name: audio for name, audio in zip(names, recordings, strict=True) if name not in self._heard}
        if new:
            self._heard |= dict(zip(new, self._hear(list(new.values())), strict=True))
        heard = [self._heard[name] for name in names]
        if self.method == "ctc":
            return [Answer(transcript, True) for transcript in heard]
        if "cascade" in self.method:
            questions = [
                CASCADE.format(transcript=transcript, question=question)
                for transcript, question in zip(heard, questions, strict=True)
            ]
            heard = [None] * len(questions)
        answers = ask(self.model, self.processor, questions, heard, self.max_new_tokens)
        return [Answer(text.strip(), ended) for text, ended in answers]

    def _hear(self, recordings: list[Any]) -> list[Any]:
        """Returns the embeddings of recordings, or their transcripts."""
        if self.method == "cascade":
            return [self._transcribe(recording) for recording in recordings]
        if self.method in ("ctc", "ctc_cascade"):
            inputs = self.processor(audio=recordings).to(self.model.device)
            return self.processor.ctc_decode(self.model.ctc_transcribe(**inputs))
        return self._embed(recordings)

    def _embed(self, recordings: list[Any], **options: Any) -> list[Tensor]:
        inputs = self.processor(audio=recordings, **options).to(self.model.device)
        features = self.model.get_audio_features(
            **inputs, target_length=self.target_length, compression=self.compression, return_dict=True
        )
        return list(features.pooler_output.split(features.audio_lengths.tolist()))

    def _transcribe(self, recording: Any) -> str:
        """Returns what the language model writes down of a recording, window by window, with every frame."""
        extractor = self.processor.feature_extractor
        samples = load_recording(recording, target_rate=extractor.sampling_rate)
        windows = [
            samples[start : start + extractor.n_samples] for start in range(0, len(samples), extractor.n_samples)
        ]
        windows = [window for window in windows if len(window) >= FRAME_SECONDS * extractor.sampling_rate]
        texts, size = [], self.model.config.windows_per_batch
        for first in range(0, len(windows), size):
            batch = windows[first : first + size]
            heard = self._embed(batch, sampling_rate=extractor.sampling_rate)
            answers = ask(self.model, self.processor, [TRANSCRIBE] * len(batch), heard, TRANSCRIPT_TOKENS)
            texts += [answer.text.strip() for answer in answers]
        return " ".join(texts)
