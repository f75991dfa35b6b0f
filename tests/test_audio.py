"""Recordings of any kind become the same mono samples at 16 kHz; whatever cannot is refused."""

import base64
import functools
import http.server
import logging
import subprocess
import threading
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, speech

from fastlongspeech import load_recording

PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>\nWhat?"


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


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


ENCODED = {
    "data: URI": lambda path: f"data:audio/wav;base64,{as_base64(path)}",
    "data: URI with a percent for a plus": lambda path: f"DATA:audio/wav;codecs=1;base64,{quote(as_base64(path))}",
    "data: URI without base64": lambda path: f"data:audio/wav,{quote(path.read_bytes())}",
    "base64": as_base64,
    "base64 in lines, without its end": lambda path: base64.encodebytes(path.read_bytes()).decode().rstrip("=\n"),
    "bytes as base64": lambda path: {"data": as_base64(path)},
    "input_audio": lambda path: {"type": "input_audio", "input_audio": {"data": as_base64(path), "format": "wav"}},
    "input_audio that is a data: URI": lambda path: {
        "input_audio": {"data": f"data:audio/wav;base64,{as_base64(path)}"}
    },
    "audio_url": lambda path: {"type": "audio_url", "audio_url": {"url": path.as_uri()}},
    "audio_url that is a data: URI": lambda path: {"audio_url": {"url": f"data:;base64,{as_base64(path)}"}},
    "audio_url that is a text": lambda path: {"type": "audio", "audio_url": str(path)},
    "url": lambda path: {"type": "audio", "url": path.as_uri()},
    "file URL": lambda path: path.as_uri(),
    "file URL of this host": lambda path: f"file://localhost{quote(str(path))}",
    "home": lambda path: f"~/{path.name}",
    "home as a path": lambda path: Path("~", path.name),
    "rate and array": lambda path: (RATE, speech(1.5)),
    "array and rate": lambda path: (speech(1.5), RATE),
    "rate and list": lambda path: [float(RATE), speech(1.5).tolist()],
    "tensor and rate": lambda path: (torch.from_numpy(speech(1.5))[None], torch.tensor(RATE)),
    "dictionary with a pair": lambda path: {"type": "audio", "audio": (RATE, speech(1.5))},
}


@pytest.mark.parametrize("give", ENCODED.values(), ids=ENCODED)
def test_every_form_that_others_send_gives_the_same_inputs(processor, wav, give, monkeypatch):
    monkeypatch.setenv("HOME", str(wav.parent))
    wav = wav.rename(wav.with_name("a b+é.wav"))
    expected = processor(text=PROMPT, audio=speech(1.5), sampling_rate=RATE)
    assert np.array_equal(load_recording(give(wav)), speech(1.5))
    for inputs in (processor(text=PROMPT, audio=give(wav)), processor(text=PROMPT, audio=[[give(wav)]])):
        for name in expected:
            assert torch.equal(inputs[name], expected[name]), name


def test_a_pair_keeps_its_own_rate_in_a_list_of_pairs(processor):
    pcm = (speech(1, 8000) * 2**15).astype(np.int16)  # as Gradio gives it
    inputs = processor(audio=[(8000, pcm), (speech(1), RATE)], sampling_rate=44100)
    assert inputs["feature_attention_mask"].sum(1).tolist() == [100, 100]


CHATS = {
    "input_audio": lambda path: {"type": "input_audio", "input_audio": {"data": as_base64(path), "format": "wav"}},
    "audio_url": lambda path: {"type": "audio_url", "audio_url": {"url": path.as_uri()}},
    "audio_url, flat": lambda path: {"type": "audio_url", "url": str(path)},
    "url": lambda path: {"type": "audio", "url": f"data:audio/wav;base64,{as_base64(path)}"},
    "pair": lambda path: {"type": "audio", "audio": (RATE, speech(1.5))},
    "no type": lambda path: {"audio": str(path)},
    "with None for what it has not": lambda path: {"type": "audio", "audio": str(path), "text": None, "url": None},
}


@pytest.mark.parametrize("part", CHATS.values(), ids=CHATS)
def test_every_audio_part_of_a_chat_reaches_the_model(processor, wav, part):
    def chat(audio):
        return [{"role": "user", "content": [audio, {"type": "text", "text": "What?", "audio": None}]}]

    stock = chat({"type": "audio", "path": str(wav)})
    assert processor.apply_chat_template(chat(part(wav))) == processor.apply_chat_template(stock)
    expected = processor.apply_chat_template(stock, tokenize=True, return_dict=True)
    inputs = processor.apply_chat_template(chat(part(wav)), tokenize=True, return_dict=True)
    assert expected["windows_per_audio"].tolist() == [1]
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    "part, got",
    [
        ({"type": "image", "url": "a.png"}, r"'image' with the keys \['type', 'url'\]"),
        ({"type": "video", "video": "a.mp4"}, "'video' with the keys"),
        ({"type": "sound", "audio": "a.wav"}, "'sound' with the keys"),
        ({"type": "text", "audio": "a.wav", "text": "What?"}, "'text' with the keys"),
        ({"type": "text"}, "'text' with the keys"),
        ({"file": {"file_data": "AAAA"}}, r"None with the keys \['file'\]"),
        ("What?", "a str"),
    ],
)
def test_a_part_of_a_chat_that_is_not_understood_is_refused(processor, part, got, tokenize):
    chat = [{"role": "user", "content": [part]}]
    for form in (chat, [chat]):
        with pytest.raises(ValueError, match=f'of the type "text" or audio, input_audio, audio_url, got {got}'):
            processor.apply_chat_template(form, tokenize=tokenize)


