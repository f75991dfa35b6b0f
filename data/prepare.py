"""Makes a manifest of a published dataset: `fastlongspeech prepare DATASET --output FOLDER`.

    fastlongspeech prepare librispeech --output data                                    # from the Hub, as a stream
    fastlongspeech prepare librispeech --source /corpora/LibriSpeech --output data      # from a local copy
    fastlongspeech prepare mls --hours 3000 --output data                               # 3,000 hours, drawn by --seed
    fastlongspeech prepare librisqa --split partII.train --audio-root /corpora/LibriSpeech --output data

Writes `DATASET-SPLIT.jsonl`, with `audio` relative to it, and `DATASET-SPLIT.summary.json` (rows, hours, what was
dropped and why). Recordings of a local copy stay where they are; those of a stream are written under `audio/` as they
come, without coding them again. To go on after an interruption, give the same command again: what is done so far is
in `DATASET-SPLIT.journal`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..decoding_fastlongspeech import recording_seconds
from ..windows_fastlongspeech import WINDOWS
from .audio import encoded
from .corpora import CORPORA, Clip, Corpus, Request

MAX_SECONDS = 30.0  # Qwen2-Audio's window: training needs no longer clips
CHUNK = 256  # clips that are worked on together
FOLDER_SIZE = 1000  # recordings of a stream in one folder
ENOUGH = 200  # clips after which a share of bad ones says something
MOST_BAD = 0.5
BAD = ("no such recording", "unreadable recording")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command, or leaves with usage."""
    parser = argparse.ArgumentParser(
        prog="fastlongspeech prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=list(CORPORA), metavar="DATASET", help=", ".join(CORPORA))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the manifest")
    parser.add_argument("--source", metavar="PLACE", help="Hub id, or a local copy (default: its public Hub id)")
    parser.add_argument("--split", help="default: the training set")
    parser.add_argument("--audio-root", type=Path, metavar="FOLDER", help="recordings of openasqa and librisqa")
    parser.add_argument("--hours", type=float, metavar="H", help="stop after so many, drawn from all by the seed")
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS, metavar="S", help="drop longer clips (30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    arguments = parser.parse_args(argv)
    corpus = CORPORA[arguments.dataset]
    arguments.split = arguments.split or corpus.splits[0]
    arguments.source = arguments.source or corpus.hub
    if arguments.split not in corpus.splits:
        parser.error(f"--split must be one of {', '.join(corpus.splits)}, got {arguments.split}.")
    if arguments.source is None:
        parser.error(f"{arguments.dataset} has no public Hub form; download it, and name the copy with --source.")
    if corpus.needs_recordings != (arguments.audio_root is not None):
        need = "needs" if corpus.needs_recordings else "brings its recordings; leave out"
        parser.error(f"{arguments.dataset} {need} --audio-root.")
    if arguments.hours is not None and not arguments.hours > 0:
        parser.error(f"--hours must be more than 0, got {arguments.hours}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `fastlongspeech prepare`.

    Raises:
        FileNotFoundError, ValueError: the dataset can't be read, or the output folder holds its manifest already.
    """
    arguments = parse_arguments(argv)
    print(json.dumps(prepare(arguments), indent=1, ensure_ascii=False))


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes a manifest, going on where a stopped run was, and returns its summary; see the module's text."""
    corpus = CORPORA[arguments.dataset]
    output, name = arguments.output, f"{arguments.dataset}-{arguments.split}"
    manifest, journal = output / f"{name}.jsonl", output / f"{name}.journal"
    if manifest.exists():
        raise ValueError(f"{manifest} is there already; delete it to make it again, or name another --output.")
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        key: str(value)
        for key, value in vars(arguments).items()
        if key in ("source", "audio_root", "hours", "max_seconds", "seed") and value is not None
    }
    done = _open_journal(journal, settings)
    request = Request(
        arguments.source, arguments.split, arguments.audio_root, arguments.seed, arguments.hours is not None
    )
    with open(journal, "a", encoding="utf-8") as file:
        _work(corpus.read(request), done, file, arguments, name)
    return _finish(journal, manifest, settings | {"dataset": arguments.dataset, "split": arguments.split}, corpus)


