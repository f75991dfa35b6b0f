"""Recordings of any kind and duration become windows, placeholders and labels; whatever cannot is refused."""

import functools
import http.server
import logging
import pickle
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig, Qwen2AudioProcessor, WhisperFeatureExtractor

from fastlongspeech import FastLongSpeechProcessor, load_recording

RATE = 16000
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>\nWhat?"


def speech(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Tones that drift and fade, with a little noise: float32 at `rate` hertz."""
    time = np.arange(round(seconds * rate)) / rate
    tones = np.sin(2 * np.pi * (200 + 20 * seed) * time) * (0.5 + 0.4 * np.sin(2 * np.pi * 0.3 * time))
    noise = np.random.default_rng(seed).normal(scale=0.01, size=time.shape)
    return (0.3 * tones + noise).astype(np.float32)


def placeholders(processor: FastLongSpeechProcessor, inputs: Any) -> list[int]:
    """How many audio tokens every row has."""
    return (inputs["input_ids"] == processor.audio_token_id).sum(dim=1).tolist()


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(1.5), RATE, subtype="FLOAT")
    return path


@pytest.fixture
def url(wav: Path):
    """The address of `wav` on a server of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(wav.parent))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{wav.name}"
        server.shutdown()


# What audio may be


@pytest.mark.parametrize(
    "give",
    [
        lambda path: str(path),
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"bytes": path.read_bytes(), "path": "elsewhere.wav"},
        lambda path: {"array": speech(1.5), "sampling_rate": RATE},
        lambda path: {"array": torch.from_numpy(speech(1.5)), "sampling_rate": np.int64(RATE)},
        lambda path: {"array": speech(1.5).tolist(), "sampling_rate": float(RATE)},
        lambda path: [str(path)],
        lambda path: (path,),
        lambda path: [[path]],
    ],
)
def test_every_form_of_a_recording_gives_the_same_inputs(processor, wav, give):
    expected = processor(text=PROMPT, audio=speech(1.5), sampling_rate=RATE)
    inputs = processor(text=PROMPT, audio=give(wav))
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda samples: torch.from_numpy(samples).requires_grad_(),
        lambda samples: samples.astype(np.float64),
        lambda samples: samples.tolist(),
        lambda samples: [samples],
        lambda samples: [samples.tolist()],
    ],
)
def test_arrays_tensors_and_lists_of_samples_are_one_recording(processor, convert):
    expected = processor(audio=speech(0.5), sampling_rate=RATE)
    inputs = processor(audio=convert(speech(0.5)), sampling_rate=RATE)
    assert torch.equal(inputs["input_features"], expected["input_features"])
    assert inputs["windows_per_audio"].tolist() == [1]


def test_a_url_is_fetched(url):
    assert np.array_equal(load_recording(url), speech(1.5))


def test_what_datasets_hands_out_is_a_recording(wav):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"audio": [str(wav)] * 2}).cast_column("audio", datasets.Audio(decode=False))
    assert np.array_equal(load_recording(table[0]["audio"]), speech(1.5))


def test_all_rows_of_a_datasets_column_are_recordings(processor, wav):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"audio": [str(wav)] * 2}).cast_column("audio", datasets.Audio(decode=False))
    assert processor(audio=table["audio"])["windows_per_audio"].tolist() == [1, 1]


