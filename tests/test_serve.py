"""`fastlongspeech serve` on loopback, asked by OpenAI's own client. What the demo model should answer comes from the
model itself, called without any server."""

import base64
import functools
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
import uvicorn

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor, load_recording
from fastlongspeech.serve.command import build

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "checkpoints" / "fastlongspeech-demo")
DEMO = ROOT / "demo" / "recording.flac"
ARRIVAL, FOOD = "When does Patrick arrive?", "What is the favorite food of Helen?"
LIMIT = 8 * 2**20

Client = openai.OpenAI


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where clients may name files; beside it lies one that they may not."""
    place = tmp_path_factory.mktemp("place")
    (place / "allowed").mkdir()
    (place / "allowed" / "recording.flac").write_bytes(DEMO.read_bytes())
    (place / "secret.flac").write_bytes(DEMO.read_bytes())
    (place / "allowed" / "link.flac").symlink_to(place / "secret.flac")
    return place / "allowed"


@pytest.fixture(scope="module")
def app(folder: Path) -> Any:
    return build(MODEL, device="cpu", max_bytes=LIMIT, keep_bytes=100 * 2**20, folder=folder)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Client]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def direct() -> Callable[..., str]:
    """Asks the model without a server, about one recording in a chat, whose place there is `{"type": "audio"}`."""
    processor = FastLongSpeechProcessor.from_pretrained(MODEL)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(MODEL).eval()
    encode = functools.cache(lambda path: model.encode(**processor(audio=str(path))))

    def ask(path: Path, chat: list[dict[str, Any]], target_length: int | None = None, tokens: int = 20) -> str:
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        recordings = encode(path)
        inputs = processor.apply_chat_template(chat, recordings=recordings, target_length=target_length, **options)
        ids = model.generate(**inputs, recordings=recordings, max_new_tokens=tokens, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


@pytest.fixture(scope="module")
def ten_minutes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recording, over and over for 600 s."""
    samples = load_recording(str(DEMO))
    path = tmp_path_factory.mktemp("long") / "long.mp3"
    soundfile.write(path, np.resize(samples, 600 * 16000), 16000)
    return path


def heard(path: Path, form: str = "flac") -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def named(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def ask(client: Client, *messages: Any, tokens: int = 20, **options: Any) -> Any:
    options = {"model": MODEL, "temperature": 0, **options}
    return client.chat.completions.create(messages=list(messages), max_tokens=tokens, **options)


def text_of(completion: Any) -> str:
    return completion.choices[0].message.content


# Chats


def test_the_model_is_listed(client: Client) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]


def test_a_question_about_a_recording(client: Client) -> None:
    completion = ask(client, turn(heard(DEMO), ARRIVAL))
    assert text_of(completion) == "on tuesday at ten"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens > 750 and completion.usage.completion_tokens < 20


def test_every_way_to_give_a_recording(client: Client, folder: Path) -> None:
    data = base64.b64encode(DEMO.read_bytes()).decode()
    for part in (
        named(f"data:audio/flac;base64,{data}"),
        named("recording.flac"),
        named(str(folder / "recording.flac")),
        named((folder / "recording.flac").as_uri()),
    ):
        assert text_of(ask(client, turn(part, ARRIVAL))) == "on tuesday at ten"


