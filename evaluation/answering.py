"""How a question about a recording is answered: by the frames of the recording, or by its transcript.

Follow one batch: recordings -> frames -> embeddings -> prompts with as many placeholders -> greedy answers. Each
recording is encoded once, and the language model reads it once for all its questions. A question gets the same answer
in a batch and alone.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from os.path import commonprefix  # of any lists
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..app.session import Answer
from ..compression_fastlongspeech import COMPRESSIONS
from ..extractor_fastlongspeech import FastLongSpeechAudioOutput
from ..prompts_fastlongspeech import TRANSCRIBE, embed_prompts
from ..recordings_fastlongspeech import EncodedRecordings
from ..summarised_fastlongspeech import SummarisedRecordings

METHODS = {
    "ntk_rope": "every frame, positions stretched to the language model's context; fused where even that is too short",
    "vanilla": "every frame, clips of one window only: the base model as it is",
    "cascade": "the transcript by the language model, window by window, given to it as text",
    "ctc_cascade": "the transcript by the CTC decoder, given to the language model as text",
    "true_transcript": "what is really said (the column passage), given to the language model as text",
    "summary": "every frame, or L of every 30 s, summed up by the language model, see --compression-ratio",
    "ctc": "no language model: the transcript by the CTC decoder",
}
BY_TRANSCRIPT = ("cascade", "ctc_cascade", "true_transcript")
CASCADE = "This is the transcript of a recording: {transcript}\n\n{question}"
WINDOW_SECONDS = 30  # what the base model hears at once and what is transcribed at once, whatever the encoder reads
TRANSCRIPT_TOKENS = 256  # of one such window: 75 words at 150 a minute, and room


def make_prompt(processor: Any, question: str, audio: bool) -> str:
    """Returns a question in the chat template, about a recording (one placeholder) or about nothing."""
    recording = [{"type": "audio"}] if audio else []
    turn = [{"role": "user", "content": [*recording, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


@torch.inference_mode()
def answer_batch(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    heard: Sequence[Tensor | None],
    max_new_tokens: int,
    names: Sequence[str] = (),
) -> list[Answer]:
    """Returns the greedy answers to questions in one batch.

    Neighbouring questions about the same recording begin alike: with the recording, or with its transcript. The
    language model reads that common beginning once.

    Args:
        model, processor: a FastLongSpeech and its processor.
        questions: one for every answer.
        heard: what each question is about: the embeddings of a recording, `(frames, hidden)`, or None for nothing.
        max_new_tokens: of every answer.
        names: of the recordings; by default the same embeddings are the same recording.
    """
    asked = zip(questions, heard, strict=True)
    prompts = [make_prompt(processor, question, audio=about is not None) for question, about in asked]
    rows = processor.tokenizer(prompts).input_ids
    described = zip(names or map(id, heard), zip(heard, rows, strict=True), strict=True)
    groups = [[pair for _, pair in neighbours] for _, neighbours in groupby(described, key=lambda item: item[0])]
    # At least the last token is left to each question: the language model must see one to give logits.
    openings = [commonprefix([row[:-1] for _, row in group]) for group in groups]
    group_of = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=model.device)
    ids, mask = _left_padded(openings, model.device)
    embed = model.get_input_embeddings()
    audio = [about for (about, _), *_ in groups if about is not None]
    if audio:
        lengths = torch.tensor([len(embeddings) for embeddings in audio])
        output = FastLongSpeechAudioOutput(pooler_output=torch.cat(audio), audio_lengths=lengths)
        ids, mask, embeds = embed_prompts(embed, processor.audio_token_id, ids, mask, output)
    else:
        embeds = embed(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    ).past_key_values
    cache.batch_select_indices(group_of)  # a copy of its recording's keys and values for every question

    rests = [row[len(opening) :] for opening, group in zip(openings, groups, strict=True) for _, row in group]
    rest_ids, rest_mask = _left_padded(rests, model.device)
    ids = model.generate(
        inputs_embeds=torch.cat((embeds[group_of], embed(rest_ids)), dim=1),
        attention_mask=torch.cat((mask[group_of], rest_mask), dim=1),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return _answers(model, processor, ids, max_new_tokens)


@torch.inference_mode()
def answer_summarised(
    model: Any, processor: Any, questions: Sequence[str], heard: Sequence[SummarisedRecordings], max_new_tokens: int
) -> list[Answer]:
    """Returns the greedy answers to questions in one batch, each about a recording that is summed up already.

    Args:
        model, processor, questions, max_new_tokens: as in `answer_batch`.
        heard: what `summarise_recording` returned for the recording of each question.
    """
    prompts = [make_prompt(processor, question, audio=True) for question in questions]
    ids, mask = _left_padded(processor.tokenizer(prompts).input_ids, model.device)
    summaries = SummarisedRecordings.cat(heard)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, recordings=summaries, **options)
    return _answers(model, processor, out[:, ids.shape[1] :], max_new_tokens)


def summarise_recording(
    model: Any, processor: Any, recording: EncodedRecordings, target_length: int | None, ratio: int | None
) -> SummarisedRecordings:
    """Returns a recording summed up at the beginning of a prompt, which ends in any question.

    Args:
        model, processor: a FastLongSpeech with summary projections and its processor.
        recording: one encoded recording.
        target_length: the frames that 30 s are fused to before; None: the model's.
        ratio: frames for each summary token; None: the model's.
    """
    ids, mask = _left_padded(processor.tokenizer([make_prompt(processor, "?", audio=True)]).input_ids, model.device)
    return model.summarise(
        ids, mask, compression_ratio=ratio, target_length=target_length, recordings=recording.to(model.device)
    )


def _answers(model: Any, processor: Any, ids: Tensor, max_new_tokens: int) -> list[Answer]:
    """Returns what the new tokens of a batch say, and whether each ended by itself."""
    ends = model.generation_config.eos_token_id
    ended = torch.isin(ids, torch.tensor([] if ends is None else ends).to(ids)).any(1) | (
        ids.shape[1] < max_new_tokens
    )
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [Answer(text, end) for text, end in zip(texts, ended.tolist(), strict=True)]


def _left_padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Returns token ids `(rows, longest)` and the mask that is 1 where a row has its own."""
    ids = pad_sequence([torch.tensor(row[::-1], dtype=torch.int64) for row in rows], batch_first=True).flip(1)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True).flip(1)
    return ids.to(device), mask.to(device)


