"""A loaded model and its processor, and what a command asks of them."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import TextStreamer

from ..audio_fastlongspeech import load_recording
from ..modeling_fastlongspeech import FastLongSpeechForConditionalGeneration
from ..processing_fastlongspeech import FastLongSpeechProcessor
from .defaults import MAX_NEW_TOKENS, find_model


def find_device(name: str | None) -> str:
    """Returns the device that `--device` names, by default a GPU or the CPU; a ValueError where it is not there."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")  # mps was never tried
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from error
    return device


class Session:
    """A loaded model and processor, and the seconds each part of the work has taken."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seconds: dict[str, float] = {}
        self.json = arguments.json
        longest = MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens
        self.options = {"max_new_tokens": longest, "do_sample": False}
        self.target_length = arguments.target_length
        source = find_model(arguments.model)
        with self.timed("loading"):
            device = find_device(arguments.device)
            self.processor = FastLongSpeechProcessor.from_pretrained(source)
            model = FastLongSpeechForConditionalGeneration.from_pretrained(source, dtype=arguments.dtype)
            self.model = model.to(device)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the seconds spent inside to a part of the work."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    def report_seconds(self) -> None:
        print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items()), file=sys.stderr)

    def read(self, recording: str) -> Any:
        """Returns the samples of a recording at 16 kHz."""
        with self.timed("reading"):
            return load_recording(recording, target_rate=self.processor.feature_extractor.sampling_rate)

    def prepare(self, question: str, recordings: list) -> Any:
        """Returns the inputs of the model for samples and a question about them."""
        rate = self.processor.feature_extractor.sampling_rate
        audio = [{"type": "audio", "audio": {"array": samples, "sampling_rate": rate}} for samples in recordings]
        with self.timed("reading"):
            return self.processor.apply_chat_template(
                [{"role": "user", "content": [*audio, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                target_length=self.target_length,
            ).to(self.model.device)

    def answer(self, inputs: Any, echo: bool) -> str:
        """Returns the model's answer; with `echo` its words go to stdout as they come."""
        streamer = Streamer(self.processor.tokenizer, echo)
        start = time.perf_counter()
        ids = self.model.generate(**inputs, streamer=streamer, **self.options)[0, inputs["input_ids"].shape[1] :]
        end = time.perf_counter()
        heard = streamer.first_token_at or end
        for part, seconds in (("listening", heard - start), ("answering", end - heard)):
            self.seconds[part] = self.seconds.get(part, 0) + seconds
        longest, ends = self.options["max_new_tokens"], self.model.generation_config.eos_token_id
        if len(ids) == longest and (ends is None or ids[-1] not in torch.tensor(ends).to(ids)):
            print(f"the answer may go on: it reached --max-new-tokens {longest}", file=sys.stderr)
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @contextlib.contextmanager
    def listening(self, windows: int) -> Iterator[None]:
        """Shows how many windows the encoder has heard, where that takes long and stderr is a terminal."""
        with tqdm(total=windows, desc="listening", unit="window", delay=1, leave=False, disable=None) as bar:

            def heard(module: Any, arguments: Any, output: Any) -> None:
                bar.update(len(arguments[0]))
                if bar.n >= windows:
                    bar.close()  # the answer is printed next

            hook = self.model.model.audio_tower.register_forward_hook(heard)
            try:
                yield
            finally:
                hook.remove()


class Streamer(TextStreamer):
    """Prints an answer as it comes, when `echo` is set, and notes when its first token came."""

    def __init__(self, tokenizer: Any, echo: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.echo = echo
        self.first_token_at: float | None = None

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.echo:
            super().on_finalized_text(text, stream_end)
