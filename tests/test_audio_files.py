"""Audio files of any format are read whole, or refused; `ffmpeg` makes them."""

import logging
import re
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import soxr
from conftest import RATE, speech

from fastlongspeech import load_recording
from fastlongspeech.decoding_fastlongspeech import decode_file, recording_seconds

SECONDS = 6.0
ID3 = b"ID3\x03\0\0\0\0\x02\x00" + bytes(256)


def recording(seconds: float = SECONDS) -> np.ndarray:
    """A tone that rises and grows, so that no two moments of it sound alike."""
    time = np.arange(round(seconds * RATE)) / RATE
    return (speech(seconds) + 0.3 * np.sin(2 * np.pi * 200 * time**2)).astype(np.float32) * (time / seconds) ** 4


def ffmpeg(*arguments) -> bytes:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture
def make(tmp_path):
    """Makes a file of `recording()`, or of another file, with ffmpeg's options; its name is the last of them."""
    soundfile.write(tmp_path / "source.wav", recording(), RATE)

    def make(*options, source: str = "source.wav") -> Path:
        path = tmp_path / options[-1]
        ffmpeg("-i", tmp_path / source, *options[:-1], path)
        return path

    return make


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: " ".join(record.message for record in caplog.records)


def seconds_of(audio) -> float:
    return len(load_recording(audio)) / RATE


# What is cut off

FILES = {
    "wav": ["a.wav"],
    "wav of 24 bit": ["-c:a", "pcm_s24le", "a.wav"],
    "wav of A-law": ["-c:a", "pcm_alaw", "a.wav"],
    "rf64": ["-rf64", "always", "a.wav"],
    "w64": ["a.w64"],
    "aiff": ["a.aiff"],
    "au": ["a.au"],
    "caf": ["a.caf"],
    "flac": ["a.flac"],
    "flac in ogg": ["-c:a", "flac", "a.oga"],
    "tta": ["a.tta"],
    "wavpack": ["a.wv"],
    "mp3": ["a.mp3"],
    "mp3 with a variable bit rate": ["-q:a", "6", "a.mp3"],
    "vorbis": ["-c:a", "libvorbis", "a.ogg"],
    "opus": ["a.opus"],
    "webm": ["-c:a", "libopus", "a.webm"],
    "matroska": ["-c:a", "libvorbis", "a.mkv"],
    "m4a": ["a.m4a"],
    "m4a for streaming": ["-movflags", "faststart", "a.m4a"],
    "mp4 in fragments": ["-movflags", "frag_keyframe+empty_moov", "-frag_duration", "1000000", "a.mp4"],
    "flv": ["-ar", "44100", "a.flv"],
    "avi": ["a.avi"],
}


