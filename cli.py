"""The `fastlongspeech` command: ask about recordings, transcribe one, say what that costs, or score a model.

    fastlongspeech ask interview.mp3 "Where does Anna live?"
    fastlongspeech transcribe interview.mp3 --ctc
    fastlongspeech cost interview.mp3 --target-length 200
    fastlongspeech evaluate --task qa --data questions.jsonl --model MODEL --output FOLDER

The answer goes to stdout; durations, windows, frames, tokens and seconds to stderr.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TextStreamer
from transformers.utils import logging

from .audio_fastlongspeech import FRAME_SECONDS, count_frames, load_recording
from .configuration_fastlongspeech import FastLongSpeechConfig
from .cost import QWEN2_AUDIO_7B, TEXT_TOKENS, ModelCost, recording_seconds
from .modeling_fastlongspeech import FastLongSpeechForConditionalGeneration
from .processing_fastlongspeech import FastLongSpeechProcessor

DEMO_MODEL = Path(__file__).parent / "checkpoints" / "fastlongspeech-demo"
TRANSCRIBE = "Transcribe the speech to text without explanation:"
MAX_NEW_TOKENS = 512
QWEN2_AUDIO = "Qwen/Qwen2-Audio-7B-Instruct"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    logging.disable_progress_bar()
    try:
        if argv[:1] == ["evaluate"]:
            return evaluate(argv[1:])
        arguments = parse_arguments(argv)
        if arguments.run is cost:
            return cost(arguments)
        session = Session(arguments)
        result = arguments.run(session, arguments)
        session.report_seconds()
        if arguments.json:
            seconds = {part: round(taken, 3) for part, taken in session.seconds.items()}
            print(json.dumps({**result, "seconds": seconds}, ensure_ascii=False))
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"fastlongspeech: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--model", help="folder or Hub id (default: the demo model of a checkout)")
    sizes.add_argument("--target-length", type=int, metavar="L", help="frames to fuse a recording to")
    sizes.add_argument("--max-new-tokens", type=int, metavar="N", help=f"longest answer (default: {MAX_NEW_TOKENS})")
    sizes.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
    shared = argparse.ArgumentParser(add_help=False, parents=[sizes])
    shared.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an NVIDIA or AMD GPU if there is one)")
    shared.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])

    parser = argparse.ArgumentParser(prog="fastlongspeech", description="Ask about recordings of any duration.")
    commands = parser.add_subparsers(required=True, metavar="ask | transcribe | cost | evaluate")
    ask_parser = commands.add_parser("ask", parents=[shared], help="answer a question about recordings")
    ask_parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="audio file or URL")
    ask_parser.add_argument("question", metavar="QUESTION")
    ask_parser.set_defaults(run=ask)
    transcribe_parser = commands.add_parser("transcribe", parents=[shared], help="write down what is said")
    transcribe_parser.add_argument("recording", metavar="RECORDING", help="audio file or URL")
    transcribe_parser.add_argument("--ctc", action="store_true", help="by the CTC decoder, not the language model")
    transcribe_parser.set_defaults(run=transcribe)
    cost_parser = commands.add_parser(
        "cost",
        parents=[sizes],
        help="floating-point operations of a question about each recording, without running or loading the model",
        description=f"No weights are read, and nothing is downloaded for --model {QWEN2_AUDIO}.",
    )
    cost_parser.add_argument("recordings", nargs="*", metavar="RECORDING", help="audio file or URL")
    cost_parser.add_argument("--seconds", type=float, nargs="+", metavar="S", help="durations instead of recordings")
    cost_parser.set_defaults(run=cost)
    commands.add_parser("evaluate", add_help=False, help="score a model on a benchmark; see evaluate --help")

    arguments = parser.parse_args(argv)
    if arguments.run is cost and bool(arguments.recordings) == bool(arguments.seconds):
        cost_parser.error("give either recordings or --seconds.")
    if getattr(arguments, "ctc", False) and (arguments.target_length, arguments.max_new_tokens) != (None, None):
        transcribe_parser.error("--ctc reads every frame: --target-length and --max-new-tokens have no meaning.")
    return arguments


def find_model(source: str | None) -> str:
    """Returns the folder or Hub id of the model that `--model` names, the demo model's where it is None."""
    if source is None:
        if not (DEMO_MODEL / "config.json").exists():
            raise ValueError(
                f"no --model was given, and there is no demo model in {DEMO_MODEL}: an installed package carries "
                "no weights, a checkout has them once `make recipe` is done; pass --model with a folder or Hub id."
            )
        return str(DEMO_MODEL)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"--model {source} is no folder; pass the folder of a model or a Hub id.")
    return source


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


