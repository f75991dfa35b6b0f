"""Writes what the training stages read of the small model's corpus: `python -m fastlongspeech.small.manifests CORPUS`.

| file | rows | of |
|---|---|---|
| `ctc-SPLIT.jsonl` | `audio, text`: lower case, no punctuation | recordings up to 30 s |
| `align-SPLIT.jsonl` | `audio, text` as it is written | recordings up to 30 s |
| `qa-SPLIT.jsonl` | `audio, question, answer` | whole recordings: all questions, one transcript in `TRANSCRIPTS` |

SPLIT is `train` or `val`. Questions about text alone stay in `tasks-train.jsonl`, where stage 0 reads them.
"""

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .corpus import write_atomically
from .tasks import LONGEST_CLIP

TRANSCRIPTS = 4  # there are four times as many transcripts as questions, and more is to be learnt from questions


def read(path: Path) -> Iterator[dict]:
    """Yields the rows of a manifest."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def ctc_rows(corpus: Path, split: str) -> Iterator[dict]:
    """Yields what CTC learns."""
    for row in read(corpus / f"{split}.jsonl"):
        if row["duration"] <= LONGEST_CLIP and row.get("labels"):
            yield {"audio": row["audio"], "text": row["labels"]}


def align_rows(corpus: Path, split: str) -> Iterator[dict]:
    """Yields what stage 0 learns; transcripts in capitals become small letters."""
    for row in read(corpus / f"{split}.jsonl"):
        if row["duration"] <= LONGEST_CLIP:
            yield {"audio": row["audio"], "text": row["text"].lower() if row["text"].isupper() else row["text"]}


def qa_rows(corpus: Path, split: str) -> Iterator[dict]:
    """Yields what stage 2 learns."""
    for row in read(corpus / f"tasks-{split}.jsonl"):
        if "audio" not in row or "start" in row:
            continue
        is_transcript = row["task"] in ("transcribe", "repeat")
        if is_transcript and zlib.crc32(row["audio"].encode()) % TRANSCRIPTS:
            continue
        answer = row["answer"].lower() if is_transcript and row["answer"].isupper() else row["answer"]
        yield {"audio": row["audio"], "question": row["question"], "answer": answer}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes all manifests into the corpus, beside those that it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that small/corpus.py has made")
    corpus = parser.parse_args(argv).corpus
    for name, rows in (("ctc", ctc_rows), ("align", align_rows), ("qa", qa_rows)):
        for split in ("train", "val"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(corpus, split)]
            write_atomically(corpus / f"{name}-{split}.jsonl", "".join(lines))
            print(f"{name}-{split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
