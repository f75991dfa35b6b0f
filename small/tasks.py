"""What the recordings are used for: rows of human speech, and questions with answers about every recording."""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .texts import Story, labels

NOT_SAID = "It is not said."
MAN_OR_WOMAN = {"m": "A man.", "f": "A woman."}
PROMPTS = Path(__file__).parent / "instructions.json"
VALIDATION_VOICES = ("kokoro/af_nova", "kokoro/bm_daniel")  # their clips are for validation, though made with the rest
# Which share of a source's speakers (kathleen is one speaker: of her clips) is for validation.
HUMAN_VALIDATION = {"speechocean762": 0.05, "resemblyzer": 0.25, "commonvoice_rit": 0.3, "kathleen": 0.03}
YOUNGEST_ADULT = 16
LONGEST_CLIP = 30.0  # seconds


def human_rows(speech: str | Path, output: str | Path) -> list[dict]:
    """Returns a row for every recording of `train.jsonl` and `train_long.jsonl` in a folder of human speech.

    Clips that stand in a long recording too are left to it. Capitals without punctuation become lower case. Speakers
    for validation are drawn by their name.
    """
    rows = []
    for name in ("train_long.jsonl", "train.jsonl"):
        for line in (Path(speech) / name).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            source, _, clip = entry["audio"].partition("/")
            if source == "librispeech_samples":
                continue
            drawn = clip if source == "kathleen" else entry["speaker"]
            row = {
                "audio": os.path.relpath(Path(speech) / entry["audio"], output),
                "text": as_written(entry["text"]),
                "duration": entry["seconds"],
                "speaker": entry["speaker"],
                "gender": _gender(entry),
                "source": source,
                "split": "val" if _share(drawn) < HUMAN_VALIDATION.get(source, 0) else "train",
            }
            if "segments" in entry:
                row["segments"] = [s | {"text": as_written(s["text"])} for s in entry["segments"]]
            rows.append(row)
    return rows


def as_written(text: str) -> str:
    """Returns a transcript in capitals in lower case, any other as it is."""
    return text.lower() if text.isupper() else text


def _gender(entry: dict) -> str:
    if isinstance(entry.get("age"), int) and entry["age"] < YOUNGEST_ADULT:
        return ""  # nobody hears whether a child is a boy or a girl
    return {"m": "m", "male": "m", "f": "f", "female": "f"}.get(entry.get("gender") or "", "")


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def speech_rows(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Returns rows of recordings by split, each with its CTC `labels` unless its text has digits."""
    splits: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for row in rows:
        if row["split"] == "train" and row["speaker"] in VALIDATION_VOICES:
            row = row | {"split": "val"}
        spelled = not re.search(r"\d", row["text"])
        splits[row["split"]].append(row | ({"labels": labels(row["text"])} if spelled else {}))
    return splits


def task_rows(rows: Iterable[dict], stories: Sequence[Story], seed: int = 0) -> Iterator[dict]:
    """Yields questions with answers about recordings, and about passages as text.

    Every recording of at most 30 seconds, and every part of a longer one, is transcribed or repeated. Of a passage all
    explicit questions are asked, one that another story answers ("it is not said"), and once more each with the text
    instead of the recording. The speaker's sex is asked of one recording in five where it is known.

    Args:
        rows: of one split of `speech_rows`.
        stories: all stories; questions from elsewhere are taken of the split that the passage has.
        seed: of what is drawn.
    """
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    by_id = {story.id: story for story in stories}
    for row in rows:
        rng = random.Random(f"{seed} {row['audio']}")
        about = {key: row[key] for key in ("audio", "duration", "speaker", "gender", "source", "split")}
        for clip in [row] if row["duration"] <= LONGEST_CLIP else _windows(row.get("segments", ()), rng):
            task = "repeat" if rng.random() < 0.15 else "transcribe"
            place = {key: clip[key] for key in ("start", "end") if key in clip}
            yield about | place | {"task": task, "question": rng.choice(prompts[task]), "answer": clip["text"]}
        if row["gender"] and rng.random() < 0.2:
            answer = MAN_OR_WOMAN[row["gender"]]
            yield about | {"task": "gender", "question": rng.choice(prompts["gender"]), "answer": answer}
        if "story" not in row:
            continue
        story = by_id[row["story"]]
        passage = about | {"story": story.id, "sections": row["sections"]}
        for question in story.asked(set(row["sections"])):
            pair = {"question": question.question, "answer": question.answers[0], "answers": list(question.answers)}
            yield passage | {"task": "question"} | pair
            yield {"task": "text", "passage": row["text"], "source": "fairytaleqa/text", "split": row["split"]} | pair
        other = rng.choice([s for s in stories if s.split == story.split and s.id != story.id and s.questions])
        unanswered = rng.choice(other.questions).question
        yield passage | {"task": "not_said", "question": unanswered, "answer": NOT_SAID, "answers": [NOT_SAID]}


def _windows(segments: Sequence[dict], rng: random.Random) -> Iterator[dict]:
    """Yields parts of a recording: whole sentences in a row of together at most `LONGEST_CLIP` seconds."""
    part: list[dict] = []
    longest = rng.uniform(8, LONGEST_CLIP)
    for i, segment in enumerate(segments):
        part.append(segment)
        following = segments[i + 1]["end"] if i + 1 < len(segments) else float("inf")
        if following - part[0]["start"] > longest:
            if segment["end"] - part[0]["start"] <= LONGEST_CLIP:
                text = " ".join(s["text"] for s in part)
                yield {"start": part[0]["start"], "end": segment["end"], "text": text}
            part, longest = [], rng.uniform(8, LONGEST_CLIP)
