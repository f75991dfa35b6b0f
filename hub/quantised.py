"""What 8 and 4 bits cost a model in answers, word errors, content densities and memory.

    python -m fastlongspeech.hub.quantised MODEL --clips FILE --questions FILE --output FOLDER

The CTC decoder transcribes the clips (rows of `audio` and `text`), the questions (rows of `audio`, `question` and
`answer`) are answered greedily about recordings fused to L frames. Densities are compared on the frames that the model
in float32 has made, frame by frame. Every measured row of the table is kept in OUTPUT: a stopped run goes on
there.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TorchAoConfig

from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..app.markdown import insert_blocks, table
from ..data.tasks import Example, QuestionSet, load_questions
from ..evaluation.answering import Answerer
from ..evaluation.journal import Journal, read_journal, refuse_other
from ..evaluation.run import answer_examples, make_batches
from ..evaluation.scoring import token_f1, whisper_normalizer, word_errors
from ..recordings_fastlongspeech import EncodedRecordings

# The encoder steers the fusion, so it stays whole; the CTC decoder does so by itself.
WHOLE = ["model.audio_tower", "model.multi_modal_projector", "model.ctc_decoder", "lm_head"]
PLAIN = ("float32", "bfloat16")
QUANTISED = ("bitsandbytes int8", "bitsandbytes nf4", "torchao int8")
# Name, way, and whether the modules of `WHOLE` are left as they are.
ROWS = [(way, way, True) for way in PLAIN] + [
    (f"{way}, {'encoder whole' if whole else 'all'}", way, whole) for whole in (True, False) for way in QUANTISED
]
ANSWER_TOKENS = 40
HEADINGS = ("loaded as", "token F1", "word errors", "densities: largest difference", "correlation", "weights")


def options(way: str, whole: bool) -> dict[str, Any]:
    """Returns what `from_pretrained` takes to load a model in one of the ways, with `WHOLE` or without."""
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
        total += sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return total


def answers(answerer: Answerer, asked: QuestionSet, batch_size: int) -> Iterator[tuple[Example, str]]:
    """Yields every example with the answer to it."""
    with tqdm(total=len(asked.examples), desc=answerer.method, unit="question", leave=False, disable=None) as bar:
        for batch in make_batches(asked.examples, batch_size):
            found = answer_examples(answerer, asked, batch)
            yield from zip(batch, (answer.text for answer in found), strict=True)
            bar.update(len(batch))


@torch.inference_mode()
def encode(model: Any, processor: Any, sets: Sequence[QuestionSet]) -> list[Tensor]:
    """Returns the frames of every recording, `(frames, width)` each."""
    audio = {example.recording: asked.audio(example) for asked in sets for example in asked.examples}
    waiting = tqdm(audio.values(), desc="encoding", unit="recording", leave=False, disable=None)
    return [model.encode(**processor(audio=recording)).frames for recording in waiting]


@torch.inference_mode()
def measure(
    model: Any,
    processor: Any,
    clips: QuestionSet,
    questions: QuestionSet,
    target_length: int,
    batch_size: int,
    reference: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Returns one row of figures.

    Args:
        model, processor: a FastLongSpeech in one of the ways and its processor.
        clips, questions: what is transcribed and what is asked.
        target_length: L of the recordings that are asked about.
        batch_size: questions at once.
        reference: frames in float32 and their densities, for every recording.
    """
    normalize = whisper_normalizer()
    frames: dict[str, EncodedRecordings] = {}
    counts = [
        word_errors(normalize(example.answers[0]), normalize(text))
        for example, text in answers(Answerer(model, processor, "ctc", None, 1, frames=frames), clips, batch_size)
    ]
    answerer = Answerer(model, processor, "iterative_fusion", target_length, ANSWER_TOKENS, frames=frames)
    scores = [token_f1(text, example.answers) for example, text in answers(answerer, questions, batch_size)]
    dtype = next(iter(frames.values())).frames.dtype
    found = torch.cat([model.density(heard.to(dtype)).float() for heard, _ in reference])
    expected = torch.cat([density for _, density in reference])
    return {
        "token F1": sum(scores) / len(scores),
        "word errors": sum(errors for errors, _ in counts) / sum(words for _, words in counts),
        "apart": float((found - expected).abs().max()),
        "alike": float(torch.corrcoef(torch.stack((found, expected)))[0, 1]),
        "bytes": weight_bytes(model),
    }


def described(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a row."""
    return (
        *(row["name"], f"{row['token F1']:.1%}", f"{row['word errors']:.1%}", f"{row['apart']:.3f}"),
        *(f"{row['alike']:.4f}", f"{row['bytes'] / 1e6:.1f} MB"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every way that has not been measured, prints the table, and puts it into a page.

    Raises:
        ValueError: the data can't be read, or the folder holds figures of other data or of another model.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--clips", required=True, metavar="FILE", help="as `evaluate --task asr` takes it")
    parser.add_argument("--questions", required=True, metavar="FILE", help="as `evaluate --task qa` takes it")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each")
    parser.add_argument("--target-length", type=int, default=750, metavar="L", help="frames (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the figures")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose block `quantised` is written anew")
    arguments = parser.parse_args(argv)
    clips = load_questions("asr", arguments.clips, limit=arguments.limit)
    questions = load_questions("qa", arguments.questions, limit=arguments.limit)
    settings = {name: getattr(arguments, name) for name in ("model", "clips", "questions", "limit", "target_length")}
    path = arguments.output / "figures.jsonl"
    done = {row["name"]: row for row in read_journal(path)}
    for row in done.values():
        refuse_other(row, settings, arguments.output)
    processor = FastLongSpeechProcessor.from_pretrained(arguments.model)
    reference: list[tuple[Tensor, Tensor]] = []
    with Journal(path) as journal:
        for name, way, whole in ROWS:
            if name in done:
                continue
            if not reference:
                model = FastLongSpeechForConditionalGeneration.from_pretrained(arguments.model, dtype="float32").eval()
                frames = encode(model, processor, (clips, questions))
                reference = [(heard, model.density(heard)) for heard in frames]
            model = FastLongSpeechForConditionalGeneration.from_pretrained(arguments.model, **options(way, whole))
            sizes = arguments.target_length, arguments.batch_size
            figures = measure(model.eval(), processor, clips, questions, *sizes, reference)
            done[name] = {"name": name} | settings | figures
            journal.append(done[name])
            print(*described(done[name]), sep=" | ", flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, on a CPU"
    rows = [described(done[name]) for name, *_ in ROWS]
    text = f"{table(HEADINGS, rows)}\n\n{len(questions.examples)} questions, {len(clips.examples)} clips; {versions}."
    print(text)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        blocks = insert_blocks(page, {"quantised": text}, str(arguments.page), "hub/quantised.py")
        arguments.page.write_text(blocks, encoding="utf-8")


if __name__ == "__main__":
    main()
