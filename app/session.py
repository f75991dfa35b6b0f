"""A model that listens to recordings once and then answers any number of questions about them.

    session = Session()
    interview = session.listen(["interview.mp3"])
    print(session.ask(interview, "Where does Anna live?").text)
    print(session.ask(interview, "And Helen?", target_length=200).text)
    print(session.transcribe_by_ctc(interview)[0])

The encoder works in `listen` alone.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..audio_fastlongspeech import list_recordings, load_recording
from ..fusion_fastlongspeech import check_target_length
from ..recordings_fastlongspeech import EncodedRecordings
from .defaults import MAX_NEW_TOKENS, find_model
from .loading import load_model
from .places import Place, find_place
from .words import ctc_words

LOUDNESS = 6000  # parts of a recording; a picture has about as many columns


class Recording(NamedTuple):
    """What is known of a recording: its ``name`` (path, URL, or what kind of object it was), how many ``seconds`` it
    lasts, how many ``windows`` the encoder has read, and how many ``frames`` it has made of them."""

    name: str
    seconds: float
    windows: int
    frames: int


class Answer(NamedTuple):
    """An answer's ``text``, and whether it ``ended`` by itself, before the limit of tokens."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Heard:
    """Recordings that a session has listened to.

    Attributes:
        recordings: what is known of each.
        encoded: their frames, which are all that a question needs.
        loudness: `(LOUDNESS,)` float32 or fewer of each, the loudest sample of as many equal parts: what is drawn.
    """

    recordings: tuple[Recording, ...]
    encoded: EncodedRecordings
    loudness: tuple[np.ndarray, ...] = ()


