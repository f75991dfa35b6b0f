"""The command `show`: a picture of what a model keeps of a recording.

fastlongspeech show interview.mp3 -o interview.png --target-length 200
"""

import argparse
from pathlib import Path

import matplotlib  # noqa: F401  # said to be missing before a model is loaded

from .cli import positive
from .commands import check_recording, describe, refuse_existing


def main(argv: list[str] | None = None) -> None:
    """Draws the recording that the arguments name.

    Raises:
        FileNotFoundError, ValueError: the picture's file exists, its ending is no kind of picture, or the recording
            can't be read.
    """
    parser = argparse.ArgumentParser(prog="fastlongspeech show", description="Draw what a model keeps of a recording.")
    parser.add_argument("recording", metavar="RECORDING", help="audio file or URL")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="picture.png, .svg or .pdf")
    parser.add_argument("--model", help="folder or Hub id (default: the demo model of a checkout)")
    parser.add_argument("--target-length", type=positive, metavar="L", help="frames to fuse the recording to")
    parser.add_argument("--dark", action="store_true", help="light on dark")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {output} must end in .png, .svg or .pdf.")
    refuse_existing(output)
    check_recording(arguments.recording)
    output.parent.mkdir(parents=True, exist_ok=True)

    from .picture import draw
    from .session import Session

    session = Session(arguments.model, progress=True)
    heard = session.listen([arguments.recording])
    describe(heard, session.tokens(heard, arguments.target_length))
    draw(session, heard, arguments.target_length, dark=arguments.dark).savefig(output, dpi=150)
    print(output)
