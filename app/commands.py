"""The commands `ask` and `cost`: what they print. Torch is loaded where a model is."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .defaults import MAX_NEW_TOKENS, find_model
from .subtitles import clock

if TYPE_CHECKING:
    from .session import Heard, Session


def print_answer(arguments: argparse.Namespace) -> None:
    """Prints the answer to a question about recordings."""
    session = open_session(arguments)
    heard = session.listen(arguments.recordings)
    facts = describe(heard, session.tokens(heard, arguments.target_length))
    answer = session.ask(heard, arguments.question, arguments.target_length, None if arguments.json else say)
    if not answer.ended:
        report_stopped(session)
    place = session.find_place(heard, arguments.question, answer.text)
    if place is not None and not arguments.json:
        of_file = f"{arguments.recordings[place.recording]} " if len(arguments.recordings) > 1 else ""
        print(f"[{of_file}{clock(place.start)}]")
    report_seconds(session)
    if arguments.json:
        leans_on = None
        if place is not None:
            leans_on = {"path": arguments.recordings[place.recording], "start": place.start, "end": place.end}
        result = {"answer": answer.text, "ended": answer.ended, "leans_on": leans_on}
        print_json(session, {**result, "question": arguments.question, "recordings": facts})


def print_cost(arguments: argparse.Namespace) -> None:
    """Prints what a question about each recording costs, from the sizes of the model alone."""
    from .cost import TEXT_TOKENS, ModelCost, recording_seconds
    from .sizes import read_config

    counter = ModelCost(read_config(find_model(arguments.model)))
    longest = arguments.max_new_tokens or MAX_NEW_TOKENS
    durations = {name: recording_seconds(name) for name in arguments.recordings}
    durations |= {f"{seconds:g} s": seconds for seconds in arguments.seconds or []}
    facts = []
    options: dict[str, Any] = {"answer_tokens": longest}
    if arguments.compression_ratio is not None:
        options |= {"compression": "summary", "compression_ratio": arguments.compression_ratio}
    if not arguments.json:
        print(f"counted with {TEXT_TOKENS} tokens of text and an answer of {longest} tokens")
    for name, seconds in durations.items():
        costs = counter.recording(seconds, arguments.target_length, **options)
        unfused = counter.recording(seconds, compression="none", answer_tokens=longest)
        facts.append({"path": name, **asdict(costs), "total": costs.total, "total_without_fusion": unfused.total})
        if not arguments.json:
            print(describe_recording(name, seconds, costs.windows, costs.frames, costs.tokens))
            for part, flops in {**costs.flops, "total": costs.total, "without fusion": unfused.total}.items():
                print(f"    {part:15}{flops / 1e12:11.4g} TFLOPs {flops / costs.total:7.1%}")
            if costs.cache_bytes is not None and unfused.cache_bytes is not None:
                share = costs.cache_bytes / unfused.cache_bytes
                print(f"    {'cache':15}{costs.cache_bytes / 2**20:11.4g} MiB    {share:7.1%} of that without fusion")
    if arguments.json:
        print(
            json.dumps({"text_tokens": TEXT_TOKENS, "answer_tokens": longest, "recordings": facts}, ensure_ascii=False)
        )


def open_session(arguments: argparse.Namespace, progress: bool = True) -> "Session":
    """Returns the session that the arguments of a command ask for; `progress`: whether listening has a bar."""
    from .session import Session

    disable_loading_bar()
    longest = arguments.max_new_tokens or MAX_NEW_TOKENS
    return Session(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_new_tokens=longest,
        progress=progress,
    )


def refuse_existing(output: Path) -> None:
    """Refuses to write over a file.

    Raises:
        ValueError: there is one.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists already; name another file, or remove it.")


def check_recording(recording: str) -> None:
    """Refuses a recording that is missing or no audio file, before a model is loaded; a URL is fetched once, later.

    Raises:
        FileNotFoundError, ValueError: as `load_recording`; damage beyond a file's beginning is not looked for.
    """
    from ..audio_fastlongspeech import load_recording
    from ..decoding_fastlongspeech import decode_file

    if os.path.isfile(path := os.path.expanduser(recording)):
        next(decode_file(path, recording), None)
    elif ":" not in recording:
        load_recording(recording)  # base64 text, if it is not missing


def disable_loading_bar() -> None:
    """Keeps transformers from showing how far the weights are."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def describe(heard: "Heard", tokens: list[int] | None) -> list[dict[str, Any]]:
    """Prints to stderr and returns what each recording is made into."""
    facts = []
    for number, (name, seconds, windows, frames) in enumerate(heard.recordings):
        read = None if tokens is None else tokens[number]
        print(describe_recording(name, seconds, windows, frames, read), file=sys.stderr)
        known = {"path": name, "seconds": seconds, "windows": windows, "frames": frames}
        facts.append(known if read is None else {**known, "tokens": read})
    return facts


def describe_recording(name: str, seconds: float, windows: int, frames: int, tokens: int | None) -> str:
    """Returns the line about what a recording is made into."""
    fused = "" if tokens is None else f" -> {tokens} tokens"
    return f"{name}: {seconds:.1f} s, {windows} window{'s' if windows > 1 else ''}, {frames} frames{fused}"


def say(text: str) -> None:
    """Prints a piece of an answer as it comes."""
    print(text, end="", flush=True)


def report_stopped(session: "Session") -> None:
    """Prints to stderr that an answer was stopped by the limit of tokens."""
    print(f"the answer may go on: it reached --max-new-tokens {session.max_new_tokens}", file=sys.stderr)


def report_seconds(session: "Session") -> None:
    """Prints to stderr how long each part of the work has taken."""
    print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in session.seconds.items()), file=sys.stderr)


def print_json(session: "Session", result: dict[str, Any]) -> None:
    """Prints a command's result with the seconds that each part of the work has taken."""
    seconds = {part: round(taken, 3) for part, taken in session.seconds.items()}
    print(json.dumps({**result, "seconds": seconds}, ensure_ascii=False))
