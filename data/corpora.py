"""The published datasets that the paper trains on: how each is read, and what its rows become.

A dataset is read from its Hub form (a Hub id, or a folder with a copy of that repository) by `datasets`, as a stream;
or from a local copy in the form that its makers distribute. See `docs/training.md` for the columns, splits, licences
and sizes.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from .tasks import find_recording

INSTRUCTIONS = Path(__file__).parent / "transcription_instructions.txt"
SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled together, beside its files


class Clip(NamedTuple):
    """One row of a dataset.

    Attributes:
        id: a name of its recording that is good for a file.
        audio: a path, or `{"bytes": ..., "path": ...}`.
        fields: what the manifest says beside `audio` and `duration`; all are texts.
        dropped: why the row is not wanted, or None.
    """

    id: str
    audio: Any
    fields: dict[str, Any]
    dropped: str | None = None


@dataclass(frozen=True)
class Request:
    """What `prepare` is asked for: where the dataset is, the split, the recordings' folder, and the seed."""

    source: str
    split: str
    audio_root: Path | None
    seed: int
    shuffled: bool


@dataclass(frozen=True)
class Corpus:
    """A dataset that `prepare` knows.

    Attributes:
        hub: its Hub id, where a public repository holds it in a form that needs no script.
        splits: what can be asked for; the first is the training set.
        licence: of the dataset's own files.
        read: yields its clips.
        needs_recordings: it holds texts alone; the recordings are another dataset's.
    """

    hub: str | None
    splits: tuple[str, ...]
    licence: str
    read: Callable[[Request], Iterator[Clip]]
    needs_recordings: bool = False


def in_order(clips: Iterable[Clip], request: Request) -> Iterator[Clip]:
    """Yields clips in an order that depends on the seed alone, or in their own where it is not shuffled."""
    if not request.shuffled:
        yield from clips
        return
    listed = list(clips)
    random.Random(request.seed).shuffle(listed)
    yield from listed


