"""Answers one question through every way to shorten a recording, at several lengths.

    python examples/compare_compressions.py demo/recording.flac "When does Patrick arrive?"

Needs `pip install -e .` (or `make demo`). For scores over many questions see docs/evaluation.md.
"""

import argparse
from pathlib import Path

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="audio file")
    parser.add_argument("question")
    parser.add_argument("--model", default=DEMO, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--target-lengths", type=int, nargs="+", default=[750, 400, 200, 100], metavar="L")
    arguments = parser.parse_args(argv)

    processor = FastLongSpeechProcessor.from_pretrained(arguments.model)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(arguments.model)
    recordings = model.encode(**processor(audio=[arguments.recording]))  # once, for all that follows
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": arguments.question}]}
    inputs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, recordings=recordings
    )

    # "none" keeps every frame, whatever the length; more than the model has learnt to read may confuse it.
    conditions = [(name, length) for name in COMPRESSIONS for length in arguments.target_lengths]
    for name, length in [*conditions, ("none", len(recordings.frames))]:
        ids = model.generate(
            **inputs,
            recordings=recordings,
            compression=name,
            target_length=length,
            max_new_tokens=20,
            do_sample=False,
        )
        answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        print(f"{name:20} {length:6} frames: {answer}", flush=True)


if __name__ == "__main__":
    main()
