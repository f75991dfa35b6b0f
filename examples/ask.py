"""Asks several questions about one recording, which is encoded only once.

    python examples/ask.py demo/recording.flac "When does Patrick arrive?" "What is the favorite food of Helen?"

Needs `pip install -e .` (or `make demo`). `--model` takes any FastLongSpeech or Qwen2-Audio model.
"""

import argparse
from pathlib import Path

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="audio file")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--model", default=DEMO, help="folder or Hub id (default: the demo model)")
    parser.add_argument("--target-length", type=int, default=400, metavar="L", help="frames to fuse to (default: 400)")
    arguments = parser.parse_args(argv)

    processor = FastLongSpeechProcessor.from_pretrained(arguments.model)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(arguments.model)

    # The encoder reads the whole recording: this takes most of the time.
    recordings = model.encode(**processor(audio=[arguments.recording]))
    print(f"{recordings.ends[-1]:.1f} s are {len(recordings.frames)} frames, fused to {arguments.target_length}")

    # All questions in one batch; they share the recording.
    turns = [
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}]
        for question in arguments.questions
    ]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, recordings=recordings
    )
    ids = model.generate(
        **inputs, recordings=recordings, target_length=arguments.target_length, max_new_tokens=60, do_sample=False
    )
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, answer in zip(arguments.questions, answers, strict=True):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
