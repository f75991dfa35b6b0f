"""What 8 and 4 bits cost a model in right answers, word errors, content densities and memory.

    python -m fastlongspeech.hub.quantised checkpoints/fastlongspeech-demo --recordings 20 --page docs/converting.md

The first recordings of the demo model's evaluation set are synthesised (espeak-ng and flite; extra `demo`). Answers
are greedy, about every frame of clips and L = 750 frames of long recordings. Densities are compared on the frames that
the model in float32 has made, frame by frame.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import torch
import transformers
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TorchAoConfig

from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..app.markdown import insert_blocks, table
from ..demo.evaluation_set import draw
from ..evaluation.answering import answer_batch
from ..evaluation.scoring import exact_match, whisper_normalizer

# The encoder steers the fusion, so it stays whole; the CTC decoder does so by itself.
WHOLE = ["model.audio_tower", "model.multi_modal_projector", "model.ctc_decoder", "lm_head"]
WAYS = ("float32", "bfloat16", "bitsandbytes int8", "bitsandbytes nf4", "torchao int8")
PARTS = (("short", None), ("long", 750))


def options(way: str, whole: bool) -> dict[str, Any]:
    """Returns what `from_pretrained` takes to load a model in one of `WAYS`, with `WHOLE` or without."""
    skip: Any = WHOLE if whole else None
    if way == "bitsandbytes int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)}
    if way == "bitsandbytes nf4":
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip
            )
        }
    if way == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)}
    return {"dtype": way}


def weight_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of a model's weights, those of quantised ones with their scales."""
    total = 0
    for weight in [*model.parameters(), *model.buffers()]:
        parts = [weight]
        if hasattr(weight, "__tensor_flatten__"):  # torchao's
            parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        total += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return total


@torch.inference_mode()
def measure(model: Any, processor: Any, drawn: list[Any], frames: dict[int, Any]) -> dict[str, float]:
    """Returns one row of figures; `frames` takes what the first model, in float32, makes of each recording."""
    normalize = whisper_normalizer()
    right: dict[str, list[bool]] = {part: [] for part, _ in PARTS}
    spoken: list[str] = []
    written: list[str] = []
    apart: list[float] = []
    both: list[torch.Tensor] = []
    for number, (part, samples, row) in enumerate(tqdm(drawn, unit="recording", leave=False, disable=None)):
        length = dict(PARTS)[part]
        encoded = model.encode(**processor(audio=samples, sampling_rate=16_000))
        if number not in frames:
            frames[number] = (encoded.frames.float(), model.density(encoded.frames))
        reference, density = frames[number]
        found = model.density(reference.to(encoded.frames.dtype)).float()
        apart.append(float((found - density).abs().max()))
        both.append(torch.stack((found, density)))
        heard = model.compress(encoded, length, "none" if length is None else None).pooler_output
        asked = [question for question in row["questions"] if question["kind"] != "voice"]
        questions = [question["question"] for question in asked]
        answers = answer_batch(model, processor, questions, [heard] * len(asked), max_new_tokens=12)
        right[part] += [exact_match(a.text, [q["answer"]]) for a, q in zip(answers, asked, strict=True)]
        spoken.append(normalize(row["text"]))
        written.append(normalize(processor.ctc_decode(model.ctc_transcribe(recordings=encoded))[0]))
    return {
        **{part: sum(hits) / len(hits) for part, hits in right.items()},
        **{f"{part} questions": len(hits) for part, hits in right.items()},
        "word errors": jiwer.wer(spoken, written),
        "densities apart": max(apart),
        "densities alike": float(torch.corrcoef(torch.cat(both, dim=1))[0, 1]),
        "bytes": weight_bytes(model),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every way, prints the table, and puts it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--recordings", type=int, default=20, metavar="N", help="of each part of the set")
    parser.add_argument("--page", type=Path, help="page whose block `quantised` is written anew")
    arguments = parser.parse_args(argv)
    drawn = [(part, *draw(part, n)) for part, _ in PARTS for n in tqdm(range(arguments.recordings), leave=False)]
    processor = FastLongSpeechProcessor.from_pretrained(arguments.model)
    frames: dict[int, Any] = {}
    rows: list[tuple[str, ...]] = []
    asked: dict[str, int] = {}
    for way in WAYS:
        for whole in (True, False) if way not in ("float32", "bfloat16") else (True,):
            model = FastLongSpeechForConditionalGeneration.from_pretrained(arguments.model, **options(way, whole))
            figures = measure(model.eval(), processor, drawn, frames)
            asked = {part: int(figures[f"{part} questions"]) for part, _ in PARTS}
            name = way + ("" if way in ("float32", "bfloat16") else ", encoder whole" if whole else ", all")
            rows.append(
                (
                    name,
                    f"{figures['short']:.1%}",
                    f"{figures['long']:.1%}",
                    f"{figures['word errors']:.1%}",
                    f"{figures['densities apart']:.3f}",
                    f"{figures['densities alike']:.4f}",
                    f"{figures['bytes'] / 1e6:.1f} MB",
                )
            )
            print(rows[-1], flush=True)
    headings = (
        "loaded as",
        f"right, clips ({asked['short']})",
        f"right, long ({asked['long']})",
        "word errors",
        "densities: largest difference",
        "correlation",
        "weights",
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, on a CPU"
    text = (
        table(headings, rows)
        + f"\n\nMade by `python -m fastlongspeech.hub.quantised {arguments.model} --recordings "
        + f"{arguments.recordings}`, with {versions}."
    )
    print(text)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        blocks = insert_blocks(page, {"quantised": text}, str(arguments.page), "hub/quantised.py")
        arguments.page.write_text(blocks, encoding="utf-8")


if __name__ == "__main__":
    main()
