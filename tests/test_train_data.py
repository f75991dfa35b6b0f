"""What the training stages read: every bad row is named, steps hold every row, L follows (seed, step)."""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from accelerate.data_loader import BatchSamplerShard
from conftest import CLIP_SECONDS, CLIP_TEXTS, RATE, write_rows
from torch.utils.data import BatchSampler

from fastlongspeech.data.manifests import load_rows
from fastlongspeech.train.batches import CTCCollator, DCTCollator, FrameBatches, StepSampler, draw_target_length

# Rows


def test_a_manifest_names_recordings_from_its_own_folder_and_may_hold_more_than_is_read(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = load_rows(data / "asr.jsonl", ("audio", "text"))
    assert [rows[i] for i in range(len(rows))] == [
        {"audio": str(data / "clips" / f"{i}.wav"), "text": text} for i, text in enumerate(CLIP_TEXTS)
    ]
    assert rows.durations == pytest.approx(CLIP_SECONDS)


def test_a_datasets_folder_gives_the_same_rows(data, tmp_path):
    audio = [str(data / "clips" / f"{i}.wav") for i in range(6)]
    saved = datasets.Dataset.from_dict({"audio": audio, "text": CLIP_TEXTS}).cast_column("audio", datasets.Audio())
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    saved.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source in (tmp_path / "saved", f"{tmp_path / 'splits'}#train", tmp_path / "parquet"):
        rows = load_rows(source, ("audio", "text"))
        assert rows.texts("text") == CLIP_TEXTS and rows.durations == pytest.approx(CLIP_SECONDS)
        encoded = rows[3]["audio"]
        assert (encoded["bytes"] or Path(encoded["path"]).read_bytes()) == Path(audio[3]).read_bytes()
    with pytest.raises(ValueError, match=r"has the splits train, test.*#train"):
        load_rows(tmp_path / "splits", ("audio", "text"))
    with pytest.raises(ValueError, match="has no column question, answer among audio, text"):
        load_rows(tmp_path / "saved", ("audio", "question", "answer"))


def test_every_bad_row_is_named_with_its_line_and_remedy(data, tmp_path):
    good = {"audio": str(data / "clips" / "1.wav"), "text": "a"}
    soundfile.write(tmp_path / "short.wav", np.zeros(600), RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    faults = {
        "{": "is not JSON .*write one object per line",
        "[1]": "holds a list; write an object with audio, text",
        json.dumps({"text": "a"}): "has no 'audio'; it needs audio, text",
        json.dumps({**good, "text": " "}): "has 'text' = ' '; it must be text that is not empty",
        json.dumps({**good, "text": 5}): "has 'text' = 5; it must be text",
        json.dumps({**good, "audio": ["1.wav"]}): "must be the path of one recording",
        json.dumps({**good, "audio": "nowhere.wav"}): "nowhere.wav, which does not exist; correct the path",
        json.dumps({**good, "audio": "broken.wav"}): "can't be read .*convert it to wav or flac",
        json.dumps({**good, "audio": "short.wav"}): "0.037 s; it must last at least 0.04 s",
    }
    manifest = write_rows(tmp_path / "bad.jsonl", [good, "", *faults])
    with pytest.raises(ValueError, match="bad.jsonl has 9 bad rows; correct or remove them") as refusal:
        load_rows(manifest, ("audio", "text"))
    named = str(refusal.value).splitlines()[1:]
    for number, (line, fault) in enumerate(zip(named, faults.values(), strict=True), 3):
        assert re.fullmatch(f"  line {number} .*{fault}.*", line)
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(write_rows(tmp_path / "empty.jsonl", [""]), ("audio", "text"))
    with pytest.raises(FileNotFoundError, match="no manifest, tar file or datasets folder"):
        load_rows(tmp_path / "nothing.jsonl", ("audio", "text"))


def test_a_recording_that_is_cut_off_is_a_bad_row(data, tmp_path):
    (tmp_path / "cut.wav").write_bytes((data / "clips" / "1.wav").read_bytes()[:-600])
    manifest = write_rows(tmp_path / "bad.jsonl", [{"audio": "cut.wav", "text": "a"}])
    with pytest.raises(ValueError, match="line 1 has a recording that can't be read .*cut off: it holds"):
        load_rows(manifest, ("audio", "text"))


# Steps and lengths


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_every_epoch_holds_every_row_and_fills_its_last_step(strategy):
    sampler = StepSampler([float(i % 7) for i in range(22)], 4, 0, lambda: 0, strategy)
    assert len(list(sampler)) == len(sampler) == 24
    epochs = [sampler.steps_of(epoch) for epoch in range(2)]
    for steps in epochs:
        rows = Counter(row for step in steps for row in step)
        assert set(rows) == set(range(22)) and max(rows.values()) <= 2
    assert (epochs[0] == epochs[1]) == (strategy == "sequential")
    assert len(StepSampler([1.0] * 22, 4, 0, lambda: 0, drop_last=True)) == 20


def test_group_by_length_puts_rows_of_like_duration_into_a_step():
    durations = np.random.default_rng(0).uniform(1, 30, 400).tolist()
    steps = StepSampler(durations, 8, 0, lambda: 0, "group_by_length").steps_of(0)
    spreads = [max(durations[row] for row in step) - min(durations[row] for row in step) for step in steps]
    assert max(spreads) < 3


@pytest.mark.parametrize("processes, batch", [(1, 4), (1, 2), (2, 2), (2, 1), (4, 1)])
def test_a_step_has_the_same_rows_however_it_is_divided_and_after_a_resume(processes, batch):
    taken = 0
    sampler = StepSampler([1.0] * 10, 4, 5, lambda: taken)

    def steps() -> list[tuple[int, list[int]]]:
        shards = [BatchSamplerShard(BatchSampler(sampler, batch, False), processes, p) for p in range(processes)]
        pairs = [pair for batches in zip(*map(list, shards), strict=True) for part in batches for pair in part]
        return [(step, sorted(row for s, row in pairs if s == step)) for step in sorted({step for step, _ in pairs})]

    first = [(step, sorted(rows)) for step, rows in enumerate(sampler.steps_of(0))]
    second = [(step, sorted(rows)) for step, rows in enumerate(sampler.steps_of(1), 3)]
    assert steps() == first
    taken = 3
    assert steps() == second
    taken = 4  # resumed within the second epoch: the Trainer skips the batches already seen
    assert steps() == second


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_batches_of_as_many_frames_hold_every_row_and_whole_steps(strategy):
    durations = np.random.default_rng(1).uniform(1, 30, 101).round(2).tolist()
    taken = 0
    batches = FrameBatches(durations, 1500, 4, 0, lambda: taken, strategy)
    first = list(batches)
    assert len(first) == len(batches) and len(first) % 4 == 0
    assert {row for batch in first for _, row in batch} == set(range(101))
    for batch in first:
        assert sum(int(np.ceil(durations[row] * 25)) for _, row in batch) <= 1500
    assert [[step for step, _ in batch][0] for batch in first] == [number // 4 for number in range(len(first))]
    assert max(map(len, first)) > 4  # short ones share a batch
    taken = len(first) // 4
    second = list(batches)
    assert {step for batch in second for step, _ in batch} == {taken + number for number in range(taken)}
    rows = [[[row for _, row in batch] for batch in epoch] for epoch in (first, second)]
    assert (rows[0] == rows[1]) == (strategy == "sequential")
    assert set(map(tuple, rows[0])) == set(map(tuple, rows[1]))  # other batches may fill the last step
    with pytest.raises(ValueError, match="frames_per_batch is 100, but the longest row has 7.. frames; raise it"):
        FrameBatches(durations, 100, 4, 0, lambda: 0)


def test_processes_share_out_the_batches_of_a_step():
    batches = FrameBatches([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 200, 4, 0, lambda: 0)
    whole = list(batches)
    shards = [list(BatchSamplerShard(batches, 2, process, even_batches=False)) for process in range(2)]
    assert [batch for pair in zip(*shards, strict=True) for batch in pair] == whole


def test_lengths_are_uniform_and_a_function_of_seed_and_step():
    lengths = [750, 400, 200, 100, 50, 25, 12]
    draws = [draw_target_length(7, step, lengths) for step in range(7000)]
    assert all(abs(count - 1000) < 4 * (7000 * 1 / 7 * 6 / 7) ** 0.5 for count in Counter(draws).values())
    assert set(draws) == set(lengths)
    assert draws == [draw_target_length(7, step, lengths) for step in range(7000)]
    assert draws != [draw_target_length(8, step, lengths) for step in range(7000)]


def test_the_collator_fuses_a_batch_to_the_length_of_its_step_or_to_the_one_its_rows_carry(data, processor):
    rows = load_rows(data / "qa.jsonl", ("audio", "question", "answer"))
    collate = DCTCollator(processor, [9, 5, 2], seed=3)
    for step in range(5):
        batch = collate([rows[step, 1], rows[step, 2]])
        placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
        assert placeholders == [draw_target_length(3, step, [9, 5, 2])] * 2
        answers = [ids[ids != -100] for ids in batch["labels"]]
        assert processor.tokenizer.batch_decode(answers) == ["dog<|im_end|>", "mat<|im_end|>"]
    fixed = collate([rows.at(7)[1]])
    assert (fixed["input_ids"] == processor.audio_token_id).sum() == 7
    everything = DCTCollator(processor, [9, 5, 2], seed=3, compression="none")([rows.at(7)[1]])
    assert (everything["input_ids"] == processor.audio_token_id).sum() == 25
    prompt = collate.prompt(rows[1])
    assert "Audio 1: <|audio_bos|><|AUDIO|>" in prompt
    assert prompt.endswith("<|audio_eos|>\nWho?<|im_end|>\n<|im_start|>assistant\n")


def test_the_collator_takes_conversations_and_parts_of_recordings(data, processor):
    recording = {"type": "audio", "audio": str(data / "clips" / "5.wav"), "start": 0.2, "end": 0.6}
    asked = {"role": "user", "content": [recording, {"type": "text", "text": "Who?"}]}
    again = {"role": "user", "content": [recording | {"end": 1.0}, {"type": "text", "text": "And here?"}]}
    told = {"role": "assistant", "content": "Anna."}
    chat = {"messages": [asked, told, again], "answer": "Ben.", "step": 0}
    plain = {"audio": recording["audio"], "start": 0.2, "question": "Who?", "answer": "dog", "step": 0}
    batch = DCTCollator(processor, [99], seed=0)([chat, plain])
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert placeholders == [10 + 20, 60]  # frames of 40 ms
    assert batch["windows_per_audio"].tolist() == [1, 1, 1]
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert re.search(r"Audio 1: .*Who\?<\|im_end\|>.*Anna\.<\|im_end\|>.*Audio 2: .*And here\?", text, re.DOTALL)
    answers = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert answers == ["Ben.<|im_end|>", "dog<|im_end|>"]
    heard = CTCCollator(processor)([plain | {"text": "a dog"}])["feature_attention_mask"]
    assert int(heard.sum()) == 240  # mel frames of 10 ms