def _open_journal(journal: Path, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Returns what is written of clips so far, a line of settings before them; a line that was cut off is removed."""
    if journal.exists():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(journal, len(whole))
        lines = _parse(whole.decode())
        if lines:
            if lines[0] != settings:
                raise ValueError(
                    f"{journal} is of a run with other arguments ({lines[0]}); repeat those to go on, or delete it."
                )
            return lines[1:]
    journal.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return []


def _work(
    clips: Iterator[Clip], done: list[dict[str, Any]], journal: TextIO, arguments: argparse.Namespace, name: str
) -> None:
    """Writes a line for every clip that is not done, kept or dropped, until there are none or enough hours."""
    wanted = float("inf") if arguments.hours is None else arguments.hours * 3600
    held = sum(line.get("duration", 0.0) for line in done)
    numbers = Counter(line.get("dropped", "kept") for line in done)
    waiting = enumerate(islice(clips, len(done), None), len(done))  # the order is the same in every run
    with ThreadPoolExecutor() as pool, tqdm(desc=name, unit="clip", initial=len(done), disable=None) as bar:
        while held < wanted and (chunk := list(islice(waiting, CHUNK))):
            lines = pool.map(lambda numbered: _measure(numbered[0], numbered[1], arguments, name), chunk)
            for line in lines:
                if held >= wanted:
                    break
                held += line.get("duration", 0.0) if "dropped" not in line else 0.0
                numbers[line.get("dropped", "kept")] += 1
                journal.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update()
            journal.flush()
            bar.set_postfix(hours=f"{held / 3600:.1f}", dropped=numbers.total() - numbers["kept"])
            bad = sum(numbers[reason] for reason in BAD)
            if numbers.total() >= ENOUGH and bad > MOST_BAD * numbers.total():
                raise ValueError(
                    f"{bad} of the first {numbers.total()} clips of {arguments.dataset} have no recording that can be "
                    f"read, such as {_last_bad(journal.name)}; check --source and --audio-root."
                )


def _last_bad(journal: str) -> str:
    lines = _parse(Path(journal).read_text(encoding="utf-8"))[1:]
    return next((row["audio"] for row in reversed(lines) if row.get("dropped") in BAD), "")


def _parse(content: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.split("\n") if line]  # splitlines would split within texts, at U+2028


def _measure(number: int, clip: Clip, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns the line of a clip: its row, or what it is and why it is dropped. The recording of a stream is kept."""
    held = isinstance(clip.audio, dict) and clip.audio.get("bytes")
    named = str(clip.audio if isinstance(clip.audio, str) else clip.id)
    if clip.dropped:
        return {"dropped": clip.dropped, "audio": named}
    if any(not isinstance(text, str) or not text.strip() for text in clip.fields.values()):
        return {"dropped": "empty text", "audio": named}
    content = encoded(clip.audio)
    if not content or (isinstance(content, str) and not Path(content).is_file()):
        return {"dropped": BAD[0], "audio": named}
    try:
        seconds = recording_seconds(content, named)
    except (OSError, ValueError) as error:
        return {"dropped": BAD[1], "audio": named, "reason": str(error)}
    if seconds > arguments.max_seconds:
        return {"dropped": f"over {arguments.max_seconds:g} s", "audio": named, "seconds": round(seconds, 3)}
    if seconds < WINDOWS.frame_seconds:
        return {"dropped": f"under {WINDOWS.frame_seconds:g} s", "audio": named, "seconds": round(seconds, 3)}
    path = Path(str(content))
    if held:
        ending = Path(clip.audio.get("path") or "").suffix or ".audio"
        path = arguments.output / "audio" / name / f"{number // FOLDER_SIZE:05d}" / f"{number:08d}-{clip.id}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return {"audio": os.path.relpath(path, arguments.output), **clip.fields, "duration": round(seconds, 3)}


def _finish(journal: Path, manifest: Path, settings: dict[str, str], corpus: Corpus) -> dict[str, Any]:
    """Writes the manifest, the summary and the list of what was dropped; returns the summary."""
    lines = _parse(journal.read_text(encoding="utf-8"))[1:]
    rows, dropped = [r for r in lines if "dropped" not in r], [r for r in lines if "dropped" in r]
    if not rows:
        raise ValueError(
            f"no clip of {settings['dataset']} is usable ({dict(Counter(row['dropped'] for row in dropped))}); "
            "check --source and --audio-root."
        )
    summary = {
        **settings,
        "licence": corpus.licence,
        "rows": len(rows),
        "hours": round(sum(row["duration"] for row in rows) / 3600, 3),
        "dropped": dict(Counter(row["dropped"] for row in dropped).most_common()),
    }
    for path, content in (
        (
            manifest.with_suffix(".dropped.jsonl"),
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped),
        ),
        (manifest.with_suffix(".summary.json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n"),
        (manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
    ):
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    journal.unlink()
    return summary


if __name__ == "__main__":
    main()
