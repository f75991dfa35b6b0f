"""The demo's corpus and the base model's training: what is held out, and that short cuts change no result."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.demo import average, base_encoder, base_join, base_model, corpus, heldout, phones
from fastlongspeech.demo.sentences import (
    KINDS,
    UNHEARD_NAMES,
    UNHEARD_VALUES,
    Passage,
    PassageWriter,
    is_held_out,
    vocabulary,
)

needs_voices = pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="espeak-ng and flite are not installed"
)


def write(seed: int, held_out: bool, sentences: int = 12, unheard: bool = False) -> Passage:
    writer = PassageWriter(random.Random(seed), held_out, fact_share=0.7, num_kinds=3, unheard=unheard)
    for _ in range(sentences):
        writer.add_sentence()
    return writer.passage


@pytest.fixture(scope="module")
def demo_tokenizer() -> PreTrainedTokenizerFast:
    return base_model.build_tokenizer()


@pytest.fixture(scope="module")
def stock_model(demo_tokenizer: PreTrainedTokenizerFast) -> Qwen2AudioForConditionalGeneration:
    return base_model.build_model(demo_tokenizer).eval()


def test_the_language_is_large_enough_to_be_no_table() -> None:
    assert len(vocabulary()) >= 600
    for kind, (subjects, values, _, _) in KINDS.items():
        assert len(set(subjects)) == len(subjects) >= 20, kind
        assert len(set(values)) == len(values) >= 20, kind


def test_no_sentence_is_both_trained_on_and_held_out() -> None:
    trained = {sentence for seed in range(100) for sentence in write(seed, held_out=False).sentences}
    held_out = {sentence for seed in range(100) for sentence in write(seed, held_out=True).sentences}
    assert not trained & held_out
    assert not any(map(is_held_out, trained))


def test_unheard_names_and_values_are_never_spoken_in_training() -> None:
    unheard = {*UNHEARD_NAMES, *(value for values in UNHEARD_VALUES.values() for value in values)}
    assert not unheard & vocabulary()
    for seed in range(30):
        for fact in write(seed, held_out=True, unheard=True).facts:
            assert fact is None or unheard & {fact.subject, fact.value}


def test_a_question_has_one_answer_in_its_passage() -> None:
    for seed in range(50):
        facts = [fact for fact in write(seed, held_out=False, sentences=40).facts if fact]
        asked = [(fact.kind, fact.subject) for fact in facts]
        assert len(set(asked)) == len(asked)


@needs_voices
def test_a_recording_depends_on_its_split_and_number_alone() -> None:
    samples, row = corpus.record("test", 3)
    again, row_again = corpus.record("test", 3)
    other, _ = corpus.record("test", 4)
    np.testing.assert_array_equal(samples, again)
    assert row == row_again
    assert len(other) != len(samples)


@needs_voices
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_recording_is_what_its_description_says(split: str) -> None:
    samples, row = corpus.record(split, 1)
    assert row["duration"] == pytest.approx(len(samples) / 16000, abs=1e-3)
    assert row["duration"] <= 29
    assert row["text"] == " ".join(sentence["text"] for sentence in row["sentences"])
    assert all(is_held_out(sentence["text"]) == (split == "test") for sentence in row["sentences"])
    for question in row["questions"]:
        assert question["kind"] == "voice" or question["answer"] in row["text"]
    for sentence in row["sentences"]:  # speech within its times, only noise right before
        start, end = round(sentence["start"] * 16000), round(sentence["end"] * 16000)
        before = samples[max(0, start - 800) : start]
        assert np.abs(samples[start:end]).mean() > 3 * np.abs(before).mean()


@needs_voices
def test_no_two_voices_sound_the_same() -> None:
    """espeak-ng takes the wrong name of a variant without a word and speaks in its language's own voice."""
    spoken = [corpus.speak("susan sees the sea", voice, 1.0) for voice in corpus.VOICES]
    assert len({samples.tobytes() for samples in spoken}) == len(corpus.VOICES)