@pytest.mark.parametrize("options", FILES.values(), ids=FILES)
def test_a_whole_file_is_read_and_its_first_half_refused(make, options):
    whole = make(*options)
    content = whole.read_bytes()
    assert abs(seconds_of(whole) - SECONDS) < 0.15
    assert abs(recording_seconds(whole, "it") - SECONDS) < 0.15
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"audio (is cut off|cannot be read).*" + whole.name):
        load_recording(whole)
    with pytest.raises(ValueError, match=r"audio (is cut off|cannot be read).*bytes"):
        load_recording(content[: len(content) // 2])


def test_an_mp3_that_ends_before_its_header_says_so_is_refused_with_both_durations(make):
    content = make("a.mp3").read_bytes()
    with pytest.raises(ValueError, match=r"holds [23]\.\d s of the 6\.\d s that its header names; record or fetch it"):
        load_recording(content[: len(content) // 2])


@pytest.mark.parametrize("pages", [1, 2])
def test_an_ogg_without_its_marked_end_is_refused(make, pages):
    content = make("-page_duration", "1000000", "a.opus").read_bytes()
    places = [found.start() for found in re.finditer(b"OggS", content)]
    with pytest.raises(ValueError, match="audio is cut off or damaged: bytes is an OGG file that breaks off"):
        load_recording(content[: places[-pages]])


@pytest.mark.parametrize("options", [["a.flac"], ["-frame_size", "256", "a.flac"], ["a.ogg"], ["a.mp3"], ["a.m4a"]])
def test_a_file_with_a_damaged_middle_is_refused(make, options):
    content = bytearray(make(*options).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1500] = bytes(range(250)) * 6
    with pytest.raises(ValueError, match="cut off or damaged"):
        load_recording(content)


# What cannot say how long it is


def test_an_mp3_without_a_header_is_read_to_its_end(make):
    # Loud at first: what guesses from the first seconds' bit rate believes that it is shorter.
    path = make("-af", "areverse", "-q:a", "6", "-write_xing", "0", "a.mp3")
    assert abs(seconds_of(path) - SECONDS) < 0.15
    assert abs(recording_seconds(path, "it") - SECONDS) < 0.15


def test_an_mp3_whose_header_names_too_few_frames_is_read_to_its_end_with_a_warning(make, warnings):
    content = bytearray(make("-q:a", "6", "a.mp3").read_bytes())
    frames = content.index(b"Xing") + 8
    content[frames : frames + 4] = (40).to_bytes(4, "big")
    assert abs(seconds_of(content) - SECONDS) < 0.15
    assert "bytearray names 1.4 s and holds 6." in warnings()


@pytest.mark.parametrize("between", [b"", bytes(2000), b"TAG" + bytes(125)], ids=["tag", "zeros", "old tag"])
@pytest.mark.parametrize("header", [0, 1])
def test_mp3_files_that_are_joined_are_read_one_after_the_other(make, between, header):
    one = make("-write_xing", header, "a.mp3").read_bytes()  # ffmpeg begins it with an ID3 tag
    assert one.startswith(b"ID3")
    if between.startswith(b"TAG"):
        assert abs(seconds_of(one + between) - SECONDS) < 0.15
    else:
        assert abs(seconds_of(one + between + one + between) - 2 * SECONDS) < 0.3


@pytest.mark.parametrize("codec", ["libvorbis", "libopus"])
def test_ogg_files_that_are_joined_are_read_one_after_the_other(make, codec):
    one = make("-c:a", codec, "a.ogg").read_bytes()
    assert abs(seconds_of(one + one) - 2 * SECONDS) < 0.1
    with pytest.raises(ValueError, match="cut off"):
        load_recording(one + one[: len(one) // 2])


@pytest.mark.parametrize(
    "options",
    [
        ("-f", "wav"),
        ("-f", "w64"),
        ("-f", "wav", "-rf64", "always"),
        ("-f", "au"),
        ("-f", "aiff"),
        ("-f", "caf"),
        ("-f", "flac"),
        ("-f", "mp3"),
        ("-f", "ogg"),
        ("-f", "matroska", "-c:a", "libvorbis"),
        ("-f", "webm", "-c:a", "libopus", "-live", "1"),
        ("-f", "mp4", "-movflags", "frag_keyframe+empty_moov"),
        ("-f", "adts"),
        ("-f", "mpegts"),
    ],
    ids=" ".join,
)
def test_what_ffmpeg_writes_to_a_pipe_is_read_to_its_end(make, tmp_path, options):
    content = ffmpeg("-i", make("a.wav"), *options, "-")
    assert abs(seconds_of(content) - SECONDS) < 0.2


def test_a_pipe_is_a_file(wav):
    with subprocess.Popen(["cat", wav], stdout=subprocess.PIPE) as process:
        assert np.array_equal(load_recording(f"/dev/fd/{process.stdout.fileno()}"), speech(1.5))


# Sizes in headers


def set_size(content: bytearray, mark: bytes, size: int, order: Literal["little", "big"]) -> None:
    place = content.index(mark) + 4
    content[place : place + 4] = size.to_bytes(4, order)


@pytest.mark.parametrize("size", [0, 50_000])
@pytest.mark.parametrize("form", ["wav", "aiff", "au"])
def test_a_header_that_names_fewer_samples_than_there_are_is_not_believed(make, warnings, form, size):
    path = make(f"a.{form}")
    content, expected = bytearray(path.read_bytes()), load_recording(path)
    mark, order = {"wav": (b"data", "little"), "aiff": (b"SSND", "big"), "au": (b".snd\0\0\0", "big")}[form]
    set_size(content, mark, size, order) if form != "au" else content.__setitem__(
        slice(8, 12), size.to_bytes(4, "big")
    )
    assert np.array_equal(load_recording(content), expected)
    assert re.search(rf"bytearray names {size} bytes of samples and holds 1920\d\d; all of them are read", warnings())


@pytest.mark.parametrize("padding", [b"", b"\0"])  # some writers forget to align
def test_chunks_after_the_samples_of_a_wav_are_not_sound(warnings, wav, padding):
    tail = b"LIST\x04\0\0\0text" + b"id3 \x02\0\0\0ab" + b"ID3\x04" + bytes(50)
    assert np.array_equal(load_recording(wav.read_bytes() + tail), speech(1.5))
    soundfile.write(wav, np.zeros(10001, np.uint8) + speech(10001 / RATE), RATE, subtype="PCM_U8")
    content = wav.read_bytes()[: 44 + 10001]
    assert len(load_recording(content + padding + tail)) == 10001
    assert not warnings()


def test_a_wav_of_no_samples_is_empty(make):
    content = bytearray(make("a.wav").read_bytes())
    set_size(content, b"data", 0, "little")
    del content[content.index(b"data") + 8 :]
    for empty in (content, content + b"LIST\x04\0\0\0text"):
        with pytest.raises(ValueError, match="audio is empty: bytearray holds no samples"):
            load_recording(empty)


# What has no header


@pytest.mark.parametrize("form", ["mulaw", "alaw", "s16le", "f32le"])
@pytest.mark.parametrize("name", ["x.ul", "x.al", "x.mp3", "x.wav", "x"])
def test_raw_samples_are_refused(make, form, name):
    with pytest.raises(ValueError, match=rf"audio cannot be read: .*{name} is (cut off|damaged)"):
        load_recording(make("-f", form, name))


def test_a_list_of_other_files_is_refused(make, tmp_path):
    make("-f", "mpegts", "a.ts")
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "a.ffconcat").write_text("ffconcat version 1.0\nfile 'a.ts'\n")
    for name in ("a.m3u8", "a.ffconcat"):
        with pytest.raises(ValueError, match=f"audio cannot be read: .*{name}"):
            load_recording(tmp_path / name)


# Tracks


def test_the_sound_of_a_video_is_a_recording_however_long_its_pictures_are(make, tmp_path):
    for seconds in (2, 9):
        pictures = ("-f", "lavfi", "-i", f"testsrc=s=64x64:r=5:d={seconds}", "-map", "0:a", "-map", "1:v")
        for name in ("a.mp4", "a.mkv", "a.avi", "a.ts"):
            assert abs(seconds_of(make(*pictures, "-c:v", "mpeg4", name)) - SECONDS) < 0.2
    content = make(*pictures, "-c:v", "mpeg4", "a.mkv").read_bytes()
    with pytest.raises(ValueError, match="cut off"):
        load_recording(content[: len(content) // 2])


def test_of_several_tracks_the_first_is_read_with_a_warning(make, tmp_path, warnings):
    make("-t", "2", "short.wav")
    path = make("-i", tmp_path / "short.wav", "-map", "0", "-map", "1", "two.m4a")
    assert abs(seconds_of(path) - SECONDS) < 0.15
    assert "two.m4a holds 2 audio tracks; the first is read" in warnings()


def test_a_file_without_sound_is_refused(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:r=5:d=1", tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4 holds no audio track"):
        load_recording(tmp_path / "a.mp4")


@pytest.mark.parametrize("form", ["mp3", "flac", "m4a"])
def test_a_picture_of_a_cover_is_no_sound(make, tmp_path, form, warnings):
    ffmpeg("-f", "lavfi", "-i", "color=s=300x300:d=1", "-frames:v", "1", tmp_path / "cover.png")
    cover = ("-i", tmp_path / "cover.png", "-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v", "attached_pic")
    assert abs(seconds_of(make(*cover, f"a.{form}")) - SECONDS) < 0.15
    assert not warnings()


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "aiff"])
def test_a_tag_before_a_file_is_no_sound(make, form):
    content = make(f"a.{form}").read_bytes()
    assert np.array_equal(load_recording(ID3 + ID3 + content), load_recording(content))


# Samples


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM"]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_have_the_samples_that_soundfile_reads(tmp_path, subtype, channels):
    sound = np.stack([speech(1, seed=channel) for channel in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype=subtype)
    expected = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)[0].mean(axis=1)
    assert np.array_equal(load_recording(tmp_path / "a.wav"), expected)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000])
@pytest.mark.parametrize("form", ["wav", "flac"])
def test_files_of_any_rate_and_six_channels_become_16_khz(tmp_path, rate, form):
    sound = np.stack([speech(1, rate, seed=channel) for channel in range(6)], axis=1)
    soundfile.write(tmp_path / f"a.{form}", sound, rate, subtype="PCM_24")
    mono = soundfile.read(tmp_path / f"a.{form}", dtype="float32")[0].mean(axis=1)
    np.testing.assert_allclose(
        load_recording(tmp_path / f"a.{form}"), soxr.resample(mono, rate, RATE, quality="HQ"), atol=1e-6
    )


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.ogg", "a.opus", "a.webm"])
def test_lossy_files_begin_where_the_recording_does_and_have_ffmpegs_samples(make, name):
    samples, path = load_recording(make(name)), make(name)
    rate = 48000 if name in ("a.opus", "a.webm") else RATE
    stock = np.frombuffer(ffmpeg("-i", path, "-f", "f32le", "-ac", "1", "-"), dtype=np.float32)
    stock = soxr.resample(stock, rate, RATE, quality="HQ")
    assert abs(len(samples) - len(stock)) < 0.005 * RATE  # FFmpeg 8.1 leaves 4 ms of Opus's delay in WebM
    lag = np.argmax(np.correlate(samples[3 * RATE : 4 * RATE], recording()[3 * RATE + 200 : 4 * RATE - 200])) - 200
    assert abs(lag) < 0.005 * RATE
    if name != "a.webm":
        np.testing.assert_allclose(samples, stock, atol=0.01 if name == "a.opus" else 1e-5)


def test_long_files_are_read_in_blocks(make, monkeypatch):
    expected = load_recording(make("-ar", "44100", "-ac", "2", "a.flac"))
    monkeypatch.setattr("fastlongspeech.decoding_fastlongspeech.BLOCK", 10_000)
    blocks = [samples for _, samples in decode_file(make("-ar", "44100", "-ac", "2", "a.flac"), "it")]
    assert max(map(len, blocks)) < 20_000 and len(blocks) > 10
    np.testing.assert_allclose(load_recording(make("-ar", "44100", "-ac", "2", "a.flac")), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_of_channels_that_cancel_each_other_one_is_taken_with_a_warning(make, warnings, name):
    one = load_recording(make("mono.wav"))
    both = load_recording(make("-af", "pan=stereo|c0=c0|c1=-1*c0", name))
    np.testing.assert_allclose(both, one, atol=0.05 if name == "a.mp3" else 1e-6)
    assert f"channels of {make(name)} cancel each other" in warnings()


def test_channels_of_an_array_that_cancel_each_other_are_not_silence(warnings):
    silent = np.zeros_like(speech(1))
    assert np.array_equal(load_recording(np.stack([silent, speech(1), -speech(1)]), RATE), speech(1))
    assert "cancel each other" in warnings()


def test_channels_of_different_sound_are_averaged_without_a_warning(warnings):
    sound = np.stack([speech(1), speech(1, seed=1), 0 * speech(1)])
    np.testing.assert_allclose(load_recording(sound, RATE), sound.mean(axis=0), atol=1e-7)
    assert not warnings()


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_floating_point_samples_at_the_scale_of_integers_are_scaled_with_a_warning(tmp_path, warnings, bits):
    loud = (speech(1) / np.abs(speech(1)).max() * 2.0 ** (bits - 1)).astype(np.float32)
    expected = loud / 2.0 ** (bits - 1)
    soundfile.write(tmp_path / "a.wav", loud, RATE, subtype="FLOAT")
    for audio in (tmp_path / "a.wav", loud):
        np.testing.assert_allclose(load_recording(audio, RATE), expected, rtol=1e-6)
    assert f"they are scaled to 1, as {bits}-bit integers are" in warnings()


def test_loud_samples_and_clicks_stay_as_they_are(warnings):
    loud, clicks = 3 * speech(1), speech(1)
    clicks[::2000] = 1000
    for samples in (loud, clicks):
        assert np.array_equal(load_recording(samples, RATE), samples)
    assert not warnings()


def test_samples_beyond_any_scale_are_refused():
    with pytest.raises(ValueError, match=r"samples of at most 1, but ndarray has some up to 3e\+1\d; scale them"):
        load_recording(speech(1) * 1e15, RATE)
