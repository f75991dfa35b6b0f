"""Audio files of any format, decoded whole or not at all: a file's bytes -> blocks of samples at its own rate.

FFmpeg decodes, through PyAV: its wheels bring FFmpeg along, on every system and for every torch. soundfile stops where
an MP3's header guesses that it ends, and reads neither M4A nor WebM; torchcodec needs an FFmpeg on the system and a
build for the very torch. No decoder says that a file is cut off: that is checked here. `docs/audio.md` has what each
of them reads.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator
from io import BytesIO
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

logger = logging.getLogger(__name__)  # not transformers', which takes seconds to import

AudioFile = str | os.PathLike | bytes | bytearray | memoryview

# FFmpeg's names of the formats that are read. They all begin with a mark of their own. Left out are raw samples, which
# FFmpeg would take for anything, and lists of other files, which it would open.
FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,nistsphere,ogg,tta,w64,wav,wv"
)
BLOCK = 2**20  # samples of a file decoded at a time
HEAD = 2**16  # bytes in which a header says how long the file is

COUNTED = {"ape", "flac", "tta", "wv"}  # the header counts the samples
SIZED = {"aiff", "au", "caf", "nistsphere", "w64", "wav"}  # so do these where the samples are PCM
# The header names the end of the longest track, if it has this; FFmpeg guesses the duration of the others.
TIMED = {
    "flv": rb"duration\0(?!\0{8})",
    "matroska,webm": rb"\x44\x89[\x84\x88]",
    "mov,mp4,m4a,3gp,3g2,mj2": rb"",
}
# The frames of an MP3 that its first frame names: flags of which the lowest says that there are any, and the number.
MP3_FRAMES = rb"(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](.{4})|VBRI.{10}(.{4})"


# How many seconds less than the header names may be read: where samples are counted, where a codec's delay or a frame
# may be counted too, and where the last picture may be.
EXACT_TOLERANCE, TOLERANCE, VIDEO_TOLERANCE = 0.01, 0.1, 1.0


def decode_file(source: AudioFile, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the sampling rate in hertz and the samples `(n, channels)`, float32, of an audio file, block by block.

    Args:
        source: a path or the bytes of a file; of several audio tracks the first is read, with a warning.
        name: what messages call it.

    Raises:
        ValueError: the file cannot be opened, is of no known format, has no audio track, is damaged, or ends before
            its header says so. The last is known only after the last block.
    """
    with _open(source, name) as file:
        yield from _decode(_with_true_sizes(file, name), name)


def recording_seconds(source: AudioFile, name: str) -> float:
    """Returns the seconds of an audio file, from its header where that tells, else by decoding it.

    An MP3's may count up to 0.1 s of silence that decoders take off its ends.

    Raises:
        ValueError: as `decode_file`; a file that ends early is found only where that shows without decoding.
    """
    with _open(source, name) as file:
        sound = _with_true_sizes(file, name)
        head = _read_at(sound, 0, HEAD)
        with _container(sound, name) as container:
            seconds = _stated_seconds(container, _audio_track(container, name), head)
    if seconds:
        return seconds
    return sum(len(samples) / rate for rate, samples in decode_file(source, name))