class Answerer:
    """Answers questions by one method.

    Args:
        model, processor: a FastLongSpeech and its processor.
        method: a compression, `"none"`, or one of `METHODS`.
        target_length: L, for a compression, and for `"summary"` that of 30 s; None: the model's.
        max_new_tokens: of every answer.
        cascade_prompt: what is asked about a transcript, with `{transcript}` and `{question}`; None: `CASCADE`.
        frames: keeps the frames of recordings by name, in main memory, so that other methods, and other models with
            the same encoder, find them; None: they are not kept.
        compression_ratio: frames for each summary token of `"summary"`; None: the model's.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: str,
        target_length: int | None,
        max_new_tokens: int,
        cascade_prompt: str | None = None,
        frames: dict[str, EncodedRecordings] | None = None,
        compression_ratio: int | None = None,
    ) -> None:
        self.compression_ratio = compression_ratio
        self.model, self.processor, self.method = model, processor, method
        self.max_new_tokens, self.frames = max_new_tokens, frames
        self.cascade_prompt = (cascade_prompt or CASCADE) if method in BY_TRANSCRIPT else None
        self.compression = method if method in COMPRESSIONS else "none"
        fuses = method in (*COMPRESSIONS, "summary")
        self.target_length = (target_length or model.config.target_length) if fuses else None
        self._heard: dict[str, Any] = {}

    def prepare(self, questions: Sequence[str], durations: Sequence[float]) -> None:
        """Fits the method to all questions and the durations of their recordings, in seconds.

        Raises:
            ValueError: the method can't hear one of the recordings, or has no room for one of the questions.
        """
        if self.method == "vanilla" and max(durations) > WINDOW_SECONDS:
            count = sum(duration > WINDOW_SECONDS for duration in durations)
            raise ValueError(
                f"vanilla hears clips of up to {WINDOW_SECONDS} s, but {count} rows have longer ones, up to "
                f"{max(durations):.1f} s; take another compression, or clips."
            )
        if self.method == "ntk_rope":
            prompts = self.processor.tokenizer([make_prompt(self.processor, question, True) for question in questions])
            longest = max(map(len, prompts.input_ids))
            self.compression = "iterative_fusion"
            self.target_length = self.model.config.fit_length(longest + self.max_new_tokens)

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[str],
        names: Sequence[str],
        recordings: Sequence[Any],
        passages: Sequence[str | None] = (),
    ) -> list[Answer]:
        """Returns the answers to questions, each about the recording beside it.

        An answer by a transcript has not ended where a window of it was cut by `TRANSCRIPT_TOKENS`.

        Args:
            questions: one for every answer.
            names: of the recordings; the same name is the same recording, which is heard once.
            recordings: as `load_recording` takes them.
            passages: what is really said in each, for the method `true_transcript`.

        Raises:
            ValueError: a transcript is missing, or too long for the language model.
        """
        self._heard = {name: self._heard[name] for name in names if name in self._heard}
        new = {name: audio for name, audio in zip(names, recordings, strict=True) if name not in self._heard}
        if self.method == "true_transcript":
            if not passages or not all(passages):
                raise ValueError("true_transcript needs what is said in the column passage of every row; add it.")
            self._heard |= {name: Answer(passage or "", True) for name, passage in zip(names, passages, strict=True)}
        elif new:
            self._heard |= dict(zip(new, self._hear(new), strict=True))
        heard = [self._heard[name] for name in names]
        if self.method == "ctc":
            return heard
        if self.method == "summary":
            answers = answer_summarised(self.model, self.processor, questions, heard, self.max_new_tokens)
            return [Answer(text.strip(), ended) for text, ended in answers]
        if self.cascade_prompt is None:
            answers = answer_batch(self.model, self.processor, questions, heard, self.max_new_tokens)
            return [Answer(text.strip(), ended) for text, ended in answers]
        questions = [
            self._fill(transcript.text, question) for transcript, question in zip(heard, questions, strict=True)
        ]
        nothing = [None] * len(questions)
        answers = answer_batch(self.model, self.processor, questions, nothing, self.max_new_tokens, names)
        return [
            Answer(text.strip(), ended and transcript.ended)
            for (text, ended), transcript in zip(answers, heard, strict=True)
        ]

    def _fill(self, transcript: str, question: str) -> str:
        """Returns what a cascade asks; all braces but its two fields are text."""
        fields = {"{transcript}": transcript, "{question}": question}
        filled = re.sub(r"\{(transcript|question)\}", lambda field: fields[field[0]], self.cascade_prompt or "")
        tokens = len(self.processor.tokenizer(make_prompt(self.processor, filled, False)).input_ids)
        limit = self.model.config.get_text_config().max_position_embeddings
        if tokens + self.max_new_tokens > limit:
            raise ValueError(
                f"a transcript makes a prompt of {tokens} tokens, and with max_new_tokens {self.max_new_tokens} more "
                f"than the language model's {limit}; leave out longer recordings with --max-seconds."
            )
        return filled

    def _hear(self, recordings: dict[str, Any]) -> list[Any]:
        """Returns the embeddings of recordings by their names, their summaries or their transcripts."""
        encoded = self._encode(recordings)
        if self.method in ("ctc", "ctc_cascade"):
            pieces = self.model.ctc_transcribe(recordings=EncodedRecordings.cat(encoded))
            return [Answer(text, True) for text in self.processor.ctc_decode(pieces)]
        if self.method == "cascade":
            return [self._transcribe(recording) for recording in encoded]
        if self.method == "summary":
            sizes = (self.target_length, self.compression_ratio)
            return [summarise_recording(self.model, self.processor, recording, *sizes) for recording in encoded]
        return self._compress(EncodedRecordings.cat(encoded))

    def _encode(self, recordings: dict[str, Any]) -> list[EncodedRecordings]:
        """Returns the frames of recordings, one of them each."""
        frames = {} if self.frames is None else self.frames
        new = {name: recording for name, recording in recordings.items() if name not in frames}
        if new:
            inputs = self.processor(audio=list(new.values())).to(self.model.device)
            encoded = self.model.encode(**inputs).to("cpu")
            frames |= {name: encoded[number] for number, name in enumerate(new)}
        return [frames[name] for name in recordings]

    def _compress(self, encoded: EncodedRecordings) -> list[Tensor]:
        """Returns the embeddings of recordings, one of them each."""
        features = self.model.compress(encoded, self.target_length, self.compression)
        return list(features.pooler_output.split(features.audio_lengths.tolist()))

    def _transcribe(self, encoded: EncodedRecordings) -> Answer:
        """Returns what the language model writes down of a recording, window by window, with every frame."""
        windows = encoded.pieces(WINDOW_SECONDS)
        written: list[Answer] = []
        size = self.model.config.windows_per_batch
        for first in range(0, len(windows), size):
            heard = self._compress(windows[first : first + size])
            written += answer_batch(self.model, self.processor, [TRANSCRIBE] * len(heard), heard, TRANSCRIPT_TOKENS)
        return Answer(" ".join(text.strip() for text, _ in written), all(ended for _, ended in written))
