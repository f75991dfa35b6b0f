"""The commands `ask`, `transcribe` and `cost`: what they print and return."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from ..prompts_fastlongspeech import TRANSCRIBE
from ..windows_fastlongspeech import WINDOWS
from .cost import TEXT_TOKENS, ModelCost, recording_seconds
from .defaults import MAX_NEW_TOKENS, find_model
from .session import Session
from .sizes import read_config


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
    starts = [start for start in range(0, len(samples), size) if len(samples) - start >= WINDOWS.frame_seconds * rate]
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
    counter = ModelCost(read_config(find_model(arguments.model)))
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


def describe(session: Session, name: str, samples: Any, mask: torch.Tensor, tokens: int | None) -> dict[str, Any]:
    """Prints and returns what a recording is made into."""
    seconds = len(samples) / session.processor.feature_extractor.sampling_rate
    frames = int(WINDOWS.count_frames(mask.sum(dim=1).cpu().numpy()).sum())
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
