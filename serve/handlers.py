"""What the server does with a chat and with a recording to transcribe, where transformers' own handlers do not know
recordings."""

import asyncio
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.transcription import TranscriptionHandler

from ..app.subtitles import Segment, as_srt, as_vtt, segments
from ..app.words import Word, ctc_words
from .door import VISIT, HungUp
from .fields import StoppingManager, check_fields
from .model import NAMED, Manager, check_name
from .recordings import Recording

AUDIO_TYPES = ("input_audio", "audio_url")
FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
FIELDS = {"file", "model", "response_format", "timestamp_granularities[]", "temperature"}


class ChatHandler(ChatCompletionHandler):
    """Answers chats: transformers' handler, with recordings read before it and named in their place."""

    model_manager: Manager

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Returns the answer, streamed or not. `target_length` (L) stands in the request or in `chat_template_kwargs`.

        Raises:
            HTTPException: 404 for another model, 400 for what can't be read or makes no sense.
        """
        check_name(self.model_manager, body.get("model", self.model_manager.force_model))
        try:
            check_fields(body)
            body["messages"] = await asyncio.to_thread(self._read, body.get("messages"))
            return await super().handle_request(body, request_id)
        except HungUp:
            return Response(status_code=499)  # nobody reads it
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        return super()._streaming(*args, **_until_stop(kwargs))

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        return await super()._non_streaming(*args, **_until_stop(kwargs))

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature", "top_p" in body):  # else they would do nothing for a model that is greedy by itself
            config.do_sample = True
        return config

    def _read(self, messages: Any) -> list[dict[str, Any]]:
        """Returns a chat in which every recording is read and has a name of its visit."""
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with a turn or more.")
        visit, recordings = VISIT.get(), self.model_manager.recordings
        read = []
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError("a message must have a role and a content.")
            content = message.get("content")
            if not isinstance(content, str | list) or content == []:
                raise ValueError(f"the content of a message must be a text or a list of parts, got {content!r}.")
            if isinstance(content, list):
                parts = []
                for part in content:
                    kind = part.get("type") if isinstance(part, dict) else None
                    if kind in AUDIO_TYPES:
                        recording = recordings.take(recordings.read(part))
                        name = f"{NAMED}{recording.name}"
                        visit.recordings[name] = recording
                        part = {"type": "audio_url", "audio_url": {"url": name}}
                    elif kind != "text":
                        raise ValueError(f"a part of a message must be text, input_audio or audio_url, got {kind!r}.")
                    elif not isinstance(part.get("text"), str):
                        raise ValueError(f"a part of the type 'text' must hold a text, got {part.get('text')!r}.")
                    parts.append(part)
                message = {**message, "content": parts}
            read.append(message)
        return read


def _until_stop(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "gen_manager": StoppingManager(kwargs["gen_manager"])}


class TranscriptHandler(TranscriptionHandler):
    """Writes recordings of any duration down by the CTC decoder, whose frames say when each word is said."""

    model_manager: Manager

    async def handle_request(self, request: Request) -> Any:
        """Returns the transcript in one of `FORMATS`.

        Raises:
            HTTPException: 404 for another model, 400 for what can't be read, or is asked for and can't be done.
        """
        async with request.form() as form:
            file, name = form.get("file"), form.get("model")
            options = {key: value for key, value in form.multi_items() if key not in ("file", "model")}
            granularities = [str(one) for one in form.getlist("timestamp_granularities[]")]
            content = b"" if file is None or isinstance(file, str) else await file.read()
        check_name(self.model_manager, name)
        shape = str(options.get("response_format", "json"))
        if shape not in FORMATS:
            raise HTTPException(400, f"response_format must be one of {', '.join(FORMATS)}, got {shape!r}.")
        if unknown := sorted(set(options) - FIELDS):
            raise HTTPException(400, f"{', '.join(unknown)} can't be taken into account here; leave it out.")
        if unknown := sorted(set(granularities) - {"word", "segment"}):
            raise HTTPException(400, f"timestamp_granularities may be word and segment, got {', '.join(unknown)}.")
        if granularities and shape != "verbose_json":
            raise HTTPException(400, "timestamp_granularities need response_format=verbose_json.")
        if str(options.get("temperature", "0")) not in ("0", "0.0"):
            raise HTTPException(400, "temperature must be 0: the CTC decoder writes what it hears.")
        if file is None or isinstance(file, str):
            raise HTTPException(400, "file must be a recording that is uploaded.")
        if not content:
            raise HTTPException(400, "file is empty; upload a recording that holds samples.")
        model, processor = self.model_manager.served
        recordings, visit = self.model_manager.recordings, VISIT.get()

        def write(recording: Recording) -> list[Word]:
            if visit.gone.is_set():
                raise HungUp
            encoded = recordings.encode(recording, model.inner, visit.gone)
            return ctc_words(model.inner, processor.inner, encoded)[0]

        try:
            recording = await asyncio.to_thread(recordings.take, content)
            manager: Any = self.generation_state.get_manager(str(name))
            words = await manager.async_submit(write, recording)
        except HungUp:
            return Response(status_code=499)  # nobody reads it
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return _written(words, recording.seconds, shape, granularities or ["segment"])


def _written(words: list[Word], seconds: float, shape: str, granularities: list[str]) -> Response:
    """Returns a transcript in one of `FORMATS`."""
    text, cues = " ".join(word.text for word in words), segments(words)
    if shape == "text":
        return PlainTextResponse(f"{text}\n")
    if shape == "srt":
        return PlainTextResponse(as_srt(cues))
    if shape == "vtt":
        return PlainTextResponse(as_vtt(cues), media_type="text/vtt")
    if shape == "json":
        return JSONResponse({"text": text})
    result: dict[str, Any] = {"task": "transcribe", "language": "unknown", "duration": seconds, "text": text}
    if "segment" in granularities:
        result["segments"] = [{"id": number} | _timed(cue) for number, cue in enumerate(cues)]
    if "word" in granularities:
        result["words"] = [{"word": word.text, "start": word.start, "end": word.end} for word in words]
    return JSONResponse(result)


def _timed(cue: Segment) -> dict[str, Any]:
    return {"start": cue.start, "end": cue.end, "text": cue.text}


__all__ = ["ChatHandler", "TranscriptHandler"]
