"""The small model's corpus: splits never mix, what is made is kept, and the manifests' form."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import soundfile

from fastlongspeech.small import corpus, tasks, texts, voices

WORDS = "the old miller gave a golden ring to his daughter before she crossed the river".split()


def sentence(number: int) -> str:
    """A sentence of its own for every number, long enough to stand as a clip."""
    words = random.Random(number).choices(WORDS, k=9)
    return " ".join(words).capitalize() + " and then they all went home."


def story(name: str, split: str, first: int) -> dict:
    sections = {str(n + 1): " ".join(sentence(first + 20 * n + k) for k in range(20)) for n in range(4)}
    asked = [("1", "explicit"), ("2", "explicit"), ("2,3", "explicit"), ("3", "implicit")]
    qa = [
        {"question": f"{name} {s}?", "answers": ["the ring"], "sections": s, "attribute": "action", "ex_or_im": kind}
        for s, kind in asked
    ]
    return {"id": name, "split": split, "sections": sections, "qa": qa}


@pytest.fixture
def folder(tmp_path):
    """A folder of texts: two stories of a split, one address."""
    stories = [story(f"{s}{i}", s, 100 * (2 * k + i)) for k, s in enumerate(("train", "val", "test")) for i in (0, 1)]
    (tmp_path / "fairytaleqa.jsonl").write_text("".join(json.dumps(s) + "\n" for s in stories))
    (tmp_path / "state_of_the_union").mkdir()
    lines = ["ADDRESS", "In 1945 we spent much more than that.", *(sentence(k) for k in range(700, 760))]
    (tmp_path / "state_of_the_union" / "1945-Nobody.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def human(tmp_path):
    """A folder of human speech: manifests of recordings that nothing reads, and short clips to be joined."""
    speech = tmp_path / "speech"
    speech.mkdir()
    long = {
        "audio": "librispeech_long/19-198.opus",
        "text": "NORTHANGER ABBEY THIS LITTLE WORK",
        "speaker": "librispeech_long/19",
        "seconds": 4.0,
        "gender": "f",
        "segments": [{"start": 0, "end": 2.0, "text": "NORTHANGER ABBEY"}],
    }
    asked = [json.loads(line) for line in corpus.HUMAN_QUESTIONS.open()]
    tests = []
    for recording in asked:
        for number, clip in enumerate(recording.get("clips", [])):
            (speech / clip).parent.mkdir(exist_ok=True)
            with soundfile.SoundFile(speech / clip, "w", 16_000, 1, format="OGG", subtype="OPUS") as file:
                file.write(np.full(1600, 0.01 * number))
            tests.append({"audio": clip, "text": f"CLIP {number}"})
    parts = [(r["audio"], r["start"], r["end"]) for r in asked if "start" in r]
    chapters = []
    for chapter in sorted({chapter for chapter, _, _ in parts}):
        (speech / chapter).parent.mkdir(exist_ok=True)
        silence = np.zeros(round(16_000 * max(end for name, _, end in parts if name == chapter)), "int16")
        with soundfile.SoundFile(speech / chapter, "w", 16_000, 1, format="WAV", subtype="PCM_16") as file:
            file.write(silence)  # libsndfile goes by what a file holds, not by its name
        cuts = [(start, end) for name, start, end in parts if name == chapter]
        halves = [half for start, end in cuts for half in ((start, start + 9), (start + 9, end))]
        segments = [{"start": start, "end": end, "text": f"FROM {start:g}"} for start, end in halves]
        chapters.append({"audio": chapter, "text": "ALL OF IT", "segments": segments})
    for name, rows in (("test", tests), ("test_long", chapters)):
        (speech / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = [
        {"audio": "librispeech_samples/19-198-0000.opus", "text": "NORTHANGER ABBEY", "speaker": "x", "seconds": 2.0},
        {"audio": "commonvoice_rit/a.opus", "text": "He didn't.", "speaker": "c/1", "seconds": 1.0, "gender": "male"},
    ]
    for k in range(200):
        child = {"speaker": f"s/{k // 2}", "gender": "m", "age": 9 if k < 100 else 30}
        clips.append({"audio": f"speechocean762/{k}.opus", "text": "GOOD MORNING", "seconds": 1.5, **child})
    (speech / "train_long.jsonl").write_text(json.dumps(long) + "\n")
    (speech / "train.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clips))
    return speech


def quick(items, count=4):
    """The first recordings as flite says them, whoever was to say them."""
    return [corpus.replace(item, voice=voices.Voice("flite", "kal16", "m")) for item in items[:count]]


def test_no_story_sentence_or_voice_is_in_two_splits(folder):
    items = corpus.plan(folder, 5, 5)
    stories = {s.id: s for s in texts.read_stories(folder)}
    assert {item.split for item in items} == {"train", "val", "test"}
    for item in items:
        if item.story:
            assert stories[item.story].split == item.split
    said = {split: {s for i in items if i.split == split for s in i.sentences} for split in ("train", "val", "test")}
    assert not said["train"] & said["test"] and not said["train"] & said["val"] and not said["val"] & said["test"]
    heard = {split: {i.voice for i in items if i.split == split} for split in ("train", "test")}
    assert not heard["train"] & heard["test"]
    assert {v.gender + v.accent for v in voices.TEST_VOICES} == {"mus", "fus", "mgb", "fgb"}
    assert len({v.name for v in (*voices.TRAIN_VOICES, *voices.TEST_VOICES)}) == 28


def test_no_text_is_read_by_two_engines_nor_twice(folder):
    items = corpus.plan(folder, 0.03, 5)
    train = [item for item in items if item.split == "train"]
    assert {item.voice.engine for item in train} > {"kokoro", "flite"}
    assert len({item.id for item in items}) == len(items)
    assert len({item.sentences for item in train}) == len(train)


def test_evaluation_comes_after_the_first_hours_and_before_the_rest(folder, monkeypatch):
    monkeypatch.setattr(corpus, "EARLY_HOURS", 0.1)
    order = [item.split for item in corpus.plan(folder, 1, 1)]
    assert [split for split, _ in itertools.groupby(order)] == ["train", "val", "test", "train"]


def test_passages_are_consecutive_sections_of_1_to_5_minutes_whose_questions_they_answer(folder):
    stories = [s for s in texts.read_stories(folder) if s.split == "test"]
    items = corpus.passage_items(stories, voices.TEST_VOICES, questions=4)
    for item in items:
        assert 1 <= item.minutes <= 5
        assert list(item.sections) == [str(n) for n in range(int(item.sections[0]), int(item.sections[-1]) + 1)]
    found = [stories[int(i.story[-1])].asked(set(i.sections)) for i in items]
    assert sum(map(len, found)) >= 4
    assert all(
        q.explicit and set(q.sections) <= set(i.sections) for i, some in zip(items, found, strict=True) for q in some
    )


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_a_recording_has_its_duration_and_the_times_of_its_sentences(folder, tmp_path):
    item = quick(corpus.plan(folder, 1, 0))[0]
    row = corpus.make(item, tmp_path / "out", None)
    samples, rate = soundfile.read(tmp_path / "out" / row["audio"])
    assert rate == 16_000 and abs(len(samples) / rate - row["duration"]) < 0.01
    assert [s["text"] for s in row["segments"]] == list(item.sentences)
    loudness = [np.abs(samples[int(s["start"] * rate) : int(s["end"] * rate)]).mean() for s in row["segments"]]
    between = [
        np.abs(samples[int(a["end"] * rate) + 200 : int(b["start"] * rate) - 200]).mean()
        for a, b in itertools.pairwise(row["segments"])
    ]
    assert max(between) < min(loudness) / 10  # it speaks within the times and pauses between them


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_what_exists_is_kept_and_the_rest_is_made_as_in_one_run(folder, tmp_path):
    items = quick(corpus.plan(folder, 1, 0), 3)
    at_once = [corpus.make(item, tmp_path / "a", None) for item in items]
    corpus.make(items[0], tmp_path / "b", None)
    before = (tmp_path / "b" / at_once[0]["audio"]).stat().st_mtime_ns
    (tmp_path / "b" / f"{items[1].id}.opus").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "b" / f"{items[1].id}.opus").write_bytes(b"half")  # stopped while it was written: it has no row
    resumed = [corpus.make(item, tmp_path / "b", None) for item in items]
    assert resumed == at_once
    assert (tmp_path / "b" / at_once[0]["audio"]).stat().st_mtime_ns == before
    for row in at_once:
        one, two = (soundfile.read(tmp_path / run / row["audio"])[0] for run in "ab")
        assert np.array_equal(one, two)


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_other_words_under_an_old_name_are_spoken_anew(folder, tmp_path):
    item = quick(corpus.plan(folder, 1, 0), 1)[0]
    corpus.make(item, tmp_path / "out", None)
    other = corpus.replace(item, sentences=("Something else is said here.",))
    assert corpus.made_row(other, tmp_path / "out") is None
    assert corpus.make(other, tmp_path / "out", None)["text"] == "Something else is said here."
    assert corpus.made_row(item, tmp_path / "out") is None


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_held_out_passages_are_of_1_to_5_minutes(folder, tmp_path):
    items = quick([i for i in corpus.plan(folder, 1, 0) if i.split == "test" and i.sections], 2)
    short = corpus.replace(items[0], sentences=items[0].sentences[:2])
    whole = corpus.make(items[1], tmp_path / "out", None)
    assert 60 <= whole["duration"] <= 300 and corpus.make(short, tmp_path / "out", None)["duration"] < 60
    corpus.write_manifests([short, items[1]], tmp_path / "out", None, folder)
    assert [json.loads(x)["audio"] for x in (tmp_path / "out" / "test.jsonl").open()] == [whole["audio"]]


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_manifests_have_every_recording_once_under_its_split(folder, human, tmp_path):
    output = tmp_path / "out"
    items = corpus.plan(folder, 1, 0)
    chosen = [next(i for i in items if i.split == s and i.sections) for s in ("train", "val", "test")]
    spoken = quick(chosen, 3)
    for item in spoken:
        corpus.make(item, output, None)
    corpus.write_manifests(spoken, output, human, folder)
    rows = {s: [json.loads(x) for x in (output / f"{s}.jsonl").open()] for s in ("train", "val", "test")}
    assert [row["split"] for s in rows for row in rows[s]] == [s for s in rows for _ in rows[s]]
    everything = [row for s in rows for row in rows[s]]
    assert len({row["audio"] for row in everything}) == len(everything) == 3 + 202
    assert {row["source"] for row in rows["test"]} == {"fairytaleqa/kokoro"}  # nothing human, nothing of training
    speakers = {s: {r["speaker"] for r in rows[s] if r["source"] == "speechocean762"} for s in ("train", "val")}
    assert speakers["val"] and not speakers["train"] & speakers["val"]
    for row in everything:
        keys = {"audio", "text", "labels", "duration", "speaker", "gender", "source", "split"}
        assert keys <= set(row) and set(row["labels"]) <= set("abcdefghijklmnopqrstuvwxyz' ")


def test_human_rows_point_at_the_recordings_and_leave_no_capitals(human, tmp_path):
    rows = {row["audio"]: row for row in tasks.human_rows(human, tmp_path / "out")}
    assert "../speech/librispeech_samples/19-198-0000.opus" not in rows  # it is in the long one
    long = rows["../speech/librispeech_long/19-198.opus"]
    assert long["text"] == "northanger abbey this little work"
    assert long["segments"] == [{"start": 0, "end": 2.0, "text": "northanger abbey"}]
    assert rows["../speech/commonvoice_rit/a.opus"]["text"] == "He didn't."
    assert rows["../speech/commonvoice_rit/a.opus"]["gender"] == "m"
    assert rows["../speech/speechocean762/0.opus"]["gender"] == ""  # a child's
    assert rows["../speech/speechocean762/199.opus"]["gender"] == "m"


def test_tasks_ask_what_is_answered_and_say_what_is_not(folder):
    stories = texts.read_stories(folder)
    row = {"duration": 60.0, "speaker": "v", "gender": "f", "source": "s", "split": "train"}
    passage = row | {"audio": "p.opus", "text": "...", "story": "train0", "sections": ["2", "3"]}
    clips = [row | {"audio": f"{k}.opus", "text": "A clip.", "duration": 3.0} for k in range(200)]
    found = list(tasks.task_rows([passage, *clips], stories))
    about = [r for r in found if r.get("audio") == "p.opus" and r["task"] != "gender"]
    assert [(r["task"], r["question"]) for r in about[:-1]] == [("question", "train0 2?"), ("question", "train0 2,3?")]
    assert about[-1]["task"] == "not_said" and about[-1]["answer"] == tasks.NOT_SAID
    assert about[-1]["question"].startswith("train1")  # another story of the same split
    assert [r["question"] for r in found if r["task"] == "text"] == ["train0 2?", "train0 2,3?"]
    said = [r for r in found if r["task"] in ("transcribe", "repeat")]
    assert len(said) == 200 and all(r["answer"] == "A clip." for r in said)
    assert len({r["question"] for r in said}) > 30
    assert {r["answer"] for r in found if r["task"] == "gender"} == {"A woman."}
    assert found == list(tasks.task_rows([passage, *clips], stories))


def test_a_long_recording_is_transcribed_in_parts_of_whole_sentences(folder):
    segments = [{"start": 7.0 * k + 0.5, "end": 7.0 * k + 7.0, "text": f"Number {k}."} for k in range(40)]
    row = {"audio": "a", "duration": 281.0, "speaker": "v", "gender": "", "source": "s", "split": "train"}
    found = list(tasks.task_rows([row | {"text": "...", "segments": segments}], texts.read_stories(folder)))
    assert " ".join(r["answer"] for r in found) == " ".join(s["text"] for s in segments)  # all of it, once, in order
    for part in found:
        inside = [s["text"] for s in segments if part["start"] <= s["start"] and s["end"] <= part["end"]]
        assert part["answer"] == " ".join(inside) and part["end"] - part["start"] <= 30
    assert len({len(r["answer"]) for r in found}) > 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("“Mr. O'Neill,” she said—‘come!’", "mister o'neill she said come"),
        ("Sleigh-bells & the boys' whips;", "sleigh bells and the boys whips"),
        ("THERE'S  IRON", "there's iron"),
    ],
)
def test_labels_are_plain_words(text, wanted):
    assert texts.labels(text) == wanted


def test_labels_refuse_digits():
    with pytest.raises(ValueError, match="1945"):
        texts.labels("In 1945.")


def test_sentences_join_to_the_text_and_are_neither_short_nor_long():
    text = texts.clean(
        '"Who?" said he. No. ' + "word " * 100 + "; and " + "more, " * 60 + "end.\nA last sentence, it is."
    )
    pieces = texts.split_sentences(text)
    assert " ".join(pieces) == text
    assert all(len(piece) <= texts.LONGEST_SENTENCE for piece in pieces)


def test_addresses_are_sentences_that_are_said_as_they_are_written(folder):
    assert set(texts.read_addresses(folder)) == {sentence(k) for k in range(700, 760)}


def test_questions_about_sections_with_and_without_spaces(tmp_path):
    asked = story("a", "train", 0)
    asked["qa"][2]["sections"] = "2 , 3"
    (tmp_path / "fairytaleqa.jsonl").write_text(json.dumps(asked) + "\n")
    assert [q.question for q in texts.read_stories(tmp_path)[0].asked({"2", "3"})] == ["a 2?", "a 2,3?"]


def test_kokoro_without_its_folder_is_refused():
    with pytest.raises(ValueError, match="find_kokoro"):
        voices.speaker("kokoro", None)


def test_questions_about_people_are_short_ours_and_within_the_recording():
    recordings = [json.loads(line) for line in corpus.HUMAN_QUESTIONS.open()]
    assert sum(len(r["questions"]) for r in recordings) >= 60
    for recording in recordings:
        assert 60 <= recording["duration"] <= 600 and recording["licence"]
        assert ("clips" in recording) != ("audio" in recording)
        if "start" in recording:
            assert recording["end"] - recording["start"] == pytest.approx(recording["duration"], abs=0.01)
        for question in recording["questions"]:
            assert question["question"].endswith("?") and 0 <= question["said"] < recording["duration"]
            assert all(1 <= len(texts.labels(answer).split()) <= 6 for answer in question["answers"])


def test_recordings_of_people_are_joined_or_cut_and_carry_what_is_said(human, tmp_path):
    rows = {row["recording"]: row for row in corpus.human_questions(human, tmp_path / "out")}
    seconds = {name: soundfile.info(tmp_path / "out" / row["audio"]).duration for name, row in rows.items()}
    assert abs(seconds["printing"] - 32 * 0.1) < 0.01  # 32 clips of a tenth of a second
    assert rows["printing"]["passage"].startswith("clip 0 clip 1 clip 2 ")
    assert abs(seconds["plague-b"] - rows["plague-b"]["duration"]) < 0.01
    assert rows["plague-b"]["passage"] == "from 124.72 from 133.72"
    assert all(r["answer"] == r["answers"][0] and r["split"] == "test" for r in rows.values())
