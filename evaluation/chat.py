"""Questions to a language model behind any OpenAI-compatible endpoint."""

import json
import os
import re
from typing import Any

import openai

RETRIES = 5  # of the client, with growing pauses: connection errors, 408, 409, 429 and 5xx
TIMEOUT_SECONDS = 300.0


class PromptRefused(ValueError):
    """The endpoint will never answer this prompt: it is too long, or not allowed."""


class Chat:
    """A language model that answers one prompt at a time, at temperature 0; safe to use from several threads.

    Args:
        model: its name at the endpoint; by default the environment's OPENAI_MODEL.
        base_url: of the endpoint, up to `/v1`; by default OPENAI_BASE_URL, then OpenAI's own.

    The key comes from OPENAI_API_KEY alone: every user of a machine can read the arguments of a command (`ps`). An
    endpoint of one's own often needs none.

    Raises:
        ValueError: the model is not named, or the key is missing.
    """

    def __init__(self, model: str | None = None, base_url: str | None = None) -> None:
        self.model = model or os.environ.get("OPENAI_MODEL", "")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        api_key = os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)
        if not self.model:
            raise ValueError("the language model is not named; pass its name, or set OPENAI_MODEL.")
        if api_key is None:
            raise ValueError(
                "OPENAI_API_KEY is not set, and OpenAI's endpoint needs a key; set it in the environment, or pass the "
                "URL of another endpoint."
            )
        self.client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=RETRIES, timeout=TIMEOUT_SECONDS)

    def reply(self, prompt: str) -> str:
        """Returns the reply to a prompt.

        Raises:
            PromptRefused: the endpoint refused this prompt.
            ValueError: the endpoint refused altogether, or failed again and again.
        """
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
        except openai.BadRequestError as error:
            raise PromptRefused(f"{self.model} refused a prompt of {len(prompt)} characters: {error}") from error
        except openai.OpenAIError as error:
            wants_key = isinstance(error, openai.AuthenticationError)
            remedy = "set OPENAI_API_KEY in the environment to a key that it takes, and " if wants_key else ""
            raise ValueError(
                f"{self.model} at {self.client.base_url} did not answer ({error}); what was answered is saved: "
                f"{remedy}run the same command again to go on."
            ) from error
        return completion.choices[0].message.content or ""


def fill(template: str, **values: str) -> str:
    """Returns a prompt with every `{name}` of the values given replaced; all other braces are text."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)


def find_object(reply: str) -> dict[str, Any] | None:
    """Returns the last JSON object in a reply, whatever stands around it, or None."""
    decoder = json.JSONDecoder()
    found, start = None, reply.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(reply, start)
        except json.JSONDecodeError:
            end = start + 1
        start = reply.find("{", end)
    return found
