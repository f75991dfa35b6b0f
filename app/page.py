"""A page to ask about recordings and to see what the model keeps of them: a Gradio Space, or on this machine.

    fastlongspeech page --model MODEL

Whoever opens it uploads or records, and asks. The encoder works once for each recording; another question, or another
L, needs it no more.
"""

import argparse
import contextlib
import html
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import quote

import gradio as gr

from .cli import port
from .cost import ModelCost
from .picture import LIGHT, draw
from .session import Answer, Heard, Session
from .subtitles import clock

EXAMPLES = Path(__file__).parent / "space" / "examples"
# Recordings of people: what the button says, the file, a question.
EXAMPLE_QUESTIONS = (
    ("Example: a plague year", "plague.ogg", "In which country had the plague returned?"),
    ("Example: a sonnet", "sonnet.ogg", "What might never die?"),
)
CSS = """
.picture { overflow-x: auto; }
.picture svg { width: 100%; min-width: 640px; height: auto; color: var(--body-text-color); }
#answer { font-size: 1.15em; min-height: 3em; }
#answer button { color: var(--link-text-color); text-decoration: underline; padding: 0.2em 0.4em; cursor: pointer; }
#answer button:focus-visible { outline: 2px solid var(--link-text-color); }
"""
# A click on a time of the answer plays the recording from there; keys press a button as well.
PLAY = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button[data-seconds]');
    if (!button) return;
    const player = element.querySelector('audio');
    player.currentTime = Number(button.dataset.seconds);
    player.play();
});
"""


def build(session: Session) -> gr.Blocks:
    """Returns the page of a model; `launch` serves it.

    Args:
        session: who listens and answers.
    """
    counter = ModelCost(session.model.config)

    def listen(path: str | None) -> Iterator[Any]:
        # First nothing is left of the recording before: where this one is refused, nobody is answered about that.
        yield None, gr.Slider(interactive=False), "", "", ""
        if path is None:
            return
        with sentence_of(path):
            heard = session.listen([path])
        known = heard.recordings[0]
        length = min(session.model.config.target_length, known.frames)
        slider = gr.Slider(maximum=known.frames, value=length, interactive=True)
        yield heard, slider, *redraw(heard, length), ""

    def redraw(heard: Heard | None, length: float | None) -> tuple[str, str]:
        if heard is None:
            return "", ""
        tokens = whole(length)
        return picture(session, heard, tokens), saved(counter, heard, tokens)

    def answer(path: str | None, heard: Heard | None, question: str, length: float | None) -> Iterator[str]:
        if path is None or heard is None:
            raise refusal("There is no recording yet: upload one, record one, or take an example.")
        if not question.strip():
            raise refusal("The question is empty: write one.")
        tokens = whole(length)
        said = Answer("", True)
        with sentence_of(path):
            for said in stream(lambda say: session.ask(heard, question, tokens, say)):
                yield html.escape(said.text)
        place = session.find_place(heard, question, said.text)
        cut = "" if said.ended else f"<p>The answer may go on: it reached {session.max_new_tokens} tokens.</p>"
        yield html.escape(said.text) + (play_from(path, place.start) if place else "") + cut

    with gr.Blocks(title="FastLongSpeech", analytics_enabled=False) as page:
        gr.Markdown("# FastLongSpeech\nAsk about a recording of any length, and see what the model keeps of it.")
        state = gr.State(time_to_live=3600)
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    elem_id="recording", sources=["upload", "microphone"], type="filepath", label="Recording"
                )
                question = gr.Textbox(
                    elem_id="question", label="Question", placeholder="Who is speaking, and about what?", max_lines=2
                )
                ask = gr.Button("Ask", variant="primary")
                with gr.Row():
                    for label, name, asked in EXAMPLE_QUESTIONS:
                        values = str(EXAMPLES / name), asked
                        example = gr.Button(label, size="sm", min_width=140)
                        example.click(lambda values=values: values, None, [audio, question])
            with gr.Column():
                gr.Markdown("### Answer")
                said = gr.HTML(elem_id="answer", js_on_load=PLAY)
                slider = gr.Slider(
                    1, 750, 750, elem_id="length", step=1, label="L: tokens that the model reads", interactive=False
                )
                cost = gr.Markdown()
        shown = gr.HTML(elem_classes="picture")
        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        audio.change(listen, audio, [state, slider, shown, cost, said], **one_at_a_time)
        slider.input(redraw, [state, slider], [shown, cost], trigger_mode="always_last", **one_at_a_time)
        for event in (ask.click, question.submit):
            event(answer, [audio, state, question, slider], said, **one_at_a_time)
    return page


def picture(session: Session, heard: Heard, length: int) -> str:
    """Returns the picture of a recording as SVG in the colours of the page, light or dark."""
    drawn = io.StringIO()
    draw(session, heard, length).savefig(drawn, format="svg")
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    svg = svg.replace(LIGHT["ink"], "currentColor").replace(LIGHT["paper"], "var(--body-background-fill)")
    known = heard.recordings[0]
    label = f"Waveform, content density and {min(length, known.frames)} tokens of {clock(known.seconds)} minutes"
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def saved(counter: ModelCost, heard: Heard, length: int) -> str:
    """Returns what a question costs at L tokens, and without fusion."""
    known = heard.recordings[0]
    fused = counter.recording(known.seconds, length).flops["prefill"]
    whole = counter.recording(known.seconds, compression="none").flops["prefill"]
    tokens = min(length, known.frames)
    return (
        f"**{tokens}** tokens instead of {known.frames}: the language model reads the recording with "
        f"{fused / 1e9:,.1f} GFLOPs instead of {whole / 1e9:,.1f}, **{1 - fused / whole:.0%} saved**."
    )


def stream(ask: Callable[[Callable[[str], None]], Answer]) -> Iterator[Answer]:
    """Yields an answer as it grows, while it is made in a thread of its own; the last one is the whole of it.

    Only the last one may have ended.

    Raises:
        ValueError: whatever the thread raised.
    """
    said: SimpleQueue[str | Answer | Exception] = SimpleQueue()

    def work() -> None:
        try:
            said.put(ask(said.put))
        except Exception as error:  # it is raised where someone waits for the answer
            said.put(error)

    Thread(target=work, daemon=True).start()
    text = ""
    while isinstance(piece := said.get(), str):
        text += piece
        yield Answer(text, False)
    if isinstance(piece, Exception):
        raise piece
    yield piece


def play_from(path: str, seconds: float) -> str:
    """Returns a button with a time and the player that it starts there."""
    time = clock(seconds)
    return (
        f' <button type="button" data-seconds="{seconds:.2f}" aria-label="Play from {time}">[{time}]</button>'
        f'<audio controls preload="auto" src="/gradio_api/file={quote(path)}"></audio>'
    )


def whole(length: float | None) -> int:
    """Returns the tokens that the slider stands at; its field can be emptied."""
    if length is None or length < 1:
        raise refusal(f"L is {length}: choose how many tokens the model reads, 1 or more.")
    return int(length)


def refusal(sentence: str) -> gr.Error:
    """Returns the error that shows a sentence to whoever sees the page, and nothing in the log of the server."""
    return gr.Error(sentence, print_exception=False)


@contextlib.contextmanager
def sentence_of(path: str) -> Iterator[None]:
    """Shows what a wrong recording is refused with, by the name that its owner knows."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise refusal(str(error).replace(path, Path(path).name)) from error


def main(argv: list[str] | None = None) -> None:
    """Serves the page on this machine until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="fastlongspeech page", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id (default: the demo model of a checkout)")
    parser.add_argument("--port", type=port, default=7860)
    arguments = parser.parse_args(argv)
    launch(build(Session(arguments.model, progress=True)), server_port=arguments.port)


def launch(page: gr.Blocks, **options: Any) -> None:
    """Serves a page; `options` are those of `launch` of Gradio."""
    page.queue().launch(css=CSS, allowed_paths=[str(EXAMPLES)], show_error=True, **options)
