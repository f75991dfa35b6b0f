"""Benchmarks read into one form: a recording, a question about it and the reference answers.

| task | source |
|---|---|
| `qa`, `longspeech-eval` | `audio`, `question`, `answer` (or `answers`: a text, or a list of equally good ones) |
| `choice` | the same and `choices`, a list of texts one of which is the answer |
| `asr` | `audio`, `text` |
| `meld` | MELD's CSV (`Dialogue_ID`, `Utterance_ID`, `Emotion`); recordings named `dia0_utt0.wav` |
| `air-bench` | AIR-Bench's `Chat_meta.json`; the subset is its task and dataset, such as `speech_QA_iemocap` |
| `librisqa` | LibriSQA's JSON, part I (questions) or part II (choices A to D) |
| `openasqa` | OpenASQA's JSON (`audio_id`, `instruction`, `output`) |
| `audio-marathon` | AudioMarathon's JSON of a task: `path` or `audio_path`, `question`, choices, a letter |
| `longspeech` | LongSpeech's JSON lines of a task: `task`, `language`, `messages` (a user's with `audio`, an answer) |

A row may have a `passage`, what is said in its recording.

A source is a JSON-lines manifest, a JSON file with a list of objects, a CSV file, a `datasets` folder or the name of a
dataset on the Hub; `#name` behind it names a split. Where a manifest's row has `start` or `end` (seconds), that part
of the recording is asked about. Recordings are read when they are asked for.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..prompts_fastlongspeech import TRANSCRIBE
from .audio import open_part
from .manifests import PLACE, check_rows, manifest_rows, open_folder, refuse

EMOTIONS = ["Anger", "Disgust", "Fear", "Joy", "Neutral", "Sadness", "Surprise"]
EMOTION_QUESTION = f"Given the Choices: [{', '.join(EMOTIONS)}]. What is the emotion in the audio?"  # Appendix B.2
# What AudioMarathon's own scripts ask after a question and its choices, or before and after those of RACE.
MARATHON_QUESTION = (
    "{question}\n\n{choices}\n\nPlease listen to the audio and select the correct answer. Reply with only the letter "
    "({letters})."
)
MARATHON_RACE = (
    "Listen to this audio of a passage being read aloud, then answer the multiple-choice question based solely on the "
    "information from the audio.\n\nQuestion: {question}\n\nOptions:\n{choices}\n\nRespond with only the letter of "
    "the correct option ({letters})."
)
LONGSPEECH = (
    *("ASR", "translation", "summary", "speaker_count", "content_separation", "language_detection", "emotionQA"),
    "Temporal_Relative_QA",
)
NOTES = (
    "id",
    "uniq_id",
    "kind",
    "time",
    "task",
    "language",
    "dataset",
    "task_name",
    "dataset_name",
)  # what predictions repeat of a row


@dataclass(frozen=True)
class Example:
    """One question about one recording.

    Attributes:
        row: number of the row in the benchmark, from 0.
        recording: the same text for every question about the same recording.
        duration: seconds.
        question: what the model is asked.
        answers: equally good references; for a transcription the transcript.
        choices: the texts one of which is the answer; empty for a free answer.
        notes: what else the row says of the question, such as its `kind`.
        passage: what is said in the recording, where the row says it beside the answer.
    """

    row: int
    recording: str
    duration: float
    question: str
    answers: list[str]
    choices: list[str]
    notes: dict[str, Any]
    passage: str | None = None


@dataclass(frozen=True)
class QuestionSet:
    """The checked examples of a task.

    Attributes:
        metric: what the answers are scored by: `"answer"`, `"choice"`, `"transcript"` or a name of `LONGSPEECH`.
        examples: in the order of the source.
        rows: the rows they come from.
        left_out: rows whose recordings are shorter or longer than was asked for.
    """

    metric: str
    examples: list[Example]
    rows: Any
    left_out: int

    def audio(self, example: Example) -> Any:
        """Returns the recording of an example, or the part of it that is asked about, as `load_recording` takes it."""
        return open_part(self.rows[example.row])


def load_questions(
    task: str,
    source: str | Path,
    subset: str | None = None,
    audio_root: str | Path | None = None,
    limit: int | None = None,
    min_seconds: float = 0,
    max_seconds: float | None = None,
) -> QuestionSet:
    """Returns the examples of a task.

    Args:
        task: one of `TASKS`.
        source: see above.
        subset: the configuration of a dataset on the Hub, such as `clean`; for AIR-Bench its task and dataset.
        audio_root: the folder that the recordings' names are relative to; by default the source's own.
        limit: only the first so many rows.
        min_seconds, max_seconds: shorter and longer recordings are left out, and counted.

    Raises:
        ValueError: the source can't be read, or rows are not usable; every bad row is named with the remedy.
    """
    form = TASKS[task]
    path, _, split = str(source).partition("#")
    root = Path(path).parent if audio_root is None else Path(audio_root)
    label, first, raw = "row", 0, _raw_rows(path, split, None if task == "air-bench" else subset, root)
    if path.endswith(".jsonl"):
        label, first = "line", 1
    if task == "air-bench" and subset is not None:
        raw = [row for row in raw if f"{row.get('task_name')}_{row.get('dataset_name')}" == subset]
        if not raw:
            raise ValueError(f"{source} has no rows of {subset}; name a task and its dataset: speech_QA_iemocap.")
    if isinstance(raw, list):
        raw = raw[:limit]
        formed = [form(row, root) if isinstance(row, dict) else row for row in raw]
        notes = [row for row in raw if row is not None]
        checked = check_rows(formed, str(source), ["audio"], label, first)
        formed = [row for row in formed if row is not None]
    else:
        if audio_root is not None:
            raise ValueError(f"audio_root is {audio_root}, but {source} holds its recordings itself; leave it out.")
        raw = raw if limit is None else raw.select(range(min(limit, len(raw))))
        notes = raw.remove_columns("audio").to_list()
        formed = [form(row | {"audio": None}, root) for row in notes]
        checked = check_rows(raw, str(source), ["audio"], label, first)
    refuse(
        str(source),
        [f"{place} {fault}" for place, row in zip(checked.places, formed, strict=True) for fault in _faults(row)],
    )
    examples = [
        Example(
            row=number,
            recording=_identify(checked.rows[number]),
            duration=duration,
            question=row["question"],
            answers=_listed(row["answers"]),
            choices=row["choices"],
            notes={name: said[name] for name in NOTES if said.get(name) is not None},
            passage=said.get("passage"),
        )
        for number, (row, said, duration) in enumerate(zip(formed, notes, checked.durations, strict=True))
    ]
    metric = "transcript" if task == "asr" else "choice" if examples[0].choices else "answer"
    if task == "longspeech":
        metric = _longspeech_task(source, examples)
    longest = math.inf if max_seconds is None else max_seconds
    fitting = [example for example in examples if min_seconds <= example.duration <= longest]
    if not fitting:
        raise ValueError(f"{source} has no recording of {min_seconds:g} to {longest:g} s; widen these bounds.")
    return QuestionSet(metric, fitting, checked.rows, len(examples) - len(fitting))


def _raw_rows(path: str, split: str, subset: str | None, root: Path) -> Any:
    """Returns a list of objects, a manifest's with recordings under `root`, or a `datasets.Dataset` with `audio`."""
    import datasets

    if Path(path).is_file():
        if path.endswith(".json"):
            rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if isinstance(rows, dict):  # AudioMarathon's DESED, HAD and VESUS
                rows = next((rows[name] for name in ("tasks", "samples", "data") if name in rows), rows)
            if not isinstance(rows, list):
                raise ValueError(f"{path} holds no list of objects; write one, or JSON lines into a .jsonl file.")
            return rows
        if path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as lines:
                return list(csv.DictReader(lines))
        return manifest_rows(Path(path), root)
    if Path(path).is_dir():
        found = open_folder(path, split)
    else:
        try:
            found = datasets.load_dataset(path, subset, split=split or None)
        except Exception as error:  # whatever the Hub, the network or the dataset's files raise
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"data {path} is no file or folder, and can't be loaded from the Hub: {reason}"
            ) from error
        if isinstance(found, datasets.DatasetDict):
            if len(found) > 1:
                raise ValueError(
                    f"{path} has the splits {', '.join(found)}; name one, as in {path}#{next(iter(found))}."
                )
            found = next(iter(found.values()))
    if "audio" not in found.column_names:
        return found.to_list()
    return found.cast_column("audio", datasets.Audio(decode=False))


