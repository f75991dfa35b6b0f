"""How fast a server answers 1, 4 and 8 clients that ask about ten minutes, with recordings kept and without.

    python -m fastlongspeech.speed.serving checkpoints/fastlongspeech-demo --page docs/serving.md

A server is started on this machine for each row of the table. Each client asks `--questions` questions about one
recording, which all share, one after the other, and measures the seconds from its request to the first piece of the
answer. With recordings kept, one question before the clock starts brings the recording; its own seconds are reported
as the first question's.
"""

import argparse
import base64
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import openai
import soundfile
import torch

from fastlongspeech import load_recording
from fastlongspeech.app.markdown import insert_blocks, table

CLIENTS = (1, 4, 8)
QUESTION = "When does Patrick arrive?"
DEMO = Path(__file__).parents[1] / "demo" / "recording.flac"


class Answered(NamedTuple):
    """Seconds from a request to the first piece of its answer, and to its end."""

    first: float
    whole: float


def start(model: str, keep: int, device: str) -> tuple[subprocess.Popen, openai.OpenAI]:
    """Returns a server of its own process that answers, and a client for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastlongspeech", "serve", model, "--port", str(port), "--keep", str(keep)]
    server = subprocess.Popen([*command, "--device", device], stdout=subprocess.DEVNULL, env=os.environ)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=1800)
    while True:
        try:
            client.models.list()
            return server, client
        except openai.APIConnectionError:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode} before it answered.") from None
            time.sleep(0.2)


def ask(client: openai.OpenAI, model: str, audio: str) -> Answered:
    """Returns how long one answer takes."""
    part = {"type": "input_audio", "input_audio": {"data": audio, "format": "mp3"}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    begin, first = time.perf_counter(), None
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=16, temperature=0, stream=True
    ):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
    whole = time.perf_counter() - begin
    return Answered(whole if first is None else first, whole)


def measure(model: str, keep: int, clients: int, questions: int, audio: str, device: str) -> tuple[str, ...]:
    """Returns one row of the table."""
    server, client = start(model, keep, device)
    try:
        cold = ask(client, model, audio)
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda _: ask(client, model, audio), range(clients * questions)))
        seconds = time.perf_counter() - begin
    finally:
        server.terminate()
        server.wait()
    firsts = [answer.first for answer in answers]
    return (
        "kept" if keep else "not kept",
        str(clients),
        f"{cold.first:.2f} s",
        f"{median(firsts):.2f} s",
        f"{max(firsts):.2f} s",
        f"{60 * len(answers) / seconds:.0f}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and puts it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=int, default=600, metavar="S", help="of the recording (default: 600)")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N", help="(default: 1 4 8)")
    parser.add_argument("--questions", type=int, default=3, metavar="N", help="of each client (default: 3)")
    parser.add_argument("--page", type=Path, help="page whose block `load` is written anew")
    arguments = parser.parse_args(argv)
    with tempfile.NamedTemporaryFile(suffix=".mp3") as file:
        samples = np.resize(load_recording(str(DEMO)), arguments.seconds * 16_000)
        soundfile.write(file.name, samples, 16_000)
        audio = base64.b64encode(Path(file.name).read_bytes()).decode()
    rows = []
    for keep in (2048, 0):
        for clients in arguments.clients:
            row = measure(arguments.model, keep, clients, arguments.questions, audio, arguments.device)
            rows.append(row)
            print(row, flush=True)
    headings = ("recordings", "clients", "first question", "further ones, median", "slowest", "answers per minute")
    cores = os.cpu_count()
    place = torch.cuda.get_device_name() if arguments.device != "cpu" else f"a CPU with {cores} cores"
    text = (
        table(headings, rows)
        + f"\n\nSeconds to the first piece of an answer about {arguments.seconds} s, on {place}. Made by "
        + f"`python -m fastlongspeech.speed.serving {arguments.model} --device {arguments.device} --seconds "
        + f"{arguments.seconds} --questions {arguments.questions} --clients {' '.join(map(str, arguments.clients))}`."
    )
    print(text)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(
            insert_blocks(page, {"load": text}, str(arguments.page), "speed/serving.py"), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