def test_an_audio_part_without_audio_has_a_place_in_the_prompt_only(processor):
    chat = [{"role": "user", "content": [{"type": "audio"}]}]
    assert processor.apply_chat_template(chat).count("<|AUDIO|>") == 1
    with pytest.raises(TypeError, match=r"an audio dictionary must have .* got the keys \['type'\]"):
        processor.apply_chat_template(chat, tokenize=True)


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


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_wav_that_is_cut_off_is_refused_unless_it_was_streamed(tmp_path, wav, as_bytes):
    whole = bytearray(wav.read_bytes())
    data = whole.index(b"data")

    def load(content):
        (tmp_path / "b.wav").write_bytes(content)
        return load_recording(bytes(content) if as_bytes else tmp_path / "b.wav")

    with pytest.raises(ValueError, match=r"audio is cut off: .* holds 2000 of the 96000 bytes .* again"):
        load(whole[: data + 8 + 2000])
    assert np.array_equal(load(whole + b"LIST\x04\x00\x00\x00text"), speech(1.5))
    whole[data + 4 : data + 8] = b"\xff" * 4  # what ffmpeg writes to a pipe
    assert np.array_equal(load(whole), speech(1.5))


@pytest.mark.parametrize("rate", [torch.tensor(8000), np.array(8000), np.int64(8000)])
def test_a_sampling_rate_may_be_a_scalar_of_any_kind(rate):
    assert np.array_equal(
        load_recording({"array": speech(1.5, 8000), "sampling_rate": rate}), load_recording(speech(1.5, 8000), 8000)
    )


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "aiff", "au"])
def test_files_of_common_formats(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", speech(1), RATE)
    samples = load_recording(tmp_path / f"a.{suffix}")
    assert abs(len(samples) - RATE) < 2000  # mp3 pads
    assert np.isclose(samples.std(), speech(1).std(), rtol=0.05)


def test_no_program_is_needed(tmp_path, wav, monkeypatch):
    movie = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, movie], check=True)
    monkeypatch.setenv("PATH", "")
    for audio in (movie, movie.read_bytes()):
        samples = load_recording(audio)
        assert abs(len(samples) - 1.5 * RATE) < 2100  # AAC pads
        assert np.isclose(samples.std(), speech(1.5).std(), rtol=0.05)


def test_a_flac_written_to_a_pipe_is_read_and_a_damaged_one_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", speech(8), RATE)
    flac = bytearray((tmp_path / "a.flac").read_bytes())
    with pytest.raises(ValueError, match="audio cannot be read"):
        load_recording(bytes(flac[: len(flac) // 2]))
    flac[21] &= 0xF0  # the samples of the whole in 36 bits of the header; 0: not known
    flac[22:26] = bytes(4)
    assert np.array_equal(load_recording(bytes(flac)), load_recording(tmp_path / "a.flac"))


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
        ("s3://bucket/a.wav", ValueError, "must begin with http, https, file or data, got s3://bucket/a.wav"),
        ("file://elsewhere/a.wav", ValueError, "files of this machine, but file://elsewhere/a.wav names elsewhere"),
        ("file:///missing.wav", FileNotFoundError, "audio file not found: file:///missing.wav"),
        ("~/missing.wav", FileNotFoundError, "audio file not found: ~/missing.wav"),
        ("data:audio/wav;base64", ValueError, "data:audio/wav;base64 has no comma"),
        ("data:audio/wav;base64,UklGR", ValueError, "base64 text is damaged"),
        ("data:audio/wav;base64,!!!!", ValueError, "base64 text is damaged"),
        ({"data": "/etc/hostname"}, ValueError, "base64 text is damaged|cannot be read"),  # never a path
        ("A" * 5000, ValueError, "audio cannot be read: base64 text is cut off"),
        ("so long " * 1000, FileNotFoundError, r"not found: (so long ){12}so l\.\.\. \(8000 characters\)$"),
        ("a/" * 5000 + "a.wav", FileNotFoundError, r"not found: a/.{90,100}\.\.\. \(10005 characters\)$"),
        (("a.wav", RATE), FileNotFoundError, "audio file not found: a.wav"),
        ([speech(1), "16000"], FileNotFoundError, "not found: 16000"),
        ((RATE, None), TypeError, "got object"),
        ((speech(1), True), ValueError, "sampling_rate must be a positive number of hertz, got True"),
        ((-1, speech(1)), ValueError, "sampling_rate must be a positive number of hertz, got -1"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, TypeError, r"got the keys \['format'\]"),
        ({"audio": {"audio": {}}}, TypeError, r"got the keys \[\]"),
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
