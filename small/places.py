"""Whether the seconds that an answer is said to lean on are those where it is said: by words, and by attention.

    python -m fastlongspeech.small.places --speech FOLDER --model MODEL

The questions are those about recordings of people, `human_questions.jsonl`; which sentence answers each is known. A
place is right if it begins no more than 5 s before that sentence or after it. Each way is asked with the model's own
answer, also where that is wrong, and with the right one. Ways: `words`, what `ask` shows (`app/places.py`);
`words of the answer` alone; `attention`, the frames that the language model attends to most while it answers, summed
over all heads; `attention, later half`, over those of the later half of its layers.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import load_recording
from ..app.markdown import insert_blocks, table
from ..app.places import find_place
from ..app.session import Heard, Session
from ..app.words import ctc_words
from ..evaluation.journal import Journal, begin_journal
from ..evaluation.scoring import token_f1
from ..prompts_fastlongspeech import embed_prompts
from .corpus import HUMAN_QUESTIONS

RATE = 16_000
WITHIN = 5.0  # seconds
GOOD_F1 = 0.5  # an answer that shares as much with a right one is right
SMOOTH = 25  # tokens, about a second of speech: one peak is no place
TARGET_LENGTH = 750
WAYS = ("words", "words of the answer", "attention", "attention, later half")


def recordings(speech: Path) -> list[dict[str, Any]]:
    """Returns recordings of people with `samples`, `questions` and `sentences`, start and end of each in seconds."""
    lines = [line for name in ("test.jsonl", "test_long.jsonl") for line in open(speech / name, encoding="utf-8")]
    spoken = {row["audio"]: row for row in map(json.loads, lines)}
    found = []
    for line in HUMAN_QUESTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        read, sentences, offset = [], [], 0.0
        for clip in row.get("clips") or [row["audio"]]:
            samples = load_recording(str(speech / clip), target_rate=RATE)
            for segment in spoken[clip].get("segments") or [{"start": 0.0, "end": len(samples) / RATE}]:
                sentences.append((offset + segment["start"], offset + segment["end"]))
            read.append(samples)
            offset += len(samples) / RATE
        start, end = row.get("start", 0.0), row.get("end") or offset
        samples = np.concatenate(read)[round(start * RATE) : round(end * RATE)]
        moved = [(first - start, last - start) for first, last in sentences]
        found.append({"name": row["recording"], "samples": samples, "questions": row["questions"], "sentences": moved})
    return found


@torch.no_grad()
def attended(session: Session, heard: Heard, question: str, answer: str) -> dict[str, float]:
    """Returns the second that the language model attends to most while it says an answer, by ways to add up heads."""
    model, processor = session.model, session.processor
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}
    inputs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, recordings=heard.encoded
    )
    audio = model.compress(heard.encoded, TARGET_LENGTH)
    embed = model.get_input_embeddings()
    ids, _, embeddings = embed_prompts(
        embed, model.config.audio_token_id, inputs["input_ids"], inputs["attention_mask"], audio
    )
    said = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
    embeddings = torch.cat((embeddings, embed(said)), dim=1)
    output = model.model.language_model(inputs_embeds=embeddings, output_attentions=True, use_cache=False)
    places = (ids[0] == model.config.audio_token_id).nonzero()[:, 0]
    rows = slice(ids.shape[1] - 1, embeddings.shape[1] - 1)  # the positions that predict the answer
    layers = torch.stack([layer[0, :, rows][:, :, places].sum((0, 1)) for layer in output.attentions]).numpy()
    middle = audio.spans.mean(1).numpy()
    found = {}
    for name, of_layers in (("attention", layers), ("attention, later half", layers[len(layers) // 2 :])):
        smooth = np.convolve(of_layers.sum(0)[1:], np.ones(SMOOTH), mode="same")  # the first frame takes what is left
        found[name] = float(middle[1:][smooth.argmax()])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder with test.jsonl and test_long.jsonl")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--answers", nargs="+", default=["own", "right"], choices=["own", "right"])
    parser.add_argument("--questions", type=int, metavar="N", help="of each recording, the first N (default: all)")
    parser.add_argument("--output", type=Path, help="JSON lines, one for each answer; a run that was stopped goes on")
    parser.add_argument("--page", type=Path, help="page whose block `places` is written anew")
    arguments = parser.parse_args(argv)
    answers, ways = sorted(arguments.answers), [way for way in WAYS if way in arguments.ways]
    begun = {"model": arguments.model, "dtype": arguments.dtype, "ways": ways, "answers": answers}
    rows = begin_journal(arguments.output, begun, arguments.output) if arguments.output else []
    done = {(row["recording"], row["question"], row["answer_of"]) for row in rows}
    journal = Journal(arguments.output) if arguments.output else None
    session = Session(arguments.model, dtype=arguments.dtype, max_new_tokens=40)
    attends = any(way.startswith("attention") for way in ways)
    if attends:
        model: Any = session.model
        model.set_attn_implementation("eager")  # the only one that returns what it attends to
    for recording in tqdm(recordings(arguments.speech)):
        questions = recording["questions"][: arguments.questions]
        wanted = [
            (asked, whose)
            for asked in questions
            for whose in answers
            if (recording["name"], asked["question"], whose) not in done
        ]
        if not wanted:
            continue
        heard = session.listen({"array": recording["samples"], "sampling_rate": RATE})
        words = ctc_words(session.model, session.processor, heard.encoded)
        for asked, whose in tqdm(wanted, leave=False):
            question = asked["question"]
            sentence = next((s for s in recording["sentences"] if s[0] - 0.01 <= asked["said"] < s[1]), None)
            start, end = sentence or (asked["said"], asked["said"])
            right = whose == "right"
            answer = asked["answers"][0] if right else session.ask(heard, question, TARGET_LENGTH).text
            places = attended(session, heard, question, answer) if attends and answer else {}
            for name, of_question in (("words", question), ("words of the answer", "")):
                place = find_place(words, of_question, answer)
                if place is not None:
                    places[name] = place.start
            row = {
                "recording": recording["name"],
                "answer_of": whose,
                "f1": token_f1(answer, asked["answers"]),
                **asked,
            }
            row |= {"places": places, "sentence": [start, end], "given": answer}
            rows.append(row)
            if journal:
                journal.append(row)
    text = describe(rows, ways, arguments)
    print(text)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        blocks = insert_blocks(page, {"places": text}, str(arguments.page), "small/places.py")
        arguments.page.write_text(blocks, encoding="utf-8")


def describe(rows: list[dict[str, Any]], ways: list[str], arguments: argparse.Namespace) -> str:
    """Returns the table of how many places are right, and how it was made."""
    own_rows, right_rows = ([row for row in rows if row["answer_of"] == whose] for whose in ("own", "right"))
    good = [row for row in own_rows if row["f1"] >= GOOD_F1]
    sets = {"the model's answers": own_rows, "those that are right": good, "right answers given": right_rows}
    shown = {name: some for name, some in sets.items() if some}
    lines = []
    for way in ways:
        counts = [sum(is_right(row, way) for row in some) for some in shown.values()]
        lines.append(
            (way, *(f"{n} of {len(s)} ({n / len(s):.0%})" for n, s in zip(counts, shown.values(), strict=True)))
        )
    asked = len({(row["recording"], row["question"]) for row in rows})
    of = len({row["recording"] for row in rows})
    return (
        table(("way", *shown), lines)
        + f"\n\n{asked} questions about {of} recordings of people. An answer "
        + f"is right from a token F1 of {GOOD_F1} on. Made by `python -m fastlongspeech.small.places --speech SPEECH "
        + f"--model MODEL --ways {shlex.join(ways)}`."
    )


def is_right(row: dict[str, Any], way: str) -> bool:
    """Tells whether a way's place lies within `WITHIN` seconds of the sentence that answers the question."""
    start, end = row["sentence"]
    place = row["places"].get(way)
    return place is not None and start - WITHIN <= place <= end + WITHIN


if __name__ == "__main__":
    main()
