"""Makes the corpus that the small model learns from: speech, manifests, questions and answers.

    python -m fastlongspeech.small.corpus OUTPUT --speech FOLDER --texts FOLDER --hours 15

Every recording depends on its own text, voice and number alone, and one that exists is kept: the command can be
stopped and started again, with another number of hours or workers. Form of the manifests: see `README.md` here.
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from .tasks import as_written, human_rows, speech_rows, task_rows
from .texts import Story, read_addresses, read_stories, split_sentences
from .voices import QUICK_VOICES, SAMPLING_RATE, TEST_VOICES, TRAIN_VOICES, Voice, find_kokoro, speaker

HUMAN_QUESTIONS = Path(__file__).parent / "human_questions.jsonl"
BITRATE = 24_000
WORDS_A_MINUTE = 170
CLIPS_BETWEEN = 6  # short clips after every section: about as many seconds as the section has
QUICK_CLIPS_BETWEEN = 3
EARLY_HOURS = 1.5  # of training speech before the evaluation sets
PASSAGE_MINUTES = ((1.0, 1.9), (1.9, 3.2), (3.2, 4.8))  # in turns
PASSAGE_SECONDS = (60, 300)  # a quick speaker may need less: held-out passages outside are in no manifest
TEST_QUESTIONS, DEV_QUESTIONS, TEST_CLIPS = 350, 60, 60  # some in passages that turn out too short


@dataclass(frozen=True)
class Item:
    """One recording to make: what it says (``sentences``), who says it, and where the text is from."""

    id: str
    split: str
    source: str
    sentences: tuple[str, ...]
    voice: Voice
    story: str | None = None
    sections: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Returns the seed of what is drawn for this recording alone."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big")

    @property
    def minutes(self) -> float:
        """Returns about how long the recording will be."""
        return sum(len(sentence.split()) for sentence in self.sentences) / WORDS_A_MINUTE


def section_items(stories: Sequence[Story], voices: Sequence[Voice]) -> list[Item]:
    """Returns one recording of every section that an explicit question is about, story after story in turns."""
    turns = zip_longest(*([(s, n) for n in s.sections if s.asked({n})] for s in stories))
    chosen = [pair for turn in turns for pair in turn if pair is not None]
    return [_section_item(story, (number,), voices[i % len(voices)]) for i, (story, number) in enumerate(chosen)]


def _section_item(story: Story, numbers: Sequence[str], voice: Voice) -> Item:
    span = numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    sentences = tuple(s for number in numbers for s in split_sentences(story.sections[number]))
    name = f"{voice.engine}/{story.split}/{story.id}-{span}"
    return Item(name, story.split, f"fairytaleqa/{voice.engine}", sentences, voice, story.id, tuple(numbers))


def clip_items(stories: Sequence[Story], addresses: Sequence[str], voices: Sequence[Voice]) -> list[Item]:
    """Returns recordings of single sentences, of addresses and of sections without questions in turns."""
    tales = [
        (sentence, "fairytaleqa")
        for story in stories
        for number, text in story.sections.items()
        if not story.asked({number})
        for sentence in split_sentences(text)
        if 40 <= len(sentence) <= 230
    ]
    speeches = [(sentence, "state_of_the_union") for sentence in addresses]
    for sentences in (tales, speeches):
        random.Random(0).shuffle(sentences)
    both = [pair for turn in zip_longest(tales, speeches) for pair in turn if pair is not None]
    split, engine = stories[0].split, voices[0].engine
    return [
        Item(f"{engine}/{split}-clips/{i:05d}", split, f"{source}/{engine}", (sentence,), voices[i % len(voices)])
        for i, (sentence, source) in enumerate(both)
    ]


def passage_items(stories: Sequence[Story], voices: Sequence[Voice], questions: int) -> list[Item]:
    """Returns recordings of 1 to 5 minutes, each of consecutive sections of one story, that answer many questions.

    Of every story in turn the stretch of sections with the most explicit questions a minute is taken that touches
    none taken before, until all of them together answer as many as wanted or no stretch is left.
    """
    taken: dict[str, set[str]] = {story.id: set() for story in stories}
    items: list[Item] = []
    found = 0
    while found < questions:
        before = found
        for story in stories:
            turn = len(items) % len(PASSAGE_MINUTES)
            lengths = (*PASSAGE_MINUTES[turn:], *PASSAGE_MINUTES[:turn])
            bests = (max(_stretches(story, taken[story.id], *length), default=None) for length in lengths)
            best = next((best for best in bests if best), None)
            if best is None or found >= questions:
                continue
            taken[story.id] |= set(best[1])
            found += len(story.asked(set(best[1])))
            items.append(_section_item(story, best[1], voices[len(items) % len(voices)]))
        if found == before:
            break
    return items


def _stretches(story: Story, taken: set[str], low: float, high: float) -> Iterator[tuple[float, list[str]]]:
    numbers = list(story.sections)
    for start in range(len(numbers)):
        for end in range(start + 1, len(numbers) + 1):
            stretch = numbers[start:end]
            minutes = sum(len(story.sections[n].split()) for n in stretch) / WORDS_A_MINUTE
            if minutes > high or taken.intersection(stretch):
                break
            asked = len(story.asked(set(stretch)))
            if minutes >= low and asked:
                yield asked / minutes, stretch


def plan(texts: str | Path, kokoro_hours: float, quick_hours: float) -> list[Item]:
    """Returns all recordings of the corpus in the order in which they are made.

    First about `EARLY_HOURS` of training speech, then the sets for validation and tests, then the rest. Kokoro's
    voices read the questioned sections from the first on, the quick ones from the last.
    """
    stories = read_stories(texts)
    by_split = {split: [s for s in stories if s.split == split] for split in ("train", "val", "test")}
    addresses = read_addresses(texts)
    sections = section_items(by_split["train"], TRAIN_VOICES)
    clips = clip_items(by_split["train"], addresses, TRAIN_VOICES)
    training = []
    for i, section in enumerate(sections):
        training += [section, *clips[i * CLIPS_BETWEEN : (i + 1) * CLIPS_BETWEEN]]
    natural = _take(training, kokoro_hours)
    early = len(_take(natural, EARLY_HOURS))
    passages = passage_items(by_split["test"], TEST_VOICES, TEST_QUESTIONS)
    heard = {(item.story, number) for item in passages for number in item.sections}
    rest = [
        Story(s.id, s.split, {n: t for n, t in s.sections.items() if (s.id, n) not in heard}, ())
        for s in by_split["test"]
    ]
    held_out = [
        *passage_items(by_split["val"], TRAIN_VOICES, DEV_QUESTIONS),
        *passages,
        *clip_items(rest, [], TEST_VOICES)[:TEST_CLIPS],
    ]
    quick = _quick(by_split["train"], natural, clips, quick_hours)
    return [*natural[:early], *held_out, *natural[early:], *quick]


def _quick(stories: Sequence[Story], natural: Sequence[Item], clips: Sequence[Item], hours: float) -> list[Item]:
    read = {item.id.split("/", 1)[1] for item in natural}
    sections = [item for item in section_items(stories, QUICK_VOICES)[::-1] if item.id.split("/", 1)[1] not in read]
    said = {item.sentences for item in natural}
    sentences = [clip for clip in clips[::-1] if clip.sentences not in said]
    items = []
    for i, section in enumerate(sections):
        own = sentences[i * QUICK_CLIPS_BETWEEN : (i + 1) * QUICK_CLIPS_BETWEEN]
        items += [
            section,
            *(replace(c, voice=QUICK_VOICES[(i + j) % len(QUICK_VOICES)]) for j, c in enumerate(own, 5)),
        ]
    return [
        replace(
            item,
            id="quick/" + item.id.split("/", 1)[1],
            source=f"{item.source.partition('/')[0]}/{item.voice.engine}",
        )
        for item in _take(items, hours)
    ]


def _take(items: Sequence[Item], hours: float) -> list[Item]:
    minutes = np.cumsum([item.minutes for item in items])
    return list(items[: int(np.searchsorted(minutes, hours * 60))])


def made_row(item: Item, output: Path) -> dict | None:
    """Returns the row of a recording that is there with the same words and voice, else None."""
    described = output / f"{item.id}.json"
    if not described.exists():
        return None
    row = json.loads(described.read_text(encoding="utf-8"))
    return row if (row["text"], row["speaker"]) == (" ".join(item.sentences), item.voice.id) else None


def make(item: Item, output: Path, kokoro: str | None) -> dict:
    """Makes one recording, with its row beside it, unless it is there; returns the row."""
    row = made_row(item, output)
    if row is not None:
        return row
    audio, described = output / f"{item.id}.opus", output / f"{item.id}.json"
    described.unlink(missing_ok=True)  # of other words under this name
    rng = random.Random(item.seed)
    speed = rng.uniform(0.9, 1.2)
    speak = speaker(item.voice.engine, kokoro)
    parts, at = [], 0
    segments: list[dict] = []
    for sentence in item.sentences:
        pause = np.zeros(int(rng.uniform(0.15, 0.5) * SAMPLING_RATE), np.float32)
        spoken = speak(sentence, item.voice, speed)
        at += len(pause)
        segments.append({"start": at / SAMPLING_RATE, "end": (at + len(spoken)) / SAMPLING_RATE, "text": sentence})
        at += len(spoken)
        parts += [pause, spoken]
    samples = np.concatenate([*parts, np.zeros(int(0.2 * SAMPLING_RATE), np.float32)])
    samples *= rng.uniform(0.3, 0.9) / max(float(np.abs(samples).max()), 1e-3)
    row = {
        "audio": f"{item.id}.opus",
        "text": " ".join(item.sentences),
        "duration": round(len(samples) / SAMPLING_RATE, 3),
        "speaker": item.voice.id,
        "gender": item.voice.gender,
        "source": item.source,
        "split": item.split,
    }
    if item.story is not None:
        row |= {"story": item.story, "sections": list(item.sections)}
    if len(segments) > 1:
        row["segments"] = [s | {k: round(s[k], 3) for k in ("start", "end")} for s in segments]
    _write_opus(audio, samples)
    write_atomically(described, json.dumps(row, ensure_ascii=False) + "\n")
    return row


def _write_opus(path: Path, samples: np.ndarray) -> None:
    # libsndfile takes Opus's bit rate as a place between 256 (0.0) and 6 kbit/s (1.0)
    level = (256_000 - BITRATE) / 250_000
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with soundfile.SoundFile(
        unfinished, "w", SAMPLING_RATE, 1, format="OGG", subtype="OPUS", compression_level=level
    ) as file:
        file.write(samples)
    unfinished.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is never seen half written."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def human_questions(speech: Path, output: Path) -> list[dict]:
    """Returns the rows of our questions about recordings of people, and cuts or joins these recordings.

    A row's `passage` is what is said in its recording, `said` the second at which the sentence begins that answers.
    """
    manifests = [speech / name for name in ("test.jsonl", "test_long.jsonl")]
    lines = [line for path in manifests for line in path.read_text(encoding="utf-8").splitlines()]
    spoken = {row["audio"]: row for row in map(json.loads, lines)}
    rows = []
    for line in HUMAN_QUESTIONS.read_text(encoding="utf-8").splitlines():
        recording = json.loads(line)
        questions, start, end = recording.pop("questions"), recording.pop("start", 0), recording.pop("end", None)
        clips = recording.pop("clips", None) or [recording["audio"]]
        recording["audio"] = f"human/{recording['recording']}.opus"
        if not (output / recording["audio"]).exists():
            read = [soundfile.read(speech / clip, dtype="float32") for clip in clips]
            rate = read[0][1]
            whole = np.concatenate([samples for samples, _ in read])
            _write_opus(output / recording["audio"], whole[round(start * rate) : end and round(end * rate)])
        segments = [segment for clip in clips for segment in spoken[clip].get("segments", [spoken[clip]])]
        said = [s for s in segments if end is None or (s["start"] >= start - 0.01 and s["end"] <= end + 0.01)]
        recording["passage"] = " ".join(as_written(segment["text"]) for segment in said)
        about = recording | {"task": "question", "source": "human", "split": "test"}
        rows += [about | question | {"answer": question["answers"][0]} for question in questions]
    return rows


def write_manifests(items: Sequence[Item], output: Path, speech: Path | None, texts: Path) -> None:
    """Writes `SPLIT.jsonl`, `tasks-SPLIT.jsonl` and `tasks-human.jsonl` of the recordings of a plan that are there."""
    stories = read_stories(texts)
    there = [row for row in (made_row(item, output) for item in items) if row is not None]
    low, high = PASSAGE_SECONDS
    made = [r for r in there if r["split"] == "train" or "story" not in r or low <= r["duration"] <= high]
    for split, rows in speech_rows([*made, *([] if speech is None else human_rows(speech, output))]).items():
        for name, found in ((split, rows), (f"tasks-{split}", task_rows(rows, stories))):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            write_atomically(output / f"{name}.jsonl", "".join(lines))
    if speech is not None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in human_questions(speech, output))
        write_atomically(output / "tasks-human.jsonl", "".join(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the corpus")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts to read")
    parser.add_argument("--speech", type=Path, help="folder of human speech with train.jsonl and train_long.jsonl")
    parser.add_argument("--hours", type=float, default=15.0, help="of training speech by Kokoro's voices")
    parser.add_argument("--quick-hours", type=float, default=24.0, help="of training speech by quicker voices")
    parser.add_argument("--kokoro", help="folder or Hub id of Kokoro-82M; default: from packages, see voices.py")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--only", default="", help="make only recordings whose id begins so; none: only manifests")
    options = parser.parse_args(arguments)
    whole = plan(options.texts, options.hours, options.quick_hours)
    items = [item for item in whole if item.id.startswith(options.only)]
    needed = any(item.voice.engine == "kokoro" for item in items)
    kokoro = str(find_kokoro(options.kokoro, options.output / "kokoro-model")) if needed else None
    seconds = 0.0
    with ProcessPoolExecutor(options.workers) as pool:
        work = pool.map(partial(make, output=options.output, kokoro=kokoro), items)
        for row in tqdm(work, total=len(items), unit="recording"):
            seconds += row["duration"]
    write_manifests(whole, options.output, options.speech, options.texts)
    print(f"{len(items)} recordings, {seconds / 3600:.2f} hours, all manifests in {options.output}")


if __name__ == "__main__":
    main()
