"""Synthesises the demo-scale evaluation set, shaped like LongSpeech-Eval, from sentences that training never speaks.

    python -m fastlongspeech.demo.evaluation_set work/demo-set

`long/` has 164 recordings of 133 s on average, the longest of 1000 s; `short/` has 200 clips under 30 s. In each,
`qa.jsonl` asks about facts (three to five questions on a long recording) and `voice.jsonl` whether a man or a woman
speaks. `short/asr.jsonl` has the transcripts of the clips. Needs espeak-ng and flite, and the extra `demo`.

Every recording depends on its part and number alone, and one that exists already is kept. So the script makes the same
set when it was stopped and started again.
"""

import argparse
import math
import random
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

from .corpus import Split, record, write_jsonl, write_recordings

LONG, SHORT = 164, 200
LONGEST, SHORTEST, SPREAD = 1000.0, 30.0, 0.987  # seconds; the spread gives the mean of 133 s
FACTS = 3  # fewest questions about facts, in a long recording
GENDERS = ["man", "woman"]


def durations() -> list[float]:
    """Returns the seconds of the long recordings: 30 s and the quantiles of a log-normal distribution, shuffled."""
    scores = [NormalDist().inv_cdf((number + 0.5) / LONG) for number in range(LONG)]
    seconds = [SHORTEST + (LONGEST - SHORTEST) * math.exp(SPREAD * (score - scores[-1])) for score in scores]
    random.Random(0).shuffle(seconds)
    return seconds


def draw(part: str, index: int) -> tuple[Any, dict[str, Any]]:
    """Returns a recording of the part `"long"` or `"short"`: float32 samples at 16 kHz, and its description.

    A long recording with too few facts is drawn again.
    """
    if part == "short":
        return record("evaluation-short", index, Split(SHORT, (8, 29), held_out=True))
    seconds = durations()[index]
    split = Split(LONG, (seconds, seconds), held_out=True, questions=5)
    attempt = 0
    while True:
        samples, row = record(f"evaluation-long-{attempt}", index, split)
        if sum(question["kind"] != "voice" for question in row["questions"]) >= FACTS:
            return samples, row
        attempt += 1


def write_part(root: Path, part: str, recordings: int, workers: int) -> None:
    """Writes the first `recordings` recordings of a part and its manifests under `root/part`."""
    folder = root / part
    rows = write_recordings(folder, partial(draw, part), recordings, workers)
    questions = [{"audio": row["audio"], **question} for row in rows for question in row["questions"]]
    voice = [question | {"choices": GENDERS} for question in questions if question["kind"] == "voice"]
    for question in voice:
        del question["time"]  # it is about the whole recording
    write_jsonl(folder / "qa.jsonl", [question for question in questions if question["kind"] != "voice"])
    write_jsonl(folder / "voice.jsonl", voice)
    if part == "short":
        write_jsonl(folder / "asr.jsonl", [{"audio": row["audio"], "text": row["text"]} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the set")
    parser.add_argument("--recordings", type=int, metavar="N", help="the first N of each part only")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    arguments = parser.parse_args()
    for part, recordings in (("long", LONG), ("short", SHORT)):
        write_part(arguments.root, part, min(arguments.recordings or recordings, recordings), arguments.workers)


if __name__ == "__main__":
    main()
