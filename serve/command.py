"""Serves a model to OpenAI's clients: the server of transformers, with recordings that are listened to once.

    fastlongspeech serve checkpoints/fastlongspeech-demo --port 8000

Chats at /v1/chat/completions, transcripts at /v1/audio/transcriptions, the model's name at /v1/models.
"""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import python_multipart  # noqa: F401  # without it uploads would fail when the first one comes
import uvicorn
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from transformers.cli.serving import server
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerationState

from ..app.cli import not_negative, port, positive
from ..app.defaults import find_model
from .door import Door, error_body
from .handlers import ChatHandler, TranscriptHandler
from .model import Manager

MEGABYTE = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command until it is stopped."""
    parser = argparse.ArgumentParser(prog="fastlongspeech serve", description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or Hub id (default: a checkout's demo model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=port, default=8000, help="(default: 8000)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an NVIDIA or AMD GPU if there is one)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--max-upload", type=positive, default=256, metavar="MB", help="largest request (default: 256)"
    )
    parser.add_argument(
        "--keep",
        type=not_negative,
        default=2048,
        metavar="MB",
        help="room for encoded recordings (default: 2048; 0: none)",
    )
    parser.add_argument("--allow-folder", type=Path, metavar="FOLDER", help="whose files clients may name")
    arguments = parser.parse_args(argv)
    if arguments.allow_folder is not None and not arguments.allow_folder.is_dir():
        raise ValueError(f"--allow-folder {arguments.allow_folder} is no folder; name one that holds recordings.")
    name = find_model(arguments.model)
    app = build(
        name,
        device=arguments.device,
        dtype=arguments.dtype,
        max_bytes=arguments.max_upload * MEGABYTE,
        keep_bytes=arguments.keep * MEGABYTE,
        folder=arguments.allow_folder,
    )
    config = uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning")
    Server(config, f"serves {name} at http://{arguments.host}:{arguments.port}/v1").run()


class Server(uvicorn.Server):
    """A server that says where it is once it listens there.

    Args:
        config: what it serves, and where.
        said: what it prints.
    """

    def __init__(self, config: uvicorn.Config, said: str) -> None:
        super().__init__(config)
        self.said = said

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.said, flush=True)


def build(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    max_bytes: int = 256 * MEGABYTE,
    keep_bytes: int = 2048 * MEGABYTE,
    folder: Path | None = None,
) -> Any:
    """Returns the server as an ASGI application, with the model loaded.

    Args:
        name: the model's folder or Hub id, by which clients ask for it.
        device, dtype: as `load_model` takes them.
        max_bytes: of a request.
        keep_bytes: room for encoded recordings between requests.
        folder: whose files clients may name.
    """
    manager = Manager(name, device, dtype, max_bytes=max_bytes, keep_bytes=keep_bytes, folder=folder)
    state = GenerationState()
    handlers: dict[str, Any] = {
        "chat_handler": ChatHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
        "transcription_handler": TranscriptHandler(manager, state),
    }
    if "systemone_handler" in inspect.signature(server.build_server).parameters:  # newer than transformers 5.17
        from transformers.cli.serving.systemone import SystemOneHandler

        handlers["systemone_handler"] = SystemOneHandler(manager, state)
    app = server.build_server(manager, generation_state=state, **handlers)
    app.add_middleware(Door, max_bytes=max_bytes)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_malformed)
    app.state.model = manager.served[0].inner
    return app


def _answer_error(request: Any, error: Any) -> JSONResponse:
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code)


def _answer_malformed(request: Any, error: Any) -> JSONResponse:
    return JSONResponse(error_body(400, f"the request must be a JSON object: {error.errors()[0]['msg']}."), 400)


if __name__ == "__main__":
    main()
