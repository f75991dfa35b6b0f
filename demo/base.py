"""Trains the demo's base model from scratch: a small stock Qwen2-Audio that understands clips under 30 s.

    python -m fastlongspeech.demo.base work/corpus work/base

Three steps, each resumable: the language model learns from written passages, the audio encoder from speech, and then
the language model from encoded speech. `work/base/model` is an ordinary Qwen2-Audio checkpoint with its processor. It
knows nothing of fusion.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

from .base_encoder import load_recordings, train_encoder
from .base_join import encode_recordings, train_joined
from .base_language import train_language_model
from .base_model import build_model, build_tokenizer

STEPS = {"language": 4000, "encoder": 5100, "join": 1200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder written by fastlongspeech.demo.corpus")
    parser.add_argument("output", type=Path, help="folder for checkpoints, logs and the finished model")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps, to try the recipe quickly")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    steps = {name: max(2, round(count * arguments.scale)) for name, count in STEPS.items()}
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)

    if not (folder / "tokenizer").exists():
        build_tokenizer().save_pretrained(folder / "tokenizer.tmp")
        (folder / "tokenizer.tmp").replace(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    model = build_model(tokenizer).to(arguments.device)
    train_language_model(model, tokenizer, folder, steps["language"])
    feature_extractor = WhisperFeatureExtractor(feature_size=model.config.audio_config.num_mel_bins)
    recordings = load_recordings(arguments.corpus / "train", feature_extractor, folder / "train-mels.npz")
    train_encoder(model, tokenizer, recordings, folder, steps["encoder"])
    frames = encode_recordings(model, recordings, folder / "train-frames.pt")
    train_joined(model, tokenizer, recordings, frames, folder, steps["join"])

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    finished = folder / "model.tmp"
    model.save_pretrained(finished)
    processor = Qwen2AudioProcessor(feature_extractor, tokenizer)
    processor.chat_template = processor.default_chat_template
    processor.save_pretrained(finished)
    shutil.rmtree(folder / "model", ignore_errors=True)
    finished.replace(folder / "model")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters saved to {folder / 'model'}")


if __name__ == "__main__":
    main()
