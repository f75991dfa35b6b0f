"""Prints the held-out figures of the demo model: CTC word errors, and exact answers beside two baselines.

    python -m fastlongspeech.demo.heldout checkpoints/fastlongspeech-demo work/corpus --output work/heldout.json

Answers are greedy. The baselines: "no audio" asks the same questions without the recording, "wrong recording" with the
next recording of the split. An answer is right if it equals the reference after Whisper's English normaliser.
Questions about the voice are counted apart.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jiwer
import torch
import transformers
from tqdm import tqdm

from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..evaluation.answering import answer_batch
from ..evaluation.scoring import whisper_normalizer

# split, and the target lengths its questions are asked at (None: every frame).
CONDITIONS: tuple[tuple[str, tuple[int | None, ...]], ...] = (
    ("test", (None, 400, 200, 100)),
    ("unheard", (None, 200)),
    ("long", (750,)),
)


@dataclass
class Recording:
    """One recording of a split: its embeddings per target length and the questions about it."""

    questions: list[dict]
    embeddings: dict[int | None, torch.Tensor]


class Evaluator:
    """Asks the questions of one model."""

    def __init__(self, folder: str, device: str) -> None:
        self.processor = FastLongSpeechProcessor.from_pretrained(folder)
        self.model = FastLongSpeechForConditionalGeneration.from_pretrained(folder, device_map=device)
        self.normalize = whisper_normalizer()

    @torch.inference_mode()
    def read(self, folder: Path, lengths: tuple[int | None, ...], limit: int | None) -> tuple[list[Recording], float]:
        """Returns the recordings of a split and the word error rate of their CTC transcription."""
        rows = [json.loads(line) for line in (folder / "recordings.jsonl").read_text().splitlines()][:limit]
        recordings, references, transcripts = [], [], []
        for row in tqdm(rows, desc=f"{folder.name}: listening"):
            inputs = self.processor(audio=folder / row["audio"]).to(self.model.device)
            encoded = self.model.encode(**inputs)
            embeddings = {
                length: self.model.compress(encoded, length, "none" if length is None else None).pooler_output
                for length in lengths
            }
            recordings.append(Recording(row["questions"], embeddings))
            references.append(self.normalize(row["text"]))
            transcripts.append(
                self.normalize(self.processor.ctc_decode(self.model.ctc_transcribe(recordings=encoded))[0])
            )
        return recordings, jiwer.wer(references, transcripts)

    @torch.inference_mode()
    def answers_to(self, questions: list[str], embeddings: torch.Tensor | None) -> list[str]:
        """Returns the answers to questions about one recording, given as embeddings (frames, hidden), or none."""
        answers = answer_batch(self.model, self.processor, questions, [embeddings] * len(questions), max_new_tokens=12)
        return [answer.text for answer in answers]

    def score(self, recordings: list[Recording], length: int | None, condition: str) -> tuple[dict, list[dict]]:
        """Returns the share of exact answers, facts and voice apart, and every answer."""
        right: dict[str, list[bool]] = defaultdict(list)
        answers = []
        for index, recording in enumerate(tqdm(recordings, desc=f"asking, {condition}, L = {length or 'all'}")):
            heard: Recording | None = recording
            if condition != "the recording":
                heard = recordings[(index + 1) % len(recordings)] if condition == "wrong recording" else None
            questions = [question["question"] for question in recording.questions]
            replies = self.answers_to(questions, None if heard is None else heard.embeddings[length])
            for question, reply in zip(recording.questions, replies, strict=True):
                exact = self.normalize(reply) == self.normalize(question["answer"])
                right[question["kind"]].append(exact)
                if question["kind"] != "voice":
                    right["facts"].append(exact)
                answers.append({**question, "reply": reply, "exact": exact, "recording": index})
        scores = {kind: {"exact": sum(hits) / len(hits), "questions": len(hits)} for kind, hits in right.items()}
        return scores, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("corpus", type=Path, help="folder written by fastlongspeech.demo.corpus")
    parser.add_argument("--output", type=Path, help="JSON file for the figures and every answer")
    parser.add_argument("--limit", type=int, help="this many recordings per split, for a quick look")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    evaluator = Evaluator(arguments.model, arguments.device)
    results: list[dict] = []
    error_rates: dict[str, float] = {}
    answers: list[dict] = []
    for split, lengths in CONDITIONS:
        recordings, error_rates[split] = evaluator.read(arguments.corpus / split, lengths, arguments.limit)
        asked = [(length, "the recording") for length in lengths]
        asked += [(length, "wrong recording") for length in lengths if length not in (400, 100)]
        asked.append((lengths[0], "no audio"))
        for length, condition in asked:
            scores, replies = evaluator.score(recordings, length, condition)
            results.append({"split": split, "target_length": length, "condition": condition, **scores})
            answers += [{"split": split, "target_length": length, "condition": condition, **row} for row in replies]

    print(f"\n{'split':<9} {'L':>5}  {'heard':<16} {'facts':>6} {'(asked)':>8} {'voice':>6} {'(asked)':>8}")
    for row in results:
        facts, voice = row["facts"], row["voice"]
        print(
            f"{row['split']:<9} {row['target_length'] or 'all':>5}  {row['condition']:<16} {facts['exact']:>6.1%} "
            f"{facts['questions']:>8} {voice['exact']:>6.1%} {voice['questions']:>8}"
        )
    for split, rate in error_rates.items():
        print(f"CTC transcription, {split}: {rate:.1%} word errors")
    if arguments.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        summary = {"word_error_rates": error_rates, "exact_answers": results, "versions": versions}
        arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
        lines = "".join(json.dumps(row) + "\n" for row in answers)
        arguments.output.with_suffix(".answers.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