def test_an_answer_comes_piece_by_piece(client: Client) -> None:
    stream = ask(client, turn(heard(DEMO), ARRIVAL), stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == "on tuesday at ten"
    assert sum(bool(piece) for piece in pieces) > 1


def test_a_stop_string_ends_the_answer(client: Client) -> None:
    assert text_of(ask(client, turn(heard(DEMO), ARRIVAL), stop=["day"])) == "on tues"


@pytest.mark.parametrize("stop", [["y at", "ten"], "sday", "x", []])
def test_a_stop_string_is_no_part_of_the_answer(client: Client, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    expected = re.split("|".join(stops), "on tuesday at ten")[0] if stops else "on tuesday at ten"
    assert text_of(ask(client, turn(heard(DEMO), ARRIVAL), stop=stop)) == expected
    stream = ask(client, turn(heard(DEMO), ARRIVAL), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_a_temperature_samples(client: Client, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    generate = app.state.model.generate

    def note(**inputs: Any) -> Any:
        seen.append(bool(inputs["generation_config"].do_sample))
        return generate(**inputs)

    monkeypatch.setattr(app.state.model, "generate", note)
    sampling: list[dict[str, Any]] = [
        {"temperature": 1.5},
        {"temperature": 0},
        {"temperature": openai.omit},
        {"temperature": openai.omit, "top_p": 0.9},
        {"temperature": 0, "top_p": 0.9},
    ]
    for fields in sampling:
        ask(client, turn(heard(DEMO), ARRIVAL), tokens=1, **fields)
    assert seen == [True, False, False, True, False]


def test_the_length_is_one_of_the_request(client: Client, direct: Callable[..., str]) -> None:
    for length in (12, 100):
        expected = direct(DEMO, [turn({"type": "audio"}, FOOD)], length)
        for extra in ({"target_length": length}, {"chat_template_kwargs": {"target_length": length}}):
            completion = ask(client, turn(heard(DEMO), FOOD), extra_body=extra)
            assert text_of(completion) == expected
            assert length < completion.usage.prompt_tokens < length + 60


@pytest.mark.slow
def test_ten_minutes_and_several_turns_about_them(
    client: Client, direct: Callable[..., str], ten_minutes: Path
) -> None:
    asked = [turn(heard(ten_minutes, "mp3"), ARRIVAL)]
    known = [turn({"type": "audio"}, ARRIVAL)]
    answer = text_of(ask(client, *asked))
    assert answer
    for chat in (asked, known):
        chat += [turn(answer, role="assistant"), turn(FOOD)]
    assert text_of(ask(client, *asked)) == direct(ten_minutes, known)


def test_several_turns_about_a_recording(client: Client, direct: Callable[..., str]) -> None:
    history = [turn("on tuesday at ten", role="assistant"), turn(FOOD)]
    found = text_of(ask(client, turn(heard(DEMO), ARRIVAL), *history))
    assert found == direct(DEMO, [turn({"type": "audio"}, ARRIVAL), *history])


def test_eight_clients_at_once(client: Client, direct: Callable[..., str]) -> None:
    questions = [ARRIVAL, FOOD] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: text_of(ask(client, turn(heard(DEMO), question))), questions))
    expected = [direct(DEMO, [turn({"type": "audio"}, question)]) for question in (ARRIVAL, FOOD)]
    assert answers == expected * 4


# What is refused, each with a sentence

REFUSED: list[tuple[str, Any, str]] = [
    ("broken audio", turn(named("data:audio/wav;base64,UklGRgAAAAA="), "What?"), "audio"),
    ("no base64", turn({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, "What?"), "damaged"),
    ("nothing in it", turn({"type": "input_audio", "input_audio": {}}, "What?"), "must hold audio as text"),
    ("a file beside the folder", turn(named("../secret.flac"), "What?"), "the folder that clients may read holds no"),
    ("a link that leads out", turn(named("link.flac"), "What?"), "the folder that clients may read holds no"),
    ("a system file", turn(named("file:///etc/passwd"), "What?"), "the folder that clients may read holds no"),
    ("a URL that is not there", turn(named("http://127.0.0.1:9/x.wav"), "What?"), "audio cannot be fetched from"),
    ("a picture", turn({"type": "image_url", "image_url": {"url": "x"}}, "What?"), "must be text, input_audio or"),
    ("no comma", turn(named("data:audio/wav;base64"), "What?"), "must have a comma"),
    ("a long name", turn(named("x" * 5000), "What?"), "the folder that clients may read holds no"),
    ("a number", {"role": "user", "content": 3}, "the content of a message must be a text or a list"),
    ("no content", {"role": "user"}, "the content of a message must be a text or a list"),
    ("a part without text", turn({"type": "text"}), "must hold a text"),
    ("a placeholder", turn(heard(DEMO), "<|AUDIO|>"), "a text must not hold <.AUDIO.>"),
    ("no messages", None, "messages must be a list with a turn or more"),
]


@pytest.mark.parametrize(("what", "message", "sentence"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_can_not_be_read_is_a_bad_request(client: Client, what: str, message: Any, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence) as error:
        ask(client, *([] if message is None else [message]))
    assert error.value.status_code == 400


@pytest.mark.parametrize("length", [0, -3, 2.5, "many", True, 10**30])
def test_a_length_that_makes_no_sense(client: Client, length: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="target_length must be a positive integer"):
        ask(client, turn(heard(DEMO), ARRIVAL), extra_body={"target_length": length})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n", 2, "n can't be taken into account"),
        ("response_format", {"type": "json_object"}, "response_format can't be taken into account"),
        ("logprobs", True, "logprobs can't be taken into account"),
        ("top_logprobs", 3, "top_logprobs can't be taken into account"),
        ("tools", [{"type": "function"}], "tools can't be taken into account"),
        ("stop", "", "none of them empty"),
        ("stop", 3, "stop must be a text or a list"),
        ("temperature", -1, "temperature must be a number from 0 to 2"),
        ("temperature", "warm", "temperature must be a number from 0 to 2"),
        ("top_p", 0, "top_p must be above 0"),
        ("top_p", 1.5, "top_p must be a number from 0 to 1"),
        ("max_tokens", 0, "max_tokens must be a positive integer"),
        ("chat_template_kwargs", "x", "chat_template_kwargs must be an object"),
    ],
)
def test_a_wish_of_which_nothing_would_come(
    client: Client, field: str, value: Any, sentence: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, turn("Hello"), extra_body={field: value}, stream=stream)


def test_fields_that_ask_for_nothing_do_no_harm(client: Client) -> None:
    fields = {"n": 1, "response_format": {"type": "text"}, "logprobs": False, "tools": None, "stop": None, "user": "x"}
    assert ask(client, turn(heard(DEMO), ARRIVAL), tokens=2, extra_body=fields).choices


def test_a_request_that_is_no_json(client: Client) -> None:
    answer = httpx.post(f"{client.base_url}chat/completions", content=b"{", trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the request must be a JSON object")


def test_another_model_is_not_loaded(client: Client) -> None:
    answer = httpx.post(str(client.base_url.join("/load_model")), json={"model": "gpt-4o"}, trust_env=False)
    assert answer.status_code == 404 and "is not served here" in answer.json()["error"]["message"]


def test_another_model_is_not_found(client: Client) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here; ask for"):
        ask(client, turn("Hello"), model="gpt-4o")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.audio.transcriptions.create(model="whisper-1", file=DEMO)


def test_a_request_that_is_too_large(client: Client, tmp_path: Path) -> None:
    data = base64.b64encode(bytes(LIMIT)).decode()
    with pytest.raises(openai.APIStatusError, match="larger than the 8 MB that this server takes") as error:
        ask(client, turn({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, "What?"))
    assert error.value.status_code == 413

    def blocks() -> Iterator[bytes]:  # no length is announced
        yield b'{"model": "'
        for _ in range(LIMIT // 2**16 + 1):
            yield b"x" * 2**16
        yield b'"}'

    answer = httpx.post(f"{client.base_url}chat/completions", content=blocks(), timeout=60, trust_env=False)
    assert answer.status_code == 413 and "larger than the 8 MB" in answer.json()["error"]["message"]


def test_no_other_door_opens_files(client: Client) -> None:
    """transformers' server has more addresses; recordings that they name would be read by the processor."""
    content = [{"type": "audio_url", "audio_url": {"url": str(DEMO)}}, {"type": "input_text", "text": "What?"}]
    with pytest.raises(openai.BadRequestError, match="recordings are taken by /v1/chat/completions alone"):
        client.post(
            "/responses", body={"model": MODEL, "input": [{"role": "user", "content": content}]}, cast_to=object
        )


# Hanging up

FOREVER = 1_000_000  # tokens: whoever waits for these waits longer than any test


@pytest.fixture
def endless(app: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers do not end by themselves."""
    model = app.state.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)


def test_a_stream_that_is_closed_frees_the_model(client: Client, endless: None) -> None:
    stream = ask(client, turn(heard(DEMO), ARRIVAL), tokens=FOREVER, stream=True)
    next(iter(stream))
    stream.close()
    assert text_of(ask(client, turn(heard(DEMO), ARRIVAL), tokens=4))  # else it would wait for all of these tokens


def test_a_client_that_does_not_wait_frees_the_model(client: Client, endless: None) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=2), turn(heard(DEMO), ARRIVAL), tokens=FOREVER)
    assert text_of(ask(client, turn(heard(DEMO), ARRIVAL), tokens=4))


# Listening once


@pytest.fixture
def encodings(app: Any) -> Iterator[list[int]]:
    """The windows of every batch that the encoder reads from now on."""
    seen: list[int] = []
    hook = app.state.model.get_encoder("audio").register_forward_hook(lambda m, inputs, o: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def noise(seconds: float, seed: int) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * 16000))
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


def test_a_recording_is_encoded_once(client: Client, encodings: list[int]) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(noise(31, 5)).decode(), "format": "wav"}}
    first = text_of(ask(client, turn(part, ARRIVAL), tokens=3))
    assert sum(encodings) == 2
    assert text_of(ask(client, turn(part, ARRIVAL), tokens=3)) == first
    ask(client, turn(part, FOOD), tokens=3, extra_body={"target_length": 50})
    client.audio.transcriptions.create(model=MODEL, file=("noise.wav", noise(31, 5)))
    assert sum(encodings) == 2


# Transcripts


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 32 s of the demo recording: two windows."""
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, load_recording(str(DEMO))[: 32 * 16000], 16000, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def words(clip: Path) -> list[str]:
    """What the CTC decoder hears in it, without a server."""
    processor = FastLongSpeechProcessor.from_pretrained(MODEL)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(MODEL).eval()
    with torch.no_grad():
        return processor.ctc_decode(model.ctc_transcribe(**processor(audio=str(clip))))[0].split()


def transcribe(client: Client, clip: Path, **options: Any) -> Any:
    return client.audio.transcriptions.create(model=MODEL, file=clip, **options)


def test_a_transcript_as_json_and_as_text(client: Client, clip: Path, words: list[str]) -> None:
    assert len(words) > 40
    assert transcribe(client, clip).text.split() == words
    assert transcribe(client, clip, response_format="text").split() == words


def test_a_transcript_with_times(client: Client, clip: Path, words: list[str]) -> None:
    options: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    found = transcribe(client, clip, **options)
    assert [word.word for word in found.words] == words
    times = [time for word in found.words for time in (word.start, word.end)]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= found.duration == 32
    assert " ".join(segment.text for segment in found.segments).split() == words
    assert found.segments[0].start == found.words[0].start and found.segments[-1].end == found.words[-1].end
    # where nothing sounds, no word is said
    samples = np.abs(load_recording(str(clip)))
    loud = [samples[int(word.start * 16000) : int(word.end * 16000) + 1].max() for word in found.words]
    assert np.median(loud) > 0.1


def test_a_transcript_as_subtitles(client: Client, clip: Path, words: list[str]) -> None:
    srt = transcribe(client, clip, response_format="srt")
    cues = re.findall(r"(\d+)\n(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})\n((?:.+\n)+)", srt)
    assert [int(cue[0]) for cue in cues] == list(range(1, len(cues) + 1)) and len(cues) > 3
    assert " ".join(cue[3] for cue in cues).split() == words
    vtt = transcribe(client, clip, response_format="vtt")
    assert vtt.startswith("WEBVTT\n") and vtt.count(" --> ") == len(cues)


@pytest.mark.slow
def test_ten_minutes_are_transcribed_whole(client: Client, ten_minutes: Path) -> None:
    found = transcribe(client, ten_minutes, response_format="verbose_json")
    assert found.duration == pytest.approx(600, abs=0.1)
    assert found.segments[-1].end > 590


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"response_format": "diarized_json"}, "response_format must be one of json, text, verbose_json, srt, vtt"),
        ({"language": "en"}, "language can't be taken into account here"),
        ({"prompt": "names"}, "prompt can't be taken into account here"),
        ({"temperature": 0.7}, "temperature must be 0"),
        (
            {"response_format": "verbose_json", "timestamp_granularities": ["letter"]},
            "timestamp_granularities may be word and segment, got letter",
        ),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities need response_format=verbose_json"),
    ],
)
def test_what_a_transcript_can_not_be(client: Client, clip: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        transcribe(client, clip, **options)


def test_a_file_that_is_no_recording(client: Client) -> None:
    with pytest.raises(openai.BadRequestError, match="audio"):
        client.audio.transcriptions.create(model=MODEL, file=("notes.wav", b"these are no samples" * 50))
    with pytest.raises(openai.BadRequestError, match="file is empty"):
        client.audio.transcriptions.create(model=MODEL, file=("notes.wav", b""))