def _identify(row: dict[str, Any]) -> str:
    """Returns a text that is the same for the same part of a recording: its path, or a digest of its bytes, and where
    it is."""
    audio = row["audio"]
    if isinstance(audio, dict):
        audio = hashlib.sha1(audio["bytes"]).hexdigest() if audio.get("bytes") else audio["path"]
    part = [str(row[name]) for name in PLACE if row.get(name) is not None]
    return " ".join([str(audio), *part])


def _listed(answers: Any) -> list[str]:
    return [answers] if isinstance(answers, str) else list(answers)


def _faults(row: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a row beside its recording, and how to mend it."""
    question, answers, choices = row["question"], row["answers"], row["choices"]
    if not isinstance(question, str) or not question.strip():
        return [f"has the question {question!r}; it must be text that is not empty"]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        return [f"has the answer {row['answers']!r}; it must be text, or a list of texts, that is not empty"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return [f"has the choices {choices!r}; they must be a list of texts"]
    if choices and not set(answers) <= set(choices):
        return [f"has the answer {row['answers']!r}, which is none of its choices {choices}"]
    return []


def find_recording(root: Path, name: Any, folder: str = "") -> Any:
    """Returns the path of a recording that a benchmark names, on a machine where its folders differ.

    The name under `root` (in `folder`), the name alone, or the name under `root` without its first folders; with
    .flac or .wav for its ending as well. Where there is none, the first of these.
    """
    if not isinstance(name, str) or not name:
        return name
    parts = Path(name).parts
    places = [root / folder / name, Path(name)]
    places += [root.joinpath(*parts[first:]) for first in range(1, len(parts))]
    for place in places:
        for path in (place, place.with_suffix(".flac"), place.with_suffix(".wav")):
            if path.is_file():
                return str(path)
    return str(places[0])


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PLACE if row.get(name) is not None}


def _question(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return _place(row) | {
        "audio": find_recording(root, row.get("audio", row.get("path"))),
        "question": row.get("question"),
        "answers": row.get("answers", row.get("answer")),
        "choices": [],
    }


def _choice(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return _question(row, root) | {"choices": row.get("choices")}


def _transcription(row: dict[str, Any], root: Path) -> dict[str, Any]:
    audio = find_recording(root, row.get("audio"))
    return _place(row) | {"audio": audio, "question": TRANSCRIBE, "answers": row.get("text"), "choices": []}


def _meld(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        "audio": find_recording(root, f"dia{row.get('Dialogue_ID')}_utt{row.get('Utterance_ID')}.wav"),
        "question": EMOTION_QUESTION,
        "answers": str(row.get("Emotion")).capitalize(),
        "choices": EMOTIONS,
    }


def _air_bench(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        "audio": find_recording(root, row.get("path"), f"{row.get('task_name')}_{row.get('dataset_name')}"),
        "question": row.get("question"),
        "answers": row.get("answer_gt"),
        "choices": [],
    }


def _librisqa(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        "audio": find_recording(root, row.get("speech_path")),
        "question": row.get("question", row.get("question_and_option")),
        "answers": row.get("answer"),
        "choices": list("ABCD") if "question_and_option" in row else [],
    }


def _openasqa(row: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        "audio": find_recording(root, row.get("audio_id")),
        "question": row.get("instruction"),
        "answers": row.get("output"),
        "choices": [],
    }


def _audio_marathon(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """RACE has `audio_path`, `options`, `answer`; the others have `path`, `choice_a` ... or `choices`, `answer_gt`."""
    options = row.get("options", row.get("choices"))
    if isinstance(options, dict):
        options = list(options.values())
    elif options is None:
        options = [row[name] for letter in "abcdefgh" if row.get(name := f"choice_{letter}")]
    letters = list("ABCDEFGH"[: len(options)])
    choices = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    answer = row.get("answer_gt", row.get("answer"))
    if isinstance(answer, str) and answer not in letters:
        named = [letter for letter, option in zip(letters, options, strict=True) if _same(option, answer)]
        answer = named[0] if named else answer.upper() if answer.upper() in letters else answer
    listed = f"{', '.join(letters[:-1])}{',' * (len(letters) > 2)} or {letters[-1]}" if letters else ""
    form = MARATHON_RACE if "options" in row else MARATHON_QUESTION
    question = row.get("question")
    return {
        "audio": find_recording(root, row.get("path", row.get("audio_path"))),
        "question": question and form.format(question=question, choices=choices, letters=listed),
        "answers": answer,
        "choices": letters,
    }


def _same(option: Any, answer: str) -> bool:
    return str(option).strip().lower() == answer.strip().lower()


def _longspeech(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """The user's message holds the recording and the prompt, as it is asked; the assistant's the reference."""
    messages: Any = row.get("messages")
    told = isinstance(messages, list) and len(messages) > 1 and all(isinstance(each, dict) for each in messages)
    asked, *_, said = messages if told else ({}, {})
    return {
        "audio": find_recording(root, asked.get("audio")),
        "question": asked.get("content"),
        "answers": said.get("content"),
        "choices": [],
    }


def _longspeech_task(source: str | Path, examples: list[Example]) -> str:
    """Returns the task that all rows are of."""
    names = sorted({str(example.notes.get("task")) for example in examples})
    if len(names) > 1 or names[0] not in LONGSPEECH:
        raise ValueError(
            f"{source} has rows of the task {', '.join(names)}; give a file of one of LongSpeech's: "
            f"{', '.join(LONGSPEECH)}."
        )
    return names[0]


TASKS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "qa": _question,
    "longspeech-eval": _question,
    "choice": _choice,
    "asr": _transcription,
    "meld": _meld,
    "air-bench": _air_bench,
    "librisqa": _librisqa,
    "openasqa": _openasqa,
    "audio-marathon": _audio_marathon,
    "longspeech": _longspeech,
}
