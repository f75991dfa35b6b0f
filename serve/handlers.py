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
        options = dict(body.get("chat_template_kwargs") or {})
        if "target_length" in body:
            options["target_length"] = body.pop("target_length")
        length = options.get("target_length", 1)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise HTTPException(400, f"target_length must be a positive integer, got {length!r}.")
        body["chat_template_kwargs"] = options
        try:
            body["messages"] = await asyncio.to_thread(self._read, body.get("messages"))
            return await super().handle_request(body, request_id)
        except HungUp:
            return Response(status_code=499)  # nobody reads it
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def _read(self, messages: Any) -> list[dict[str, Any]]:
        """Returns a chat in which every recording is read and has a name of its visit."""
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with a turn or more.")
        visit, recordings = VISIT.get(), self.model_manager.recordings
        read = []
        for message in messages:
            if not isinstance(message, dict) or "role" not in message:
                raise ValueError("a message must have a role and a content.")
            content = message.get("content")
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
                    parts.append(part)
                message = {**message, "content": parts}
            read.append(message)
        return read


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
            granularities = form.getlist("timestamp_granularities[]") or ["segment"]
            content = b"" if file is None or isinstance(file, str) else await file.read()
        check_name(self.model_manager, name)
        shape = str(options.get("response_format", "json"))
        if shape not in FORMATS:
            raise HTTPException(400, f"response_format must be one of {', '.join(FORMATS)}, got {shape!r}.")
        if unknown := sorted(set(options) - FIELDS):
            raise HTTPException(400, f"{', '.join(unknown)} can't be taken into account here; leave it out.")
        if str(options.get("temperature", "0")) not in ("0", "0.0"):
            raise HTTPException(400, "temperature must be 0: the CTC decoder writes what it hears.")
        if not content:
            raise HTTPException(400, "file must be a recording that is uploaded.")
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
        return _written(words, recording.seconds, shape, [str(one) for one in granularities])


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