def stream(request: Request, config: str | None, splits: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Hub dataset or of a local copy of its repository, recordings left encoded."""
    import datasets

    for split in splits:
        try:
            rows = datasets.load_dataset(request.source, config, split=split, streaming=True)
        except Exception as error:  # whatever the Hub, the network or the dataset's files raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{request.source} can't be read as a dataset of the Hub, nor as its makers' copy: {reason}; "
                "check --source."
            ) from error
        if "audio" in (rows.column_names or ()):
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
        if request.shuffled:
            rows = rows.shuffle(seed=request.seed, buffer_size=SHUFFLE_BUFFER)
        yield from rows


# LibriSpeech and MLS: transcripts, for stage 1

LIBRISPEECH_TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")


def read_librispeech(request: Request) -> Iterator[Clip]:
    """Yields utterances; transcripts, which are in capitals, become lower case, as MLS's are."""
    folders = LIBRISPEECH_TRAIN if request.split == "train" else (request.split,)
    root = Path(request.source)
    root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    if (root / folders[0]).is_dir():
        yield from in_order(chain.from_iterable(_transcribed(root / folder) for folder in folders), request)
        return
    splits = [folder.replace("dev", "validation").replace("-", ".") for folder in folders]
    for row in stream(request, "all", splits):
        yield Clip(row["id"], row["audio"], {"text": row["text"].lower(), "speaker": str(row["speaker_id"])})


def _transcribed(folder: Path) -> Iterator[Clip]:
    for transcripts in sorted(folder.glob("*/*/*.trans.txt")):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            fields = {"text": text.lower(), "speaker": name.partition("-")[0]}
            yield Clip(name, str(transcripts.parent / f"{name}.flac"), fields)


def read_mls(request: Request) -> Iterator[Clip]:
    """Yields utterances of the English part."""
    folder = Path(request.source) / request.split
    if (folder / "transcripts.txt").is_file():
        yield from in_order(_mls_copy(folder), request)
        return
    for row in stream(request, None, [request.split]):
        name = f"{row['speaker_id']}_{row['book_id']}_{row['begin_time']:g}"
        yield Clip(name, row["audio"], {"text": row["transcript"], "speaker": str(row["speaker_id"])})


def _mls_copy(folder: Path) -> Iterator[Clip]:
    with open(folder / "transcripts.txt", encoding="utf-8") as lines:
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            speaker, book, _ = name.split("_")
            place = folder / "audio" / speaker / book / name
            path = place.with_suffix(".opus") if place.with_suffix(".opus").is_file() else place.with_suffix(".flac")
            yield Clip(name, str(path), {"text": text, "speaker": speaker})


# Questions about speech, for stage 2

SPEECH_OF_OPENASQA = ("iemocap", "libritts", "voxceleb", "mosei")


def read_openasqa(request: Request) -> Iterator[Clip]:
    """Yields the open-ended questions about speech; closed ones, and those about sounds and music, are dropped."""
    yield from in_order((_openasqa_clip(row, request) for row in _read_list(Path(request.source))), request)


def _openasqa_clip(row: dict[str, Any], request: Request) -> Clip:
    task, dataset = str(row.get("task", "")), str(row.get("dataset", ""))
    dropped = None
    if not task.lower().startswith("open"):
        dropped = f"a question that is not open-ended ({task})"
    elif not dataset.lower().startswith(SPEECH_OF_OPENASQA):
        dropped = f"not about speech ({dataset})"
    path = row["audio_id"] if dropped else find_recording(cast(Path, request.audio_root), row["audio_id"])
    fields = {"question": row["instruction"], "answer": row["output"], "source": dataset}
    return Clip(Path(row["audio_id"]).stem, path, fields, dropped)


def read_librisqa(request: Request) -> Iterator[Clip]:
    """Yields the questions of part I, or those of part II with their options; there the answer has its analysis."""
    part, _, split = request.split.partition(".")
    source = Path(request.source)
    name = f"LibriSQA-{part[0].upper()}{part[1:]}"
    files = [source, source / f"{name}-{split}.json", source / name / f"{name}-{split}.json"]
    path = next((file for file in files if file.is_file()), None)
    rows = stream(request, None, [request.split]) if path is None else iter(_read_list(path))
    clips = (_librisqa_clip(row, request) for row in rows)
    yield from clips if path is None else in_order(clips, request)


def _librisqa_clip(row: dict[str, Any], request: Request) -> Clip:
    question = row["question"] if request.split.startswith("partI.") else row["question_and_option"]
    answer = row["answer"] if request.split.startswith("partI.") else row["answer_and_analysis"]
    path = find_recording(cast(Path, request.audio_root), row["speech_path"])
    return Clip(Path(row["speech_path"]).stem, path, {"question": question, "answer": answer})


def _read_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; name the dataset's JSON file with --source.")
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of objects; it is not the file that the dataset's makers publish.")
    return rows


def read_common_voice(request: Request) -> Iterator[Clip]:
    """Yields clips as spoken questions: one of 200 instructions, drawn by the seed and the clip, and the sentence."""
    instructions = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    root = Path(request.source)
    root = root / "en" if (root / "en").is_dir() else root
    table = root / f"{request.split}.tsv"
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as lines:
            rows: Iterable[dict[str, Any]] = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = (row | {"audio": str(root / "clips" / row["path"])} for row in rows)
    else:
        splits = {"dev": "validation"}
        rows = stream(request, "en", [splits.get(request.split, request.split)])
    clips = (_common_voice_clip(row, instructions, request.seed) for row in rows)
    yield from in_order(clips, request) if table.is_file() else clips


def _common_voice_clip(row: dict[str, Any], instructions: list[str], seed: int) -> Clip:
    name = Path(row["path"]).stem
    question = random.Random(f"{seed} {name}").choice(instructions)
    fields = {"text": row["sentence"], "question": question, "answer": row["sentence"], "speaker": row["client_id"]}
    return Clip(name, row["audio"], fields)


CORPORA: dict[str, Corpus] = {
    "librispeech": Corpus(
        "openslr/librispeech_asr",
        ("train", *LIBRISPEECH_TRAIN, "dev-clean", "dev-other", "test-clean", "test-other"),
        "CC BY 4.0",
        read_librispeech,
    ),
    "mls": Corpus("parler-tts/mls_eng", ("train", "dev", "test"), "CC BY 4.0", read_mls),
    "openasqa": Corpus(
        None, ("train",), "none stated; the recordings have those of their datasets", read_openasqa, True
    ),
    "librisqa": Corpus(
        "ZihanZhao/LibriSQA",
        ("partI.train", "partII.train", "partI.test", "partII.test"),
        "none stated on its Hub page; the recordings are LibriSpeech's, CC BY 4.0",
        read_librisqa,
        True,
    ),
    "common-voice": Corpus(None, ("train", "dev", "test"), "CC0", read_common_voice),
}