def test_a_torchcodec_decoder_is_a_recording():
    decoder = Mock(spec=["get_all_samples"])
    decoder.get_all_samples.return_value = Mock(data=torch.from_numpy(speech(1.5, 8000))[None], sample_rate=8000)
    assert np.array_equal(load_recording(decoder), load_recording(speech(1.5, 8000), 8000))


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "aiff", "au"])
def test_files_soundfile_reads(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", speech(1), RATE)
    samples = load_recording(tmp_path / f"a.{suffix}")
    assert abs(len(samples) - RATE) < 2000  # mp3 pads
    assert np.isclose(samples.std(), speech(1).std(), rtol=0.05)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("as_bytes", [False, True])
def test_files_only_ffmpeg_reads(tmp_path, wav, as_bytes):
    movie = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, movie], check=True)
    samples = load_recording(movie.read_bytes() if as_bytes else movie)
    assert abs(len(samples) - 1.5 * RATE) < 2100  # AAC pads
    assert np.isclose(samples.std(), speech(1.5).std(), rtol=0.05)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_flac_written_to_a_pipe_is_read_and_a_damaged_one_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", speech(8), RATE)
    flac = bytearray((tmp_path / "a.flac").read_bytes())
    with pytest.raises(ValueError, match="audio cannot be read"):
        load_recording(bytes(flac[: len(flac) // 2]))
    flac[21] &= 0xF0  # the samples of the whole in 36 bits of the header; 0: not known
    flac[22:26] = bytes(4)
    assert np.array_equal(load_recording(bytes(flac)), load_recording(tmp_path / "a.flac"))


def test_without_ffmpeg_an_unknown_format_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A no music")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"cannot be read: soundfile .*a\.m4a.*install ffmpeg"):
        load_recording(tmp_path / "a.m4a")


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_any_sampling_rate_becomes_16_khz(rate):
    tones = [
        np.sin(2 * np.pi * 440 * np.arange(it) / it) + 0.5 * np.sin(2 * np.pi * 1700 * np.arange(it) / it)
        for it in (rate, RATE)
    ]
    samples = load_recording(tones[0], sampling_rate=rate)
    assert abs(len(samples) - RATE) <= 1
    np.testing.assert_allclose(samples[500:-500], tones[1][500 : len(samples) - 500], atol=1e-3)


def test_a_file_and_a_dictionary_keep_their_own_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", speech(0.5, 8000), 8000)
    assert len(load_recording(tmp_path / "a.wav", sampling_rate=44100)) == 8000
    assert len(load_recording({"array": speech(0.5, 8000), "sampling_rate": 8000}, sampling_rate=44100)) == 8000


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged_wherever_they_stand(channels):
    samples = np.stack([speech(0.5, seed=channel) for channel in range(channels)])
    expected = sum(samples) / channels
    np.testing.assert_allclose(load_recording(samples, RATE), expected, atol=1e-6)
    np.testing.assert_allclose(load_recording(torch.from_numpy(samples.T), RATE), expected, atol=1e-6)


@pytest.mark.parametrize("dtype, middle, scale", [("uint8", 128, 128), ("int16", 0, 2**15), ("int32", 0, 2**31)])
def test_pcm_integers_are_scaled(dtype, middle, scale):
    pcm = (speech(0.5).astype(np.float64) * scale + middle).round().astype(dtype)
    np.testing.assert_allclose(load_recording(pcm, RATE), speech(0.5), atol=1 / scale + 1e-6)
    np.testing.assert_allclose(load_recording(torch.from_numpy(pcm), RATE), speech(0.5), atol=1 / scale + 1e-6)


def test_half_precision_tensors_are_recordings():
    samples = torch.from_numpy(speech(0.5)).bfloat16()
    assert np.array_equal(load_recording(samples, RATE), samples.float().numpy())


def test_an_array_without_a_rate_is_taken_as_16_khz_with_one_warning(caplog):
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(load_recording(speech(0.5)), speech(0.5))
        load_recording(speech(0.6))
    assert [record.message for record in caplog.records] == [
        "audio was given as an array without a sampling rate and is taken as 16000 Hz; "
        "pass sampling_rate=... to say so or to have it resampled."
    ]


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

NAN, INFINITE = speech(1), speech(1)
NAN[5], INFINITE[7] = np.nan, -np.inf


@pytest.mark.parametrize(
    "audio, error, message",
    [
        (np.zeros(0, np.float32), ValueError, "audio is empty"),
        (torch.zeros(2, 0), ValueError, "audio is empty"),
        (b"", ValueError, "audio is empty"),
        (np.zeros(639, np.float32), ValueError, "at least one 40 ms frame, but ndarray lasts 39.9 ms"),
        (NAN, ValueError, "finite"),
        (INFINITE, ValueError, "finite"),
        (np.full(1000, 1e300), ValueError, "finite"),
        (["a", "b"], FileNotFoundError, "audio file not found: a"),
        (np.array(["a"] * 1000), TypeError, "floating point or uint8/int16/int32 PCM, got <U1"),
        (np.zeros(1000, bool), TypeError, "got bool"),
        (np.zeros(1000, complex), TypeError, "got complex128"),
        (np.zeros(1000, np.int64), TypeError, "got int64"),
        ([0.1, None, 0.2] * 1000, TypeError, "got object"),
        (
            np.zeros((2, 3, 1000), np.float32),
            ValueError,
            r"shape \(samples,\) or \(channels, samples\), got \(2, 3, 1000\)",
        ),
        (np.float32(1), TypeError, "audio must be a path, a URL, bytes, an array, a tensor or a dictionary"),
        (object(), TypeError, "audio must be a path, .* got object"),
        ([None], TypeError, "audio must be a path, .* got NoneType"),
        ({"sampling_rate": RATE}, TypeError, r'"array", "bytes" or "path", got the keys \[\'sampling_rate\'\]'),
        ("missing.wav", FileNotFoundError, "audio file not found: missing.wav"),
        ({"bytes": None, "path": "missing.wav"}, FileNotFoundError, "audio file not found: missing.wav"),
        (b"no audio at all", ValueError, "audio cannot be read"),
        ("http://127.0.0.1:9/a.wav", ValueError, "cannot be fetched from http://127.0.0.1:9/a.wav"),
    ],
)
def test_audio_that_is_refused(processor, audio, error, message):
    with pytest.raises(error, match=message):
        processor(audio=audio, sampling_rate=RATE)


def test_an_unreadable_file_is_refused_by_name(processor, tmp_path):
    (tmp_path / "notes.wav").write_text("these are no samples")
    for unreadable in (tmp_path / "notes.wav", tmp_path):
        with pytest.raises(ValueError, match=f"audio cannot be read: .*{unreadable.name}"):
            processor(audio=unreadable)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "16000", True, [16000]])
def test_a_sampling_rate_that_is_no_positive_number_is_refused(processor, rate):
    for audio, options in (
        (speech(1), {"sampling_rate": rate}),
        (speech(1), {"audio_kwargs": {"sampling_rate": rate}}),
        ({"array": speech(1), "sampling_rate": rate}, {}),
    ):
        with pytest.raises(ValueError, match="sampling_rate must be a positive number of hertz, got"):
            processor(audio=audio, **options)


@pytest.mark.parametrize("text, count", [("none", 0), (PROMPT, 1), ([PROMPT, "<|AUDIO|><|AUDIO|>"], 3)])
def test_as_many_recordings_as_placeholders(processor, text, count):
    for recordings in {0, 1, 2, 3, 4} - {count}:
        message = f"tokens in the prompts should be .* recordings passed, got {count} and {recordings}"
        with pytest.raises(ValueError, match=message):
            processor(text=text, audio=[speech(0.1)] * recordings or None, sampling_rate=RATE)


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
    with pytest.raises(ValueError, match='compression must be "iterative_fusion" or "none", got "?\'mean\''):
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
