"""The command `serve`: what it refuses, and when it says where it is."""

import socket
import threading
import time
from typing import Any

import pytest
import uvicorn

from fastlongspeech.serve import command


@pytest.mark.parametrize("arguments", [["--port", "99999"], ["--port", "0"], ["--max-upload", "-1"], ["--keep", "-1"]])
def test_arguments_that_can_not_be_served_with_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["model", *arguments])
    assert error.value.code == 2


def test_the_address_is_printed_once_the_server_listens(capsys: pytest.CaptureFixture[str]) -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    taken = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(nothing, port=taken.getsockname()[1], lifespan="off", log_level="critical")
    with pytest.raises(SystemExit):
        command.Server(config, "serves").run()
    assert capsys.readouterr().out == ""
    taken.close()
    server = command.Server(uvicorn.Config(nothing, port=0, lifespan="off", log_level="critical"), "serves")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    server.should_exit = True
    thread.join()
    assert capsys.readouterr().out == "serves\n"