def ask(session: Session, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the answer to a question about recordings."""
    samples = [session.read(recording) for recording in arguments.recordings]
    inputs = session.prepare(arguments.question, samples)
    first = 0
    facts = []
    tokens = placeholder_counts(inputs["input_ids"][0], session.processor.audio_token_id)
    for name, array, windows, length in zip(
        arguments.recordings, samples, inputs["windows_per_audio"].tolist(), tokens, strict=True
    ):
        mask = inputs["feature_attention_mask"][first : first + windows]
        facts.append(describe(session, name, array, mask, length))
        first += windows
    with session.listening(first):
        answer = session.answer(inputs, echo=not session.json)
    return {"answer": answer, "question": arguments.question, "recordings": facts}


def transcribe(session: Session, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the transcript of a recording, one line per 30 s window or one by the CTC decoder."""
    samples = session.read(arguments.recording)
    rate, size = session.processor.feature_extractor.sampling_rate, session.processor.feature_extractor.n_samples
    if arguments.ctc:
        with session.timed("reading"):
            inputs = session.processor(audio=samples, sampling_rate=rate).to(session.model.device)
        facts = describe(session, arguments.recording, samples, inputs["feature_attention_mask"], None)
        with session.listening(facts["windows"]), session.timed("listening"):
            text = session.processor.ctc_decode(session.model.ctc_transcribe(**inputs))[0]
        if not session.json:
            print(text)
        return {"text": text, "recordings": [facts]}

    # A rest shorter than a frame has nothing that could be transcribed.
    starts = [start for start in range(0, len(samples), size) if len(samples) - start >= FRAME_SECONDS * rate]
    prompts = [session.prepare(TRANSCRIBE, [samples[start : start + size]]) for start in starts]
    mask = torch.cat([prompt["feature_attention_mask"] for prompt in prompts])
    tokens = sum(int((prompt["input_ids"] == session.processor.audio_token_id).sum()) for prompt in prompts)
    facts = describe(session, arguments.recording, samples, mask, tokens)
    windows = []
    bar = tqdm(prompts, desc="transcribing", unit="window", delay=1, leave=False, disable=None)
    for start, prompt in zip(starts, bar, strict=True):
        text = session.answer(prompt, echo=False)
        if not session.json:
            bar.write(text, file=sys.stdout)
        windows.append({"start": start / rate, "end": min(len(samples), start + size) / rate, "text": text})
    return {"text": " ".join(window["text"] for window in windows), "windows": windows, "recordings": [facts]}


def cost(arguments: argparse.Namespace) -> int:
    """Prints what a question about each recording costs, from the sizes of the model alone, and returns 0."""
    source = find_model(arguments.model)
    sizes = FastLongSpeechConfig(**QWEN2_AUDIO_7B) if source == QWEN2_AUDIO else None
    counter = ModelCost(sizes or FastLongSpeechConfig.from_pretrained(source))
    longest = MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens
    durations = {name: recording_seconds(name) for name in arguments.recordings}
    durations |= {f"{seconds:g} s": seconds for seconds in arguments.seconds or []}
    facts = []
    if not arguments.json:
        print(f"counted with {TEXT_TOKENS} tokens of text and an answer of {longest} tokens")
    for name, seconds in durations.items():
        costs = counter.recording(seconds, arguments.target_length, answer_tokens=longest)
        unfused = counter.recording(seconds, compression="none", answer_tokens=longest).total
        facts.append({"path": name, **asdict(costs), "total": costs.total, "total_without_fusion": unfused})
        if not arguments.json:
            print(describe_recording(name, seconds, costs.windows, costs.frames, costs.tokens))
            for part, flops in {**costs.flops, "total": costs.total, "without fusion": unfused}.items():
                print(f"    {part:15}{flops / 1e12:11.4g} TFLOPs {flops / costs.total:7.1%}")
    if arguments.json:
        print(
            json.dumps({"text_tokens": TEXT_TOKENS, "answer_tokens": longest, "recordings": facts}, ensure_ascii=False)
        )
    return 0


def evaluate(argv: list[str]) -> int:
    """Scores a model on a benchmark, by the arguments of `evaluation/run.py`, and returns 0."""
    try:
        from .evaluation.run import main as run
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluate needs {error.name}, which is missing; install it with: pip install 'fastlongspeech[eval]'."
        ) from error
    run(argv)
    return 0


def describe(session: Session, name: str, samples: Any, mask: torch.Tensor, tokens: int | None) -> dict[str, Any]:
    """Prints and returns what a recording is made into."""
    seconds = len(samples) / session.processor.feature_extractor.sampling_rate
    frames = int(count_frames(mask.sum(dim=1).cpu().numpy()).sum())
    print(describe_recording(name, seconds, len(mask), frames, tokens), file=sys.stderr)
    facts = {"path": name, "seconds": seconds, "windows": len(mask), "frames": frames}
    return facts if tokens is None else {**facts, "tokens": tokens}


def describe_recording(name: str, seconds: float, windows: int, frames: int, tokens: int | None) -> str:
    """Returns the line about what a recording is made into."""
    fused = "" if tokens is None else f" -> {tokens} tokens"
    return f"{name}: {seconds:.1f} s, {windows} window{'s' if windows > 1 else ''}, {frames} frames{fused}"


def placeholder_counts(input_ids: torch.Tensor, audio_token_id: int) -> list[int]:
    """Returns the lengths of the runs of the audio token in a prompt `(S,)`, one per recording."""
    values, lengths = (input_ids == audio_token_id).unique_consecutive(return_counts=True)
    return lengths[values].tolist()
