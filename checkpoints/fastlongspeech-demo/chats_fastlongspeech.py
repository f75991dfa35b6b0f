"""Chats as transformers writes them, from those that users write: OpenAI's parts, and parts without a type."""

from collections.abc import Callable, Mapping
from typing import Any

from .audio_fastlongspeech import SOURCE_KEYS

AUDIO_TYPES = ("audio", "input_audio", "audio_url")


def plain_chats(conversation: Any, load: Callable) -> list:
    """Returns a conversation, or a list of them, as transformers writes it, with its audio parts `load`ed.

    Args:
        conversation: messages, or lists of them.
        load: makes a recording of a part; None is just its place.

    Raises:
        ValueError: a part of a chat is neither audio nor text.
    """
    if isinstance(conversation[0], Mapping):
        return [_plain_message(message, load) for message in conversation]
    return [[_plain_message(message, load) for message in messages] for messages in conversation]


def _plain_part(part: Any, load: Callable) -> dict[str, Any]:
    """Returns a part of a chat as transformers writes it, `load`ed if it is audio; None of `load` is just a place."""
    got = f"a {type(part).__name__}"
    if isinstance(part, Mapping):
        kind, has_source = part.get("type"), any(part.get(key) is not None for key in SOURCE_KEYS)
        if kind in AUDIO_TYPES or (kind is None and has_source):
            loaded = load(part)
            return {"type": "audio"} if loaded is None else {"type": "audio", "audio": loaded}
        if kind in ("text", None) and isinstance(part.get("text"), str) and not has_source:
            return {"type": "text", "text": part["text"]}
        got = f"{kind!r} with the keys {sorted(part)}"
    raise ValueError(f'a part of a chat must be of the type "text" or {", ".join(AUDIO_TYPES)}, got {got}.')


def _plain_message(message: Mapping, load: Callable) -> Mapping:
    if not isinstance(message.get("content"), (list, tuple)):
        return message
    return {**message, "content": [_plain_part(part, load) for part in message["content"]]}


__all__ = ["plain_chats"]
