"""Recordings of any kind become the same mono samples at 16 kHz; whatever cannot is refused."""

import functools
import http.server
import logging
import shutil
import subprocess
import threading
from pathlib import Path
from unittest.mock import Mock

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