@needs_voices
@pytest.mark.parametrize("voice", corpus.VOICES)
def test_phones_are_timed_where_they_are_spoken(voice: corpus.Voice) -> None:
    """Fricatives, full of high frequencies, are where the phones say."""
    sentence, speed = "susan sees the sea", 0.9
    samples = corpus.speak(sentence, voice, speed)
    timed = phones.time_phones(sentence, f"{voice.engine} {voice.name}", speed)
    starts = [phone.start for phone in timed]
    assert starts == sorted(starts) and starts[-1] < len(samples) / 16000 + 0.1
    assert abs(next(phone.start for phone in timed if phone.name != phones.SILENCE)) < 0.05
    brightness: dict[bool, list[float]] = {True: [], False: []}
    for phone, end in zip(timed, [*starts[1:], len(samples) / 16000], strict=True):
        spoken = samples[round(max(0, phone.start) * 16000) : round(end * 16000)]
        if len(spoken) > 160 and phone.name != phones.SILENCE:
            crossings = np.diff(np.signbit(spoken)).mean()
            brightness[phone.name in ("s", "z")].append(crossings)
    assert np.mean(brightness[True]) > 2 * np.mean(brightness[False])


@needs_voices
def test_every_frame_has_a_phone_and_a_word_and_pauses_have_silence() -> None:
    samples, row = corpus.record("train", 2)
    level = np.abs(samples[: len(samples) // 160 * 160]).reshape(-1, 160).mean(1)
    of_phones, of_words = phones.label_frames([row], [len(level)], 100)
    assert of_phones.names[0] == phones.SILENCE and len(np.unique(of_phones.labels[0])) > 10
    assert of_words.names == ["", *sorted(set(row["text"].split()))]
    for _, (labels,) in (of_phones, of_words):
        assert level[labels > 0].mean() > 5 * level[labels == 0].mean()


@needs_voices
@pytest.mark.parametrize("voice", corpus.VOICES)
def test_words_are_timed_where_they_are_spoken(voice: corpus.Voice) -> None:
    sentence = "susan sees the doctor"
    timed = phones.time_phones(sentence, f"{voice.engine} {voice.name}", 1.0)
    heard = [phone for phone in timed if phone.word]
    assert list(dict.fromkeys(phone.word for phone in heard)) == sentence.split()
    for phone in heard:
        assert phone.name != "k" or phone.word == "doctor"
        assert phone.name != "D" or phone.word == "the"


def test_the_tokenizer_reads_any_case_and_unknown_words(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = demo_tokenizer("Where does ANNA live, Zbigniew?").input_ids
    assert demo_tokenizer.unk_token_id not in ids
    assert demo_tokenizer.decode(ids) == "where does anna live , zbigniew ?"


def test_packed_questions_are_answered_as_if_asked_alone(
    demo_tokenizer: PreTrainedTokenizerFast, stock_model: Qwen2AudioForConditionalGeneration
) -> None:
    packer = base_model.QuestionPacker(demo_tokenizer)
    pairs = [("Where does Anna live?", "paris"), ("Which code opens the red box?", "two nine")]
    packed = packer.pack([5, 9], [pairs, pairs[:1]])
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(14, 256, generator=generator)
    loss, _ = base_model.answer_loss(stock_model, packed, audio)

    prompt = "{}" + base_model.AFTER_AUDIO + "{}" + base_model.AFTER_QUESTION
    losses = []
    for frames, (question, answer) in [(audio[:5], pairs[0]), (audio[:5], pairs[1]), (audio[5:], pairs[0])]:
        head = base_model.BEFORE_AUDIO + "<|AUDIO|>" * len(frames)
        ids = demo_tokenizer(prompt.format(head, question), return_tensors="pt").input_ids
        reply = demo_tokenizer(answer + "<|im_end|>", return_tensors="pt").input_ids
        whole = torch.cat([ids, reply], dim=1)
        embeds = stock_model.get_input_embeddings()(whole)
        embeds[whole == stock_model.config.audio_token_id] = frames
        hidden = stock_model.model.language_model(inputs_embeds=embeds).last_hidden_state
        logits = stock_model.lm_head(hidden)[0, ids.shape[1] - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, reply[0], reduction="none").tolist()
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)


@torch.no_grad()
def test_the_encoder_in_training_is_the_stock_encoder(stock_model: Qwen2AudioForConditionalGeneration) -> None:
    mel = np.random.default_rng(0).standard_normal((3000, 80)).astype(np.float16)
    encoded = base_encoder.encode(stock_model, [mel])
    stock = stock_model.model.audio_tower(torch.from_numpy(mel.astype(np.float32)).T[None]).last_hidden_state
    torch.testing.assert_close(encoded.frames[:, : encoded.lengths[0]], stock, rtol=1e-4, atol=1e-4)


def test_the_projector_says_whether_a_man_or_a_woman_speaks(
    stock_model: Qwen2AudioForConditionalGeneration, demo_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, packer = copy.deepcopy(stock_model), base_model.QuestionPacker(demo_tokenizer)
    generator = torch.Generator().manual_seed(0)
    is_man = [number % 3 == 0 for number in range(300)]
    frames = [torch.randn(50, 256, generator=generator) for _ in is_man]
    for rows, spoken_by_man in zip(frames, is_man, strict=True):
        rows[:, 7] += 1.0 if spoken_by_man else -1.0
    base_join.tell_voices(model, packer, [rows.half() for rows in frames], is_man)
    embeddings = model.model.language_model.embed_tokens.weight
    man, woman = (embeddings[packer.words(word)[0]] for word in ("man", "woman"))
    with torch.no_grad():
        before, after = (of.model.multi_modal_projector(torch.stack(frames)) for of in (stock_model, model))
    said = after - before
    assert [bool(row.mean(0) @ (man - woman) > 0) for row in said] == is_man
    sideways = said - (said @ (man - woman))[..., None] * (man - woman) / (man - woman).square().sum()
    assert sideways.abs().max() < 1e-3 * said.abs().max()


def test_checkpoints_are_averaged_and_stored_in_float16(checkpoint: Path, tmp_path: Path) -> None:
    before = load_file(checkpoint / "model.safetensors")
    for name in ("before", "after"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "before" / "checkpoint-5").mkdir()
    save_file({name: weight + 1 for name, weight in before.items()}, tmp_path / "after" / "model.safetensors")
    average.average(tmp_path / "before", tmp_path / "after", tmp_path / "mean")
    for name, weight in load_file(tmp_path / "mean" / "model.safetensors").items():
        torch.testing.assert_close(weight, (before[name] + 0.5).half(), rtol=1e-3, atol=0)
    assert not (tmp_path / "mean" / "checkpoint-5").exists()
    model = FastLongSpeechForConditionalGeneration.from_pretrained(tmp_path / "mean")
    assert model.config.ctc_vocab_size and model.dtype == torch.float32  # float16 is for storage alone
    with pytest.raises(FileExistsError, match="is there already"):
        average.average(tmp_path / "before", tmp_path / "after", tmp_path / "mean")
    save_file({name: weight + 2e5 for name, weight in before.items()}, tmp_path / "after" / "model.safetensors")
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        average.average(tmp_path / "before", tmp_path / "after", tmp_path / "large")
    save_file({"other": torch.zeros(1)}, tmp_path / "after" / "model.safetensors")
    with pytest.raises(ValueError, match="weights of other names or shapes"):
        average.average(tmp_path / "before", tmp_path / "after", tmp_path / "wrong")


def test_the_published_model_is_stored_in_float16_and_computes_in_float32() -> None:
    folder = Path(average.__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model = FastLongSpeechForConditionalGeneration.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_evaluation_asks_every_question_three_ways(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    for split in ("test", "unheard", "long"):
        folder = tmp_path / split
        folder.mkdir()
        rows = []
        for number in range(2):
            soundfile.write(folder / f"{number}.flac", 0.1 * rng.standard_normal(16000), 16000)
            questions = [
                {"question": "Where does Anna live?", "answer": "paris", "kind": "home"},
                {"question": "Is the speaker a man or a woman?", "answer": "man", "kind": "voice"},
            ]
            rows.append({"audio": f"{number}.flac", "text": "the cat sat", "questions": questions})
        corpus.write_jsonl(folder / "recordings.jsonl", rows)
    output = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["heldout", str(checkpoint), str(tmp_path), "--output", str(output)])
    heldout.main()
    table = capsys.readouterr().out
    assert all(word in table for word in ("the recording", "wrong recording", "no audio", "CTC transcription, long"))
    figures = json.loads(output.read_text())
    assert all(row["facts"]["questions"] == row["voice"]["questions"] == 2 for row in figures["exact_answers"])