def pcm_to_float(samples: np.ndarray) -> np.ndarray:
    """Returns floating-point or uint8/int16/int32 PCM samples as float32, PCM scaled to [-1, 1)."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):  # an overflow becomes infinite
            return samples.astype(np.float32)
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float32) - middle) / 2.0 ** (8 * samples.dtype.itemsize - 1)


def _open(source: AudioFile, name: str) -> BinaryIO:
    """Returns a file that can be read from any place."""
    if not isinstance(source, (str, os.PathLike)):
        return BytesIO(source)
    try:
        if stat.S_ISREG(os.stat(source).st_mode):
            return open(source, "rb")
        with open(source, "rb") as pipe:  # which can be read but once
            return BytesIO(pipe.read())
    except OSError as error:
        raise ValueError(f"audio cannot be read: {name} cannot be opened ({error.strerror}).") from error


def _read_at(file: Any, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _decode(file: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """As `decode_file`, for a file whose sizes are right."""
    head = _read_at(file, 0, HEAD)
    with _container(file, name) as container:
        track = _audio_track(container, name)
        stated = _stated_seconds(container, track, head)
        frames = groupby(_frames(container, track, stated, name), lambda it: (it.sample_rate, it.layout.nb_channels))
        for (rate, _), run in frames:  # both may change where files are joined
            parts, size = [], 0
            for frame in run:
                samples = frame.to_ndarray()  # (channels, n), or (1, n * channels)
                parts.append(samples.T if frame.format.is_planar else samples.reshape(frame.samples, -1))
                size += frame.samples
                if size >= BLOCK:
                    yield rate, pcm_to_float(np.concatenate(parts))
                    parts, size = [], 0
            if parts:
                yield rate, pcm_to_float(np.concatenate(parts))


def _container(file: Any, name: str) -> Any:
    file.seek(0)
    try:
        return av.open(file, container_options={"format_whitelist": FORMATS}, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(
            f"audio cannot be read: {name} is cut off, damaged or of no format with a header that FFmpeg knows "
            f"({error.strerror}); record or fetch it again."
        ) from error


def _audio_track(container: Any, name: str) -> Any:
    tracks = container.streams.audio
    if not tracks or tracks[0].codec_context is None:
        raise ValueError(f"audio cannot be read: {name} holds no audio track that FFmpeg can decode.")
    if len(tracks) > 1:
        logger.warning(f"{name} holds {len(tracks)} audio tracks; the first is read.")
    if tracks[0].codec_context.name == "flac":
        tracks[0].codec_context.options = {"err_detect": "crccheck+explode"}  # or damaged frames pass for sound
    return tracks[0]


def _stated_seconds(container: Any, track: Any, head: bytes) -> float | None:
    """Returns the seconds that the file names itself; None where it does not and FFmpeg guesses from the bit rate."""
    format_name = container.format.name
    if (
        format_name == "ogg"
        or format_name in COUNTED
        or (format_name in SIZED and track.codec_context.name.startswith("pcm_"))
    ):
        return float(track.duration * track.time_base) if track.duration else None
    if format_name == "mp3":
        found = re.search(MP3_FRAMES, head, re.DOTALL)
        if not found or not track.rate:
            return None
        frame = 576 if track.rate < 32000 else 1152
        return int.from_bytes(found[1] or found[2], "big") * frame / track.rate or None
    if format_name in TIMED and re.search(TIMED[format_name], head) and container.duration is not None:
        return container.duration / av.time_base
    return None


def _frames(container: Any, track: Any, stated: float | None, name: str) -> Iterator[Any]:
    """Yields the decoded frames of a track, and refuses the file if they are fewer than the `stated` seconds."""
    decoded = end = 0.0
    try:
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != track.index:
                continue
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if container.format.name == "mp3" and _is_no_sound(bytes(packet)):
                    continue
                raise
            for frame in frames:
                decoded += frame.samples / frame.sample_rate
                yield frame
    except av.FFmpegError as error:
        raise ValueError(
            f"audio cannot be read: {name} is cut off or damaged after {decoded:.1f} s ({error.strerror}); record or "
            "fetch it again."
        ) from error
    if stated is None:
        return
    # Times, where the tracks of a file may have gaps; samples, where they may not.
    format_name = container.format.name
    read = end if format_name == "mp3" or format_name in TIMED else decoded
    tolerance = EXACT_TOLERANCE if format_name in COUNTED | SIZED else TOLERANCE
    if container.streams.video and format_name in TIMED:  # elsewhere it is a cover
        tolerance = VIDEO_TOLERANCE
    if read < stated - tolerance:
        raise ValueError(
            f"audio is cut off or damaged: {name} holds {read:.1f} s of the {stated:.1f} s that its header names; "
            "record or fetch it again."
        )
    if read > stated + tolerance and format_name != "ogg":  # which names its last part, of several joined
        logger.warning(f"{name} names {stated:.1f} s and holds {read:.1f} s; all of it is read.")


def _is_no_sound(packet: bytes) -> bool:
    """Whether it is zeros or a tag: what stands between and behind MP3 files that were joined or padded."""
    return packet.lstrip(b"\0")[:3] in (b"", b"ID3")


# Sizes in headers, of which FFmpeg believes too small ones and does not miss what too large ones name


class _Layout(NamedTuple):
    """How the chunks of a format are written, each an id, a size and so many bytes."""

    first: int  # where the first begins
    id_bytes: int
    size_bytes: int
    order: Any  # of the size's bytes
    counted: int  # bytes of its own header that a size counts
    alignment: int  # of the next chunk
    samples: bytes  # the id of the samples


RIFF = _Layout(12, 4, 4, "little", 0, 2, b"data")
AIFF = RIFF._replace(order="big", samples=b"SSND")
W64_SAMPLES = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
LAYOUTS = {  # by the bytes 0 to 3 and 8 to 11 of a file
    (b"RIFF", b"WAVE"): RIFF,
    (b"RF64", b"WAVE"): RIFF,
    (b"BW64", b"WAVE"): RIFF,
    (b"RIFF", b"AVI "): RIFF._replace(first=0, samples=b"RIFF"),
    (b"FORM", b"AIFF"): AIFF,
    (b"FORM", b"AIFC"): AIFF,
    (b"caff", b"desc"): _Layout(8, 4, 8, "big", 0, 1, b"data"),
    (b"riff", b"\xa5\xd6\x28\xdb"): _Layout(40, 16, 8, "little", 24, 8, W64_SAMPLES),
}
UNKNOWN = {4: 0x7FFF0000, 8: 2**62}  # what a size of so many bytes is at least whose writer could not know it


class _Samples(NamedTuple):
    begin: int  # where they begin
    place: int  # of their size in bytes
    size_bytes: int
    layout: _Layout


class _File:
    """A file as PyAV reads it, from `start` on and with the bytes `mended` at their places."""

    def __init__(self, file: BinaryIO, start: int, mended: dict[int, bytes]):
        self.file, self.start, self.mended = file, start, mended

    def read(self, size: int) -> bytes:
        here = self.file.tell()
        part = bytearray(self.file.read(size))
        for place, mended in self.mended.items():
            low, high = max(here, place), min(here + len(part), place + len(mended))
            if low < high:
                part[low - here : high - here] = mended[low - place : high - place]
        return bytes(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset + (self.start if whence == os.SEEK_SET else 0), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start


def _with_true_sizes(file: BinaryIO, name: str) -> Any:
    """Returns a file as it is, or with the true size of its samples where its header names too small a one or none.

    Raises:
        ValueError: the file is empty or ends before its samples do.
    """
    total = file.seek(0, os.SEEK_END)
    if not total:
        raise ValueError(f"audio is empty: {name} holds no samples.")
    start, head = 0, _read_at(file, 0, 12)
    while head[:3] == b"ID3":  # a tag, which FFmpeg does not expect before a WAV
        start += 10 + sum(byte << 7 * shift for shift, byte in enumerate(head[9:5:-1]))
        head = _read_at(file, start, 12)
    if head[:4] == b"OggS":
        _refuse_cut_ogg(file, start, total, name)
    as_it_is = _File(file, start, {}) if start else file
    samples = _find_samples(file, start, total, head)
    if samples is None:
        return as_it_is
    counted, order = samples.layout.counted, samples.layout.order
    size = int.from_bytes(_read_at(file, samples.place, samples.size_bytes), order)
    named, there = size - counted, total - samples.begin
    unknown = size >= UNKNOWN[samples.size_bytes]
    if there < named and not unknown:
        raise ValueError(
            f"audio is cut off: {name} holds {there} of the {named} bytes of samples that its header names; record or "
            "fetch it again."
        )
    if not unknown:
        end = samples.begin + named
        # Fewer than 8 bytes are no chunk, but do not matter. Some writers forget to align.
        places = {end, end + -named % samples.layout.alignment}
        if there - named < 8 or any(_is_chunk(file, place, total, samples.layout) for place in places):
            if not named:  # FFmpeg would read on
                raise ValueError(f"audio is empty: {name} holds no samples.")
            return as_it_is
        logger.warning(f"{name} names {named} bytes of samples and holds {there}; all of them are read.")
    if there + counted >= 256**samples.size_bytes:
        return as_it_is  # FFmpeg knows these
    mended = {samples.place: (there + counted).to_bytes(samples.size_bytes, order)}
    if samples.layout == AIFF:
        mended[start + 4] = (total - start - 8).to_bytes(4, order)  # it must name all chunks
    return _File(file, start, mended)


def _find_samples(file: BinaryIO, start: int, total: int, head: bytes) -> _Samples | None:
    """Returns where the samples of a file are, if its format has chunks and one of them is for samples."""
    if head[:4] == b".snd":  # AU has no chunks, but says where its samples begin and how many bytes they are
        layout = RIFF._replace(order="big", id_bytes=0)
        return _Samples(start + int.from_bytes(head[4:8], "big"), start + 8, 4, layout)
    found = LAYOUTS.get((head[:4], head[8:]))
    if found is None:
        return None
    layout = found
    place, width, long_size = start + layout.first, layout.id_bytes + layout.size_bytes, 0
    while place + width <= total:
        chunk = _read_at(file, place, width)
        size = int.from_bytes(chunk[layout.id_bytes :], layout.order)
        begin = place + width
        if chunk[: layout.id_bytes] == layout.samples:
            if long_size and size == 0xFFFFFFFF:  # RF64 has it elsewhere
                return _Samples(begin, long_size, 8, layout)
            return _Samples(begin, place + layout.id_bytes, layout.size_bytes, layout)
        if chunk[:4] == b"ds64":
            long_size = begin + 8
        size -= layout.counted
        if size < 0:
            return None
        place = begin + size + -size % layout.alignment
    return None


def _is_chunk(file: BinaryIO, place: int, total: int, layout: _Layout) -> bool:
    """Whether a chunk or a tag stands there."""
    head = _read_at(file, place, layout.id_bytes + layout.size_bytes)
    size = int.from_bytes(head[layout.id_bytes :], layout.order) - layout.counted
    named = layout.id_bytes > 0 and all(0x20 <= byte < 0x7F for byte in head[:4])
    return head[:3] in (b"TAG", b"ID3") or (named and 0 <= size <= total - place - len(head))


def _refuse_cut_ogg(file: BinaryIO, start: int, total: int, name: str) -> None:
    """Raises a ValueError unless every stream in an OGG file has its last page, which is marked, and has it whole."""
    place, unfinished = start, set[bytes]()
    while place < total:
        page = _read_at(file, place, 27)
        if page[:4] != b"OggS" or len(page) < 27:
            break
        place += 27 + page[26] + sum(file.read(page[26]))
        last, serial = page[5] & 4, page[14:18]
        (unfinished.discard if last else unfinished.add)(serial)
    if unfinished or place > total:
        raise ValueError(
            f"audio is cut off or damaged: {name} is an OGG file that breaks off before its marked end; record or "
            "fetch it again."
        )


__all__ = ["decode_file", "pcm_to_float", "recording_seconds"]
