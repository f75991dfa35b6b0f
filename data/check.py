"""Says what is wrong with the rows of a source before a training run finds it: `fastlongspeech check-data SOURCE`.

    fastlongspeech check-data train.jsonl --ctc-model runs/ctc/ctc.model --plot durations.png

Finds recordings that are missing, unreadable or cut (every one is decoded to its end, unless `--headers`), texts that
are empty or too long, CTC labels that need more frames than their recording has, and duplicates. Prints a histogram of
durations. The exit status is 1 where there are faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..decoding_fastlongspeech import decode_file
from ..windows_fastlongspeech import WINDOWS, Windows
from .audio import TarMember, encoded
from .manifests import Examined, Fault, examine_source, fault_kind, manifest_rows, open_folder, recordings_of

COLUMNS = {1: ("audio", "text"), 2: ("audio", "question", "answer")}
KINDS = {
    "missing": "recordings that do not exist",
    "unreadable": "recordings that can't be read",
    "cut": "recordings that are cut off or changed",
    "place": "parts that recordings do not have",
    "text": "rows without text or not of the manifest's form",
    "long": "texts that are too long",
    "labels": "CTC labels that need more frames than there are",
    "duplicate": "duplicates",
}
MOST_CHARACTERS = 4000  # of one text: about a thousand tokens
SPOKEN_A_SECOND = 40  # characters; the fastest speakers say about 25
EDGES = [0, 1, 2, 5, 10, 15, 20, 25, 30, 60, 120, 300, 600, 1800, 3600, float("inf")]  # seconds
BAR = 40
SHOWN = 20


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command, or leaves with usage."""
    parser = argparse.ArgumentParser(
        prog="fastlongspeech check-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="manifest, tar files, or datasets folder (folder#split)")
    parser.add_argument("--stage", type=int, choices=[1, 2], help="that will read it (default: by the first row)")
    parser.add_argument(
        "--ctc-model", metavar="FILE", help="SentencePiece model of the CTC labels; without: unchecked"
    )
    parser.add_argument("--headers", action="store_true", help="read headers alone: quick, but finds fewer cuts")
    parser.add_argument("--max-characters", type=int, default=MOST_CHARACTERS, metavar="N", help="longest text (4000)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the histogram of durations as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `fastlongspeech check-data`.

    Raises:
        FileNotFoundError: there is nothing at the source.
        ValueError: there are faults; they are printed before.
    """
    arguments = parse_arguments(argv)
    columns = COLUMNS[arguments.stage or guess_stage(arguments.source)]
    found = examine_source(arguments.source, columns)
    faults = [*found.faults, *check(found, columns, arguments)]
    print(report(arguments.source, found, faults))
    if arguments.stage != 2 and columns == COLUMNS[1] and not arguments.ctc_model:
        print("CTC labels are not checked; name their vocabulary with --ctc-model.")
    if arguments.plot:
        draw(found.durations, arguments.plot)
    if faults:
        raise ValueError(f"{arguments.source} has {len(faults)} faults; mend or remove these rows.")


def guess_stage(source: str) -> int:
    """Returns the stage that the first row of a source is for: 2 where it asks something."""
    path, _, split = source.partition("#")
    if Path(path).is_dir():
        names: Iterable[str] = open_folder(path, split).column_names
    elif Path(path).is_file() and not path.endswith(".tar"):
        names = next((row for row in manifest_rows(Path(path)) if isinstance(row, dict)), ())
    else:
        names = ()
    return 2 if {"question", "messages"} & set(names) else 1


def check(found: Examined, columns: Sequence[str], arguments: argparse.Namespace) -> list[Fault]:
    """Returns the faults of rows that a stage would take: what their recordings hold, their texts, and duplicates."""
    faults = long_texts(found, columns, arguments.max_characters)
    if arguments.ctc_model:
        import sentencepiece

        encode = sentencepiece.SentencePieceProcessor(model_file=arguments.ctc_model).encode
        texts = [row["text"] for row in found.rows]
        faults += label_faults(found.places, found.durations, texts, encode)
    if not arguments.headers:
        faults += undecodable(found)
    return faults + duplicates(found, columns)


def long_texts(found: Examined, columns: Sequence[str], most: int) -> list[Fault]:
    """Returns the rows with a text of more than `most` characters, or a transcript that nobody can have spoken."""
    faults = []
    for row, place, seconds in zip(found.rows, found.places, found.durations, strict=True):
        for column in ("answer",) if "messages" in row else columns[1:]:
            length = len(row[column])
            if length > most:
                faults.append(Fault(place, "long", f"has {column!r} of {length} characters, more than {most}"))
            elif column == "text" and length > SPOKEN_A_SECOND * max(seconds, 1):
                faults.append(
                    Fault(place, "long", f"has {length} characters in {seconds:.1f} s; check its transcript")
                )
    return faults


def label_faults(
    places: Sequence[str],
    durations: Sequence[float],
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    windows: Windows = WINDOWS,
) -> list[Fault]:
    """Returns the rows whose CTC labels need more frames than their recording has.

    CTC needs one frame for each piece, and one more between equal pieces.
    """
    faults = []
    for place, seconds, text in zip(places, durations, texts, strict=True):
        pieces = encode(text)
        needed = len(pieces) + sum(left == right for left, right in zip(pieces, pieces[1:], strict=False))
        frames = windows.count_frames(windows.mel_frames(int(seconds * windows.sampling_rate))).sum()
        if needed > frames:
            said = f"has a transcript that needs {needed} frames, its recording has {frames}; check both"
            faults.append(Fault(place, "labels", said))
    return faults


def undecodable(found: Examined) -> list[Fault]:
    """Returns the rows with a recording that can't be decoded to its end; each recording is decoded once."""
    rows_of: dict[Any, list[int]] = defaultdict(list)
    for number in range(len(found.places)):
        for part in recordings_of(found.rows[number]):
            key = part["audio"] if isinstance(part["audio"], (str, TarMember)) else number
            if number not in rows_of[key]:
                rows_of[key].append(number)

    def decode(key: Any) -> str | None:
        try:
            for _ in decode_file(encoded(found.rows[key]["audio"] if isinstance(key, int) else key), "it"):
                pass
        except (OSError, ValueError) as error:
            return f"has a recording that can't be read to its end ({error})"
        return None

    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        options: dict[str, Any] = {"total": len(rows_of), "desc": "decoding", "unit": "file", "disable": None}
        for key, fault in zip(rows_of, tqdm(pool.map(decode, rows_of), **options), strict=True):
            faults += [Fault(found.places[n], fault_kind(fault), fault) for n in rows_of[key]] if fault else []
    return faults


def duplicates(found: Examined, columns: Sequence[str]) -> list[Fault]:
    """Returns the rows that repeat another: the same part of a recording, for stage 2 with the same question."""
    content = _same_content({part["audio"] for row in _named(found) for part in recordings_of(row)})
    first: dict[Any, str] = {}
    faults = []
    for row, place in zip(_named(found), found.places, strict=True):
        parts = [
            (content.get(part["audio"], part["audio"]), part.get("start"), part.get("end"))
            for part in recordings_of(row)
        ]
        asked = (
            json.dumps(row["messages"]) if "messages" in row else row.get("question") if "question" in columns else ""
        )
        key = (tuple(parts), asked)
        if key in first:
            what = "question about the same recording" if asked else "recording"
            faults.append(Fault(place, "duplicate", f"has the same {what} as {first[key]}; remove one"))
        else:
            first[key] = place
    return faults


def _named(found: Examined) -> Iterable[Any]:
    """Yields the rows of a manifest; those of a dataset with a digest instead of a recording."""
    for number in range(len(found.places)):
        row = found.rows[number]
        if isinstance(row.get("audio"), dict):
            held = row["audio"]
            row = row | {"audio": hashlib.sha256(held["bytes"]).hexdigest() if held.get("bytes") else held["path"]}
        yield row


def _same_content(recordings: Iterable[Any]) -> dict[Any, str]:
    """Returns a digest for every recording that may hold the same as another: files of the same size."""
    of_size: dict[int, list[Any]] = defaultdict(list)
    for audio in recordings:
        if isinstance(audio, TarMember):
            of_size[audio.size].append(audio)
        elif os.path.isfile(audio):
            of_size[os.path.getsize(audio)].append(audio)
    digests = {}
    for alike in of_size.values():
        for audio in alike if len(alike) > 1 else ():
            held = encoded(audio)
            digests[audio] = hashlib.sha256(held if isinstance(held, bytes) else Path(held).read_bytes()).hexdigest()
    return digests


def report(source: str, found: Examined, faults: Sequence[Fault]) -> str:
    """Returns the page that the command prints."""
    counts = Counter(fault.kind for fault in faults)
    seconds = sum(found.durations)
    lines = [f"{source}: {len(found.places)} usable rows, {seconds / 3600:.2f} h"]
    lines += [f"{counts[kind]:8}  {what}" for kind, what in KINDS.items()]
    lines += [f"  {fault.place} {fault.text}" for fault in faults[:SHOWN]]
    lines += [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n".join([*lines, *histogram(found.durations)])


def histogram(durations: Sequence[float]) -> list[str]:
    """Returns lines with how many rows last how many seconds."""
    if not durations:
        return []
    counts, _ = np.histogram(durations, EDGES)
    last = int(np.flatnonzero(counts)[-1])
    rows = [
        f"{low:6g} to {high:<6g}{count:9d}  {'#' * -(-BAR * int(count) // int(counts.max()))}"
        for low, high, count in zip(EDGES, EDGES[1:], counts[: last + 1], strict=False)
    ]
    return ["seconds", *rows]


def draw(durations: Sequence[float], path: Path) -> None:
    """Draws the histogram of durations into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(durations, bins=60)
    axes.set_xlabel("seconds")
    axes.set_ylabel("rows")
    axes.set_title(f"{len(durations)} rows, {sum(durations) / 3600:.2f} h")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
