"""The server's door: how large a request may be, and whether the client that sent it is still there."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass
class Visit:
    """One request, from its arrival to its answer.

    Attributes:
        gone: set once the client has hung up; all work for it ends then.
        recordings: what it has brought, by the names that stand for them in its chat.
    """

    gone: threading.Event = field(default_factory=threading.Event)
    recordings: dict[str, Any] = field(default_factory=dict)


VISIT: ContextVar[Visit] = ContextVar("VISIT")


class Around:
    """What has all of `inner`, but for the methods of the class."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class HungUp(Exception):
    """The client is gone; nobody waits for this answer."""


def error_body(status: int, sentence: Any) -> dict[str, Any]:
    """Returns an error in the form that OpenAI's clients show to their users."""
    return {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": str(status)}}


class Door:
    """An ASGI middleware that refuses requests that are too large, and notes when a client hangs up.

    Args:
        app: what is behind it.
        max_bytes: of a request's body.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit()
        VISIT.set(visit)
        messages: asyncio.Queue[Message] = asyncio.Queue()
        began = False
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))

        async def watch() -> None:
            """Passes the request on, and stays to see its end: what is behind the door looks only when it answers."""
            size, large = 0, announced > self.max_bytes
            while True:
                message = await receive()
                size += len(message.get("body", b""))
                large = large or size > self.max_bytes
                if large and message["type"] == "http.request" and message.get("more_body"):
                    continue  # read to its end and forgotten: a client that is cut off would not see the answer
                if message["type"] == "http.disconnect" or large:
                    visit.gone.set()
                    if large and not began and message["type"] == "http.request":
                        await self._refuse(send)
                    message = {"type": "http.disconnect"}
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    return

        async def answer(message: Message) -> None:
            nonlocal began
            began = True
            if not visit.gone.is_set():
                await send(message)

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, messages.get, answer)
        except Exception:
            if not visit.gone.is_set():  # else nobody is there to be told
                raise
        finally:
            watcher.cancel()

    async def _refuse(self, send: Callable) -> None:
        detail = (
            f"the request is larger than the {self.max_bytes // 2**20} MB that this server takes; send a compressed "
            "recording, such as MP3 or Opus, or start the server with a larger --max-upload."
        )
        body = json.dumps(error_body(413, detail)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})


__all__ = ["VISIT", "Around", "Door", "HungUp", "Visit", "error_body"]