class Session:
    """A loaded model that listens and answers.

    Args:
        model: folder or Hub id; None: the demo model of a checkout.
        device: such as `"cpu"` or `"cuda:1"`; None: a GPU where there is one, else the CPU.
        dtype: `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        max_new_tokens: of every answer, at most.
        progress: whether a bar on stderr shows how far the encoder is, where that is a terminal and takes long.

    Attributes:
        model, processor: what was loaded.
        seconds: how long `"loading"`, `"reading"`, `"listening"` and `"answering"` have taken so far, all calls
            together.

    Raises:
        ValueError: there is no such device, folder or demo model.
        OSError: the folder or repository holds no model.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: bool = False,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.max_new_tokens = max_new_tokens
        self.progress = progress
        source = find_model(None if model is None else os.fspath(model))
        with self._timed("loading"):
            self.model, self.processor = load_model(source, device, dtype)

    def listen(self, recordings: Any) -> Heard:
        """Returns recordings read and encoded, to be asked about any number of times.

        Args:
            recordings: one or a list of what `load_recording` takes: paths, URLs, bytes, arrays.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load_recording`.
        """
        sources = list_recordings(recordings)
        rate = self.processor.feature_extractor.sampling_rate
        samples = [self.read(source) for source in sources]
        with self._timed("reading"):
            inputs = self.processor(audio=samples, sampling_rate=rate).to(self.model.device)
        windows = inputs["windows_per_audio"].tolist()
        with self._timed("listening"), self._bar(sum(windows)):
            encoded = self.model.encode(**inputs)
        names = [str(name) if isinstance(name, (str, os.PathLike)) else type(name).__name__ for name in sources]
        seconds = [len(array) / rate for array in samples]
        known = zip(names, seconds, windows, encoded.lengths.tolist(), strict=True)
        return Heard(tuple(Recording(*facts) for facts in known), encoded, tuple(map(measure_loudness, samples)))

    def read(self, recording: Any) -> np.ndarray:
        """Returns a recording's samples, float32, at the rate that the model hears (16 kHz).

        Args:
            recording: what `load_recording` takes: a path, URL, bytes, array.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load_recording`.
        """
        with self._timed("reading"):
            return load_recording(recording, target_rate=self.processor.feature_extractor.sampling_rate)

    def tokens(self, heard: Heard, target_length: int | None = None) -> list[int]:
        """Returns how many tokens the language model reads of each recording when it is asked about them together.

        Args:
            heard: what `listen` returned.
            target_length: L; None: configured.
        """
        lengths = heard.encoded.lengths
        if self.model.config.compression == "none":
            return lengths.tolist()
        target_length = self.model.config.target_length if target_length is None else target_length
        if self.model.config.compression == "summary":
            return self.model.config.windows.share(lengths.numpy(), target_length).tolist()
        return lengths.minimum(check_target_length(target_length, len(lengths))).tolist()

    def ask(
        self,
        heard: Heard,
        question: str,
        target_length: int | None = None,
        say: Callable[[str], None] | None = None,
        compression: str | None = None,
        stopping: Sequence[StoppingCriteria] = (),
    ) -> Answer:
        """Returns the model's greedy answer to a question about recordings; the encoder has no part in it.

        Args:
            heard: what `listen` returned; all its recordings stand before the question.
            question: in words.
            target_length: L, frames to fuse each recording to; None: configured.
            say: gets the answer piece by piece, as it comes.
            compression: as in `generate`; None: configured.
            stopping: what may end an answer early, besides the limit of tokens.

        Raises:
            ValueError: `target_length` is not a positive integer.
        """
        compression = compression or self.model.config.compression
        audio = [{"type": "audio"}] * len(heard.recordings)
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*audio, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            recordings=heard.encoded,
            target_length=target_length,
            compression=compression,
        ).to(self.model.device)
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        options |= {
            "target_length": target_length,
            "compression": compression,
            "stopping_criteria": StoppingCriteriaList(stopping),
        }
        streamer = None if say is None else Streamer(self.processor.tokenizer, say)
        with self._timed("answering"):
            ids = self.model.generate(**inputs, recordings=heard.encoded, streamer=streamer, **options)
        ids = ids[0, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ended = ends is not None and bool(ids[-1] in torch.tensor(ends).to(ids))
        return Answer(self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), ended)

    def find_place(self, heard: Heard, question: str, answer: str) -> Place | None:
        """Returns the stretch of the recordings that an answer leans on; None where none is found.

        It is found among the words that the CTC decoder hears, see `places.find_place`; without a trained CTC decoder
        there is none.
        """
        if not self.model.config.ctc_trained:
            return None
        with self._timed("answering"):
            return find_place(ctc_words(self.model, self.processor, heard.encoded), question, answer)

    def transcribe_by_ctc(self, heard: Heard) -> list[str]:
        """Returns what the CTC decoder hears in each recording, all of it at once; there is no language model in it.

        Raises:
            ValueError: the CTC decoder is not trained.
        """
        with self._timed("listening"):
            return self.processor.ctc_decode(self.model.ctc_transcribe(recordings=heard.encoded))

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the seconds spent inside to a part of the work."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    @contextlib.contextmanager
    def _bar(self, windows: int) -> Iterator[None]:
        """Shows how many windows the encoder has read, if `progress` is set."""
        hidden = None if self.progress else True  # None: shown on a terminal alone
        with tqdm(total=windows, desc="listening", unit="window", delay=1, leave=False, disable=hidden) as bar:

            def update(module: Any, arguments: Any, output: Any) -> None:
                bar.update(len(arguments[0]))

            hook = self.model.get_encoder("audio").register_forward_hook(update)
            try:
                yield
            finally:
                hook.remove()


def measure_loudness(samples: np.ndarray) -> np.ndarray:
    """Returns the loudest of samples `(S,)`, without sign, in each of `LOUDNESS` equal parts, or of S if fewer."""
    parts = min(LOUDNESS, len(samples))
    return np.maximum.reduceat(np.abs(samples), np.arange(parts) * len(samples) // parts)


class Streamer(TextStreamer):
    """Hands an answer on, piece by piece, as it comes."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text + "\n" if stream_end else text)


__all__ = ["Answer", "Heard", "Recording", "Session"]
