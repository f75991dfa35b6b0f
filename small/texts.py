"""The texts of the corpus: stories with questions, addresses, their sentences, and the form of CTC labels."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

LONGEST_SENTENCE = 300  # characters: well within the 510 phonemes that Kokoro reads at once
SHORTEST_SENTENCE = 25  # shorter ones are read together with the next
QUOTES = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "–": "-", "—": "-", "\u00a0": " "})
# Abbreviations in the stories, as the voices say them.
SPOKEN = {r"\bmr\b\.?": "mister", r"\bmrs\b\.?": "missus", r"\bdr\b\.?": "doctor", "&": " and "}


@dataclass(frozen=True)
class Question:
    """One question about a story: ``sections`` are the numbers of the sections that answer it."""

    question: str
    answers: tuple[str, ...]
    sections: tuple[str, ...]
    explicit: bool


@dataclass(frozen=True)
class Story:
    """One story of FairytaleQA with its ``sections`` (number to text) in order."""

    id: str
    split: str
    sections: dict[str, str]
    questions: tuple[Question, ...]

    def asked(self, numbers: set[str] | frozenset[str]) -> list[Question]:
        """Returns the explicit questions that sections answer among themselves."""
        return [q for q in self.questions if q.explicit and numbers.issuperset(q.sections)]


def read_stories(texts: str | Path) -> list[Story]:
    """Returns the stories of `fairytaleqa.jsonl` in a folder, in the file's order."""
    stories = []
    for line in (Path(texts) / "fairytaleqa.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        questions = tuple(
            Question(
                clean(qa["question"]),
                tuple(clean(answer) for answer in qa["answers"]),
                tuple(re.split(r"\s*,\s*", qa["sections"].strip())),
                qa["ex_or_im"] == "explicit",
            )
            for qa in row["qa"]
        )
        sections = {number: clean(text) for number, text in row["sections"].items()}
        stories.append(Story(row["id"], row["split"], sections, questions))
    return stories


def read_addresses(texts: str | Path) -> list[str]:
    """Returns sentences of the addresses in `state_of_the_union/` that a voice reads as they are written.

    Headings, short remarks and whatever has digits, signs or abbreviations are left out: how a voice says them is
    not written down.
    """
    found = []
    for file in sorted((Path(texts) / "state_of_the_union").glob("*.txt")):
        for paragraph in file.read_text(encoding="utf-8", errors="replace").splitlines():
            found += [sentence for sentence in split_sentences(paragraph) if _is_plain(sentence)]
    return found


def _is_plain(sentence: str) -> bool:
    if re.search(r"[^A-Za-z ,.;:!?'\"-]|\b[A-Z]{2,}|\b(?:Mr|Mrs|Dr|St|No)\.|[A-Z]\.", sentence):
        return False
    return 40 <= len(sentence) <= 230 and sentence[-1] in ".!?"


def clean(text: str) -> str:
    """Returns a text with plain quotes and dashes and single spaces."""
    return " ".join(text.translate(QUOTES).replace("--", " - ").replace("_", " ").split())


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text, joined by spaces the text itself.

    Very short ones stay with the next; very long ones are parted after a semicolon, a comma or a word.
    """
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+", clean(text)):
        if pieces and len(pieces[-1]) < SHORTEST_SENTENCE:
            pieces[-1] += " " + sentence
        else:
            pieces.append(sentence)
    return [part for piece in pieces for part in _part(piece) if part]


def _part(sentence: str) -> list[str]:
    parts = []
    while len(sentence) > LONGEST_SENTENCE:
        head = sentence[:LONGEST_SENTENCE]
        cut = max(head.rfind("; "), head.rfind(": "), head.rfind(", "))
        cut = cut + 1 if cut > LONGEST_SENTENCE // 4 else head.rfind(" ")
        parts.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [*parts, sentence]


def labels(text: str) -> str:
    """Returns the one form of text that CTC labels have: lower case letters, apostrophes in words, single spaces.

    Raises:
        ValueError: the text has digits, of which nobody knows how they were said.
    """
    plain = unicodedata.normalize("NFKD", clean(text)).encode("ascii", "ignore").decode().lower()
    for written, said in SPOKEN.items():
        plain = re.sub(written, said, plain)
    if re.search(r"\d", plain):
        raise ValueError(f"digits in {text!r}: write how they are said")
    return " ".join(re.sub(r"(?<![a-z])'|'(?![a-z])|[^a-z' ]", " ", plain).split())
