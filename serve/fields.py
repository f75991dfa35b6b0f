"""The fields of a chat beside its messages: wrong values, and fields of which nothing would come, are refused."""

import asyncio
from collections.abc import Sequence
from typing import Any

from .door import Around

LONGEST = 2**31  # frames and tokens, above any recording's and any context's

# What transformers' handler takes and forgets. The values here ask for nothing, and so do no harm.
FORGOTTEN: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
}


def check_fields(body: dict[str, Any]) -> None:
    """Checks the fields of a chat, and writes `target_length` and `stop` in one form; null fields are dropped.

    Raises:
        ValueError: a field makes no sense, or nothing would come of it.
    """
    for name in [name for name, value in body.items() if value is None and name != "messages"]:
        del body[name]
    for name, harmless in FORGOTTEN.items():
        if name in body and body[name] not in harmless:
            raise ValueError(f"{name} can't be taken into account here, got {str(body[name])[:200]}; leave it out.")
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body and not _is_count(body[name]):
            raise ValueError(f"{name} must be a positive integer below 2**31, got {str(body[name])[:200]}.")
    for name, least, most in (("temperature", 0, 2), ("top_p", 0, 1), ("frequency_penalty", -1, 2)):
        value: Any = body.get(name)
        if name in body and not (_is_number(value) and least <= value <= most):
            raise ValueError(f"{name} must be a number from {least} to {most}, got {str(value)[:200]}.")
    if body.get("top_p") == 0:
        raise ValueError("top_p must be above 0, got 0; for the likeliest answer pass temperature=0.")
    if body.get("frequency_penalty") == -1:
        raise ValueError("frequency_penalty must be above -1, got -1.")
    body["chat_template_kwargs"] = _prompt_options(body)
    if stops := _stops(body.pop("stop", [])):
        body["stop"] = stops


def _prompt_options(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be an object, got {str(options)[:200]}.")
    options = dict(options)
    if "target_length" in body:
        options["target_length"] = body.pop("target_length")
    if not _is_count(length := options.get("target_length", 1)):
        raise ValueError(f"target_length must be a positive integer below 2**31, got {str(length)[:200]!r}.")
    return options


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop must be a text or a list of texts, none of them empty, got {str(stop)[:200]!r}.")
    return stops


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < LONGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LONGEST  # so not NaN


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of its stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class StoppingManager(Around):
    """A manager of transformers' server whose answers end before their stop string, and not after it."""

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kwargs: Any) -> Any:
        text, *others = await self.inner.generate_non_streaming(model, processor, inputs, config, **kwargs)
        return before_stop(text, config.stop_strings or ()), *others

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kwargs: Any) -> Any:
        queue, streamer = self.inner.generate_streaming(model, processor, inputs, config, **kwargs)
        return (StoppingQueue(queue, config.stop_strings) if config.stop_strings else queue), streamer


class StoppingQueue:
    """A queue of pieces of an answer, up to its stop string. What may be the beginning of one is held back.

    Args:
        queue: gives pieces of text, and None at the end.
        stops: the stop strings.
    """

    def __init__(self, queue: asyncio.Queue, stops: Sequence[str]) -> None:
        self.queue, self.stops = queue, stops
        self.held, self.stopped, self.ended = "", False, False

    async def get(self) -> Any:
        return self._pass(await self.queue.get())

    def get_nowait(self) -> Any:
        return self._pass(self.queue.get_nowait())

    def _pass(self, item: Any) -> Any:
        if item is None and not self.ended:  # what is held was no beginning; None follows it
            self.ended = True
            self.queue.put_nowait(None)
            return self.held
        if not isinstance(item, str):
            return item
        text = "" if self.stopped else self.held + item
        sure = before_stop(text, self.stops)
        self.stopped = self.stopped or sure != text
        kept = 0
        if not self.stopped:
            longest = min(len(text), max(map(len, self.stops)) - 1)
            starts = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops))
            kept = next(starts, 0)
        self.held = text[len(text) - kept :] if kept else ""
        return sure[: len(sure) - kept]


__all__ = ["StoppingManager", "check_fields"]
