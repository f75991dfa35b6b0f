"""Fine-tunes a model on your own clips: LoRA adapters on the language model, merged at the end (stage 2).

    python examples/fine_tune.py clips.jsonl my-model

`clips.jsonl` has one line for each question. Paths are relative to the file:

    {"audio": "clips/1.flac", "question": "Who calls?", "answer": "anna"}

Needs `pip install -e '.[train]'`. Clips of up to 30 s are enough: every training step fuses them to another length,
and so the model learns to read fused recordings of any duration.
"""

import argparse
from pathlib import Path

from fastlongspeech.train import dct

DEMO = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", help="JSON lines of audio, question, answer")
    parser.add_argument("output", help="folder for checkpoints and the trained model")
    parser.add_argument("--model", default=DEMO, help="folder or Hub id to start from (default: the demo model)")
    parser.add_argument("--epochs", type=float, default=3, metavar="N", help="times each clip is used (default: 3)")
    arguments = parser.parse_args(argv)

    # All these, and every other setting of transformers.TrainingArguments, can stand in a recipe: see train/recipes/.
    settings = {
        "model": arguments.model,
        "train_data": arguments.clips,
        "output_dir": arguments.output,
        "num_train_epochs": arguments.epochs,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-4,
        "warmup_steps": 10,
        "lora_r": 32,
        "lora_alpha": 64,
        "logging_steps": 10,
        "save_strategy": "epoch",  # give the same command again to go on after an interruption
        "report_to": "none",
    }
    dct.main([f"--{name}={value}" for name, value in settings.items()])
    print(f"trained; ask it with: fastlongspeech ask --model {arguments.output} RECORDING QUESTION")


if __name__ == "__main__":
    main()
