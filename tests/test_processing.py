"""Recordings and prompts become windows, placeholders and labels; whatever does not fit is refused."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RATE, speech
from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig, Qwen2AudioProcessor, WhisperFeatureExtractor

from fastlongspeech import FastLongSpeechProcessor

PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>\nWhat?"


def placeholders(processor: FastLongSpeechProcessor, inputs: Any) -> list[int]:
    """How many audio tokens every row has."""
    return (inputs["input_ids"] == processor.audio_token_id).sum(dim=1).tolist()


# Windows


@pytest.mark.parametrize("seconds, windows", [(0.04, 1), (29, 1), (30, 1), (30.01, 2), (31, 2), (60, 2), (61, 3)])
def test_a_window_is_what_the_stock_extractor_makes_of_its_samples(processor, seconds, windows):
    samples = speech(seconds)
    inputs = processor(audio=samples, sampling_rate=RATE)
    assert inputs["windows_per_audio"].tolist() == [windows] == [len(inputs["input_features"])]
    stock = WhisperFeatureExtractor(feature_size=80)
    for window in range(windows):
        part = samples[window * 30 * RATE : (window + 1) * 30 * RATE]
        expected = stock(part, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
        assert torch.equal(inputs["input_features"][window], expected["input_features"][0])
        assert torch.equal(inputs["feature_attention_mask"][window], expected["attention_mask"][0].long())


def test_no_sample_is_lost(processor):
    inputs = processor(audio=speech(61), sampling_rate=RATE)
    assert inputs["feature_attention_mask"].sum() == 6100  # mel frames of 10 ms


def test_names_and_types_of_the_outputs(processor):
    inputs = processor(text=PROMPT, audio=speech(31), sampling_rate=RATE, target_length=5)
    assert {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()} == {
        "input_ids": ((1, 13), torch.int64),
        "attention_mask": ((1, 13), torch.int64),
        "input_features": ((2, 80, 3000), torch.float32),
        "feature_attention_mask": ((2, 3000), torch.int64),
        "windows_per_audio": ((1,), torch.int64),
    }
    assert set(inputs) == set(processor.model_input_names)


# Placeholders


@pytest.mark.parametrize("samples", [640, 641, 960, 961, 1000, 16000, 16001, 84800, 479999, 480000])
def test_a_clip_has_the_placeholders_and_ids_of_stock_qwen2_audio(processor, samples):
    audio = np.resize(speech(30), samples)
    inputs = processor(text=PROMPT, audio=audio, sampling_rate=RATE, compression="none")
    stock = Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer)
    expected = stock(text=PROMPT, audio=audio, sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["input_features"], expected["input_features"])


@pytest.mark.parametrize("seconds", [0.04, 0.1, 29, 30, 30.005, 31, 61.3, 90])
def test_a_recording_has_the_frames_the_encoder_makes_of_its_windows(processor, seconds):
    inputs = processor(text=PROMPT, audio=speech(seconds), sampling_rate=RATE, compression="none")
    encoder = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(encoder_layers=1, d_model=4, encoder_attention_heads=1))
    mel_frames = inputs["feature_attention_mask"].sum(dim=1)
    _, frames = encoder._get_feat_extract_output_lengths(mel_frames)
    assert placeholders(processor, inputs) == [frames.sum()]


def test_a_last_window_too_short_for_a_frame_is_kept(processor):
    inputs = processor(text=PROMPT, audio=speech(30.005), sampling_rate=RATE)
    assert inputs["feature_attention_mask"].sum(dim=1).tolist() == [3000, 1]
    assert placeholders(processor, inputs) == [750]


@pytest.mark.parametrize("length, expected", [(None, 750), (1, 1), (13, 13), (750, 750), (1000, 775), (10**6, 775)])
def test_a_recording_has_at_most_target_length_placeholders(processor, length, expected):
    inputs = processor(text=PROMPT, audio=speech(31), sampling_rate=RATE, target_length=length)
    assert placeholders(processor, inputs) == [expected]
    assert "target_length" not in inputs


def test_target_length_may_differ_among_recordings(processor):
    inputs = processor(text=[PROMPT] * 3, audio=[speech(2)] * 3, sampling_rate=RATE, target_length=[10, 60, 20])
    assert placeholders(processor, inputs) == [10, 50, 20]


def test_the_processors_own_target_length_is_the_default(tokenizer):
    processor = FastLongSpeechProcessor(WhisperFeatureExtractor(), tokenizer, target_length=12)
    assert placeholders(processor, processor(text=PROMPT, audio=speech(2), sampling_rate=RATE)) == [12]


def test_recordings_belong_to_placeholders_in_order(processor):
    audio = [speech(1), speech(31), speech(3), speech(0.04)]
    text = ["<|AUDIO|> and <|AUDIO|>", "nothing", "<|AUDIO|>, <|AUDIO|>"]
    inputs = processor(text=text, audio=audio, sampling_rate=RATE, compression="none")
    assert placeholders(processor, inputs) == [25 + 775, 0, 75 + 1]
    assert inputs["windows_per_audio"].tolist() == [1, 2, 1, 1]
    nested = processor(text=text, audio=[audio[:2], [], audio[2:]], sampling_rate=RATE, compression="none")
    assert torch.equal(inputs["input_features"], nested["input_features"])


def test_a_batch_holds_what_its_members_give_alone(processor):
    text, audio = [PROMPT, "Hm? " + PROMPT], [speech(1), speech(31)]
    batch = processor(text=text, audio=audio, sampling_rate=RATE)
    alone = [processor(text=t, audio=a, sampling_rate=RATE) for t, a in zip(text, audio, strict=True)]
    assert torch.equal(batch["input_features"], torch.cat([one["input_features"] for one in alone]))
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert torch.equal(ids[mask.bool()], one["input_ids"][0])


def test_padding_is_on_the_left_unless_asked_otherwise(processor):
    processor.tokenizer.padding_side = "right"
    assert processor(text=["a", "long"])["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert processor(text=["a", "long"], padding_side="right")["attention_mask"][0].tolist() == [1, 0, 0, 0]


def test_text_alone_and_audio_alone(processor):
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}
    audio = processor(audio=speech(1), sampling_rate=RATE)
    assert set(audio) == {"input_features", "feature_attention_mask", "windows_per_audio"}


def test_numpy_on_request(processor):
    inputs = processor(text=PROMPT, audio=speech(1), sampling_rate=RATE, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


# Conversations


def conversation(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def test_the_chat_template_writes_what_qwen2_audios_writes(processor):
    stock = Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer)
    audio = {"type": "audio", "path": "a.wav"}
    chats = [
        conversation(audio),
        conversation({"type": "audio", "audio": "a.wav"}, {"type": "audio", "url": "http://b/c.wav"}),
        [{"role": "system", "content": "Be brief."}, *conversation(audio)],
        [*conversation(audio), {"role": "assistant", "content": "Rain."}, *conversation(audio)],
        [{"role": "user", "content": "no audio"}],
    ]
    for chat in chats:
        for prompt in (True, False):
            ours = processor.apply_chat_template(chat, add_generation_prompt=prompt)
            assert ours == stock.apply_chat_template(chat, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    "part",
    [
        lambda path: {"audio": str(path)},
        lambda path: {"path": str(path)},
        lambda path: {"url": str(path)},
        lambda path: {"audio": path.read_bytes()},
        lambda path: {"audio": {"array": speech(1.5), "sampling_rate": RATE}},
        lambda path: {"audio": {"bytes": path.read_bytes(), "path": None}},
        lambda path: {"audio": torch.from_numpy(speech(1.5))},
    ],
)
def test_a_conversation_tokenizes_to_what_the_call_gives(processor, wav, part):
    chat = conversation({"type": "audio", **part(wav)})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = processor(text=prompt, audio=wav)
    assert set(inputs) == set(expected)
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


def test_a_batch_of_conversations_of_several_turns(processor, wav):
    audio = {"type": "audio", "path": str(wav)}
    turns = [*conversation(audio), {"role": "assistant", "content": "Rain."}, *conversation(audio)]
    inputs = processor.apply_chat_template([turns, conversation(audio)], tokenize=True, return_dict=True)
    assert inputs["windows_per_audio"].tolist() == [1, 1, 1]
    assert placeholders(processor, inputs) == [74, 37]


@pytest.mark.parametrize(
    "options",
    [{"target_length": 7}, {"processor_kwargs": {"target_length": 7}}, {"target_length": 7, "padding": True}],
)
def test_a_conversation_takes_the_arguments_of_the_call(processor, wav, options):
    chat = conversation({"type": "audio", "path": str(wav)})
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    assert placeholders(processor, inputs) == [7]


@pytest.mark.parametrize(
    "options", [{"sampling_rate": 8000}, {"processor_kwargs": {"audio_kwargs": {"sampling_rate": 8000}}}]
)
def test_arrays_in_a_conversation_have_the_sampling_rate_given(processor, options):
    chat = conversation({"type": "audio", "audio": speech(1, 8000)})
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    assert inputs["feature_attention_mask"].sum() == 100


def test_a_conversation_is_not_changed_by_tokenizing(processor, wav):
    chat = conversation({"type": "audio", "path": str(wav)})
    processor.apply_chat_template(chat, tokenize=True)
    assert chat == conversation({"type": "audio", "path": str(wav)})


def test_a_long_recording_in_a_conversation_is_whole(processor):
    chat = conversation({"type": "audio", "audio": {"array": speech(61), "sampling_rate": RATE}})
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert inputs["feature_attention_mask"].sum() == 6100


# Refusals


@pytest.mark.parametrize("text, count", [("none", 0), (PROMPT, 1), ([PROMPT, "<|AUDIO|><|AUDIO|>"], 3)])
def test_as_many_recordings_as_placeholders(processor, text, count):
    for recordings in {0, 1, 2, 3, 4} - {count}:
        message = f"tokens in the prompts should be .* recordings passed, got {count} and {recordings}"
        with pytest.raises(ValueError, match=message):
            processor(text=text, audio=[speech(0.1)] * recordings or None, sampling_rate=RATE)


def test_placeholders_side_by_side_are_refused(processor):
    with pytest.raises(ValueError, match=r"prompt 1 holds <\|AUDIO\|> tokens side by side, .* write <\|audio_bos\|>"):
        processor(text=[PROMPT, "<|AUDIO|><|AUDIO|>"], audio=[speech(0.1)] * 3, sampling_rate=RATE)


@pytest.mark.parametrize("length", [0, -3, 2.5, True, "12", [12, 0], [12, 12, 12]])
def test_a_target_length_that_is_no_positive_integer_is_refused(processor, length):
    with pytest.raises(ValueError, match="target_length must be "):
        processor(text=[PROMPT] * 2, audio=[speech(1)] * 2, sampling_rate=RATE, target_length=length)
    with pytest.raises(ValueError, match="target_length must be "):
        FastLongSpeechProcessor(processor.feature_extractor, processor.tokenizer, target_length=length)


def test_other_arguments_that_are_refused(processor):
    with pytest.raises(ValueError, match="audios= is not an argument .* audio="):
        processor(text=PROMPT, audios=[speech(1)])
    for nothing in (None, []):
        with pytest.raises(ValueError, match="got neither"):
            processor(audio=nothing)
    with pytest.raises(ValueError, match="answers need the prompts"):
        processor(audio=speech(1), sampling_rate=RATE, answers="yes")
    with pytest.raises(ValueError, match="compression must be one of iterative_fusion, .*, none; got 'mean'"):
        processor(text=PROMPT, audio=speech(1), sampling_rate=RATE, compression="mean")
    with pytest.raises(TypeError, match="text must be a string or a list of strings"):
        processor(text=[["a"]])
    with pytest.raises(FileNotFoundError, match="ctc_model must be the path of a SentencePiece model"):
        FastLongSpeechProcessor(processor.feature_extractor, processor.tokenizer, ctc_model="nowhere.model")


def test_truncation_of_placeholders_is_refused(processor):
    with pytest.raises(ValueError, match="must hold 25 <|AUDIO|> tokens .* left 7; check truncation"):
        processor(text=PROMPT, audio=speech(1), sampling_rate=RATE, truncation=True, max_length=8)


# Labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_answer_and_the_end_of_its_turn_are_learnt(processor, side):
    text, answers = [PROMPT, "Hm? " + PROMPT], ["It rains in the north.", "No"]
    audio = [speech(1), speech(2)]
    inputs = processor(text=text, audio=audio, sampling_rate=RATE, answers=answers, padding_side=side)
    for row in range(2):
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        alone = processor(text=text[row], audio=audio[row], sampling_rate=RATE)["input_ids"][0]
        real = inputs["attention_mask"][row].bool()
        learnt = labels != -100
        assert torch.equal(ids[real][: len(alone)], alone)
        assert torch.equal(ids[learnt], labels[learnt])
        assert torch.equal(ids[real][len(alone) :], labels[learnt])
        assert processor.tokenizer.decode(labels[learnt]) == answers[row] + "<|im_end|>"


def test_answers_are_one_per_prompt(processor):
    with pytest.raises(ValueError, match="answers must hold one answer per prompt, got 1 for 2 prompts"):
        processor(text=["a", "b"], answers=["c"])
    with pytest.raises(ValueError, match="must hold 0 <|AUDIO|> tokens .* left 1; .* the answer"):
        processor(text="a", answers="<|AUDIO|>")


def test_ctc_labels_are_pieces_padded_on_the_right(processor):
    transcripts = ["the cat sat", "a hill"]
    inputs = processor(audio=[speech(1)] * 2, sampling_rate=RATE, ctc_text=transcripts)
    expected = [processor.ctc_tokenizer.encode(text) for text in transcripts]
    for row, pieces in zip(inputs["ctc_labels"].tolist(), expected, strict=True):
        assert row == pieces + [-100] * (max(map(len, expected)) - len(pieces))
    assert inputs["ctc_labels"].dtype == torch.int64
    assert inputs["ctc_labels"].max() < processor.ctc_vocab_size
    assert processor.ctc_decode(inputs["ctc_labels"]) == transcripts
    assert processor.ctc_decode([row[::1] for row in expected]) == transcripts


def test_ctc_text_is_one_transcript_per_recording(processor):
    with pytest.raises(ValueError, match="ctc_text must hold one transcript per recording, got 2 for 1 recordings"):
        processor(audio=speech(1), sampling_rate=RATE, ctc_text=["a", "b"])


def test_without_a_sentencepiece_model_ctc_uses_the_tokenizer(tokenizer):
    processor = FastLongSpeechProcessor(WhisperFeatureExtractor(), tokenizer)
    inputs = processor(audio=speech(1), sampling_rate=RATE, ctc_text="a hill")
    assert inputs["ctc_labels"].tolist() == [tokenizer("a hill")["input_ids"]]
    assert processor.ctc_decode(inputs["ctc_labels"]) == ["a hill"]
    assert processor.ctc_vocab_size == 0


# Saving


def same_inputs(one: FastLongSpeechProcessor, other: FastLongSpeechProcessor) -> bool:
    made = [
        it(text=PROMPT, audio=speech(31), sampling_rate=RATE, answers="yes", ctc_text="cat") for it in (one, other)
    ]
    return all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_saving_and_loading_changes_nothing(processor, tmp_path):
    processor.target_length = 33
    processor.save_pretrained(tmp_path)
    loaded = FastLongSpeechProcessor.from_pretrained(tmp_path)
    assert same_inputs(processor, loaded)
    assert (loaded.target_length, loaded.ctc_vocab_size) == (33, processor.ctc_vocab_size)
    assert loaded.to_dict() == processor.to_dict()
    assert str(tmp_path) not in (tmp_path / "processor_config.json").read_text()
    assert (tmp_path / "ctc.model").read_bytes() == processor.ctc_tokenizer.serialized_model_proto()


def test_arguments_of_from_pretrained_take_precedence(processor, tmp_path, ctc_model):
    FastLongSpeechProcessor(processor.feature_extractor, processor.tokenizer).save_pretrained(tmp_path)
    assert FastLongSpeechProcessor.from_pretrained(tmp_path).ctc_vocab_size == 0
    loaded = FastLongSpeechProcessor.from_pretrained(tmp_path, ctc_model=str(ctc_model), target_length=12)
    assert (loaded.target_length, loaded.ctc_vocab_size) == (12, processor.ctc_vocab_size)


def test_a_folder_saved_again_keeps_no_vocabulary_of_before(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    FastLongSpeechProcessor(processor.feature_extractor, processor.tokenizer).save_pretrained(tmp_path)
    assert FastLongSpeechProcessor.from_pretrained(tmp_path).ctc_vocab_size == 0


def test_a_vanilla_qwen2_audio_processor_loads(processor, tmp_path):
    stock = Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer)
    stock.save_pretrained(tmp_path)
    loaded = FastLongSpeechProcessor.from_pretrained(tmp_path)
    assert loaded.ctc_vocab_size == 0
    inputs = loaded(text=PROMPT, audio=speech(1), sampling_rate=RATE)
    expected = stock(text=PROMPT, audio=speech(1), sampling_rate=RATE, return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_worker_processes_can_be_given_the_processor(processor):
    assert same_inputs(processor, pickle.loads(pickle.dumps(processor)))
