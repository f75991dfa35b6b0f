"""The `fastlongspeech` command: ask about recordings, transcribe one, say what that costs, or score a model.

    fastlongspeech ask interview.mp3 "Where does Anna live?"
    fastlongspeech transcribe interview.mp3 --output interview.srt
    fastlongspeech cost interview.mp3 --target-length 200
    fastlongspeech evaluate --task qa --data questions.jsonl --model MODEL --output FOLDER

The answer goes to stdout; durations, windows, frames, tokens and seconds to stderr.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .commands import disable_loading_bar, print_answer, print_cost
from .defaults import MAX_NEW_TOKENS, QWEN2_AUDIO
from .transcribe import FORMATS, TIMES, print_transcript

# Commands whose module has a `main(argv)`: the module, the extra of this package that it needs, a line of help.
MODULES = {
    "convert": ("fastlongspeech.hub.convert", "train", "bring the weights of others into a complete folder of ours"),
    "prepare": ("fastlongspeech.data.prepare", "train", "make a manifest of a published dataset"),
    "check-data": ("fastlongspeech.data.check", "train", "find what is wrong with a manifest before training does"),
    "serve": ("fastlongspeech.serve.command", "serve", "answer the clients of OpenAI's interface over HTTP"),
    "push": ("fastlongspeech.hub.push", "train", "publish a model on a Hub, and try what was published"),
    "plan-training": ("fastlongspeech.train.plan", "train", "say what a training step takes, before it is run"),
    "evaluate": ("fastlongspeech.evaluation.run", "eval", "score a model on a benchmark"),
    "page": ("fastlongspeech.app.page", "page", "serve a page to ask and to see what the model keeps"),
    "show": ("fastlongspeech.app.show", "page", "draw what the model keeps of a recording"),
    "assemble": ("fastlongspeech.app.assemble", "gguf", "make an untrained model of a Whisper and a language model"),
    "small": ("fastlongspeech.small.weights", "small", "print the folder of the small model; make it first"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in MODULES:
            run_module(argv[0], argv[1:])
        else:
            arguments = parse_arguments(argv)
            arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"fastlongspeech: {error}", file=sys.stderr)
        return 1
    return 0


def run_module(command: str, argv: list[str]) -> None:
    """Runs a command of `MODULES`.

    Raises:
        ValueError: a package that the command needs is missing.
    """
    module, extra, _ = MODULES[command]
    try:
        main = import_module(module).main
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{command} needs {error.name}, which is missing; install it with: pip install 'fastlongspeech[{extra}]'."
        ) from error
    disable_loading_bar()
    main(argv)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments of a command, `run` with them the function that carries it out; or leaves with usage."""
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--model", help="folder or Hub id (default: the demo model of a checkout)")
    sizes.add_argument("--target-length", type=positive, metavar="L", help="frames to fuse a recording to")
    sizes.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help=f"longest answer (default: {MAX_NEW_TOKENS})"
    )
    sizes.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
    shared = argparse.ArgumentParser(add_help=False, parents=[sizes])
    shared.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an NVIDIA or AMD GPU if there is one)")
    shared.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])

    parser = argparse.ArgumentParser(prog="fastlongspeech", description="Ask about recordings of any duration.")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(("ask", "transcribe", "cost", *MODULES)))
    ask_parser = commands.add_parser("ask", parents=[shared], help="answer a question about recordings")
    ask_parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="audio file or URL")
    ask_parser.add_argument("question", metavar="QUESTION")
    ask_parser.set_defaults(run=print_answer)
    transcribe_parser = commands.add_parser("transcribe", parents=[shared], help="write down what is said")
    transcribe_parser.add_argument("recording", metavar="RECORDING", help="audio file or URL")
    transcribe_parser.add_argument("--ctc", action="store_true", help="by the CTC decoder, not the language model")
    transcribe_parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, or txt")
    transcribe_parser.add_argument("--times", choices=TIMES, help="what has times (default: segments)")
    transcribe_parser.add_argument(
        "--output", metavar="FILE", help="file to write; a run that was stopped goes on where it was"
    )
    transcribe_parser.set_defaults(run=print_transcript)
    cost_parser = commands.add_parser(
        "cost",
        parents=[sizes],
        help="floating-point operations of a question about each recording, without running or loading the model",
        description=f"No weights are read, and nothing is downloaded for --model {QWEN2_AUDIO}.",
    )
    cost_parser.add_argument("recordings", nargs="*", metavar="RECORDING", help="audio file or URL")
    cost_parser.add_argument("--seconds", type=float, nargs="+", metavar="S", help="durations instead of recordings")
    cost_parser.add_argument(
        "--compression-ratio", type=positive, metavar="N", help="summed up, N frames in each summary token"
    )
    cost_parser.set_defaults(run=print_cost)
    for command, (_, _, help_line) in MODULES.items():
        commands.add_parser(command, add_help=False, help=f"{help_line}; see {command} --help")

    arguments = parser.parse_args(argv)
    if arguments.run is print_cost and bool(arguments.recordings) == bool(arguments.seconds):
        cost_parser.error("give either recordings or --seconds.")
    if arguments.run is print_answer and not arguments.question.strip():
        ask_parser.error("QUESTION is empty; write one.")
    if getattr(arguments, "ctc", False) and (arguments.target_length, arguments.max_new_tokens) != (None, None):
        transcribe_parser.error("--ctc reads every frame: --target-length and --max-new-tokens have no meaning.")
    if arguments.run is print_transcript:
        if arguments.json and arguments.format not in (None, "json"):
            transcribe_parser.error(f"--json and --format {arguments.format} exclude each other.")
        wanted = "json" if arguments.json else arguments.format
        ending = Path(arguments.output or "").suffix.lower().removeprefix(".")
        if ending not in FORMATS:
            ending = ""
        if wanted and ending and wanted != ending:
            transcribe_parser.error(f"--output {arguments.output} and the format {wanted} differ; change one of them.")
        arguments.format = wanted or ending or "txt"
        if arguments.times and arguments.format == "txt":
            transcribe_parser.error("--times has no meaning in plain text; pass --format json, srt or vtt.")
    return arguments


def positive(text: str) -> int:
    """Returns the integer that an argument holds; below 1 it is refused before anything is loaded."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a positive integer, got {text}.")
    return int(text)


def not_negative(text: str) -> int:
    """Returns the integer that an argument holds; below 0 it is refused."""
    return 0 if text == "0" else positive(text)


def port(text: str) -> int:
    """Returns the port that an argument names; one that can't be listened at is refused."""
    if positive(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"a port is at most 65535, got {text}.")
    return int(text)
