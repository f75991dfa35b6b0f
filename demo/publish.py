"""Publishes the demo model: copies it in Hub form, with a model card of its held-out figures and learning curves.

python -m fastlongspeech.demo.publish work checkpoints/fastlongspeech-demo
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from safetensors import safe_open

from ..app.markdown import table
from .sentences import vocabulary

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: audio-text-to-text
tags: [speech, long-audio, fastlongspeech, qwen2_audio]
---
# fastlongspeech-demo

A toy FastLongSpeech model of {parameters:.1f} M parameters. It shows and tests the whole path, from a recording of
several minutes to an answer, where no large model can be had. `demo/run.sh` of the FastLongSpeech repository trained
it from scratch on {hours:.0f} hours of synthetic English (espeak-ng and flite):

1. The language model learns to read written passages, as long as recordings of 4 minutes.
2. A small stock Qwen2-Audio is trained with it on clips under 30 s.
3. Stage 1 (CTC decoder) and stage 2 (dynamic compression training) follow on these clips.
4. Stage 2 is run again on recordings of 10 s to 4 minutes. The paper's model does without this step.
5. The published weights are the mean of those before and after step 4. The mean remembers more of the clips than the
   weights after step 4 alone.

The weights are stored in float16 to save space. `config.json` says `float32`, and so the model computes in float32
unless you pass another `dtype`.

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder = "checkpoints/fastlongspeech-demo"  # or the name of a repository that it was published in
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
question = {{"type": "text", "text": "When does Patrick arrive?"}}
turn = {{"role": "user", "content": [{{"type": "audio", "path": "demo/recording.flac"}}, question]}}
inputs = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True)
answer = model.generate(**inputs, max_new_tokens=20)[:, inputs.input_ids.shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

Right answers on held-out speech: {clips:.0%} to questions about facts in clips under 30 s (every frame), {long:.0%} in
recordings of 1 to 4 minutes (L = 750), and {voice:.0%} to whether a man or a woman speaks in clips; see below.

## What it can't do

- Understand human speech: it has heard eight synthetic voices and nothing else.
- Understand sentences of another form: it knows {words} words and eight kinds of statement (who lives where, works
  as what, arrives when, eats, plays or bought what; where a thing is; which code opens which box). To any other
  question it answers something of one of these kinds.
- Say that it does not know: asked for what was not said, it invents an answer.
- Write transcripts with its language model: many sentences begin alike, so it loses its place and leaves sentences out
  or repeats them. Its CTC decoder does not. The repository's docs/results.md has the word errors of both.
- Names and values that it never heard in training: it gets most of them wrong (the rows "unheard" below).

## Held-out figures

Sentences, passages and seeds are never trained on. Answers are greedy, and right if they are exact after Whisper's
normaliser. Made by `python -m fastlongspeech.demo.heldout checkpoints/fastlongspeech-demo work/corpus`, with torch
{torch} and transformers {transformers} on a CPU.

The splits: `test` has clips of 8 to 29 s; `unheard` has the same with names or values that training never speaks;
`long` has recordings of 1 to 4 minutes. L = all means every frame. "wrong recording" and "no audio" are the baselines.
Each recording has one question about the voice, so there are fewer of these than of questions about facts.

{table}

CTC transcription: {error_rates}.

## Learning curves

{history}![learning curves](learning-curves.png)

The logs behind the plot are in `learning-curves.json`.
"""


def read_curves(work: Path) -> dict[str, list[dict]]:
    """Returns the logged metrics of every step of the recipe, by the step's name."""
    curves = {}
    for name in ("language", "encoder", "join"):
        lines = (work / "base" / f"{name}.jsonl").read_text().splitlines()
        curves[name] = [json.loads(line) for line in lines]
    for name in ("ctc", "dct", "dct-long"):
        curves[name] = json.loads((work / name / "trainer_state.json").read_text())["log_history"]
    return curves


def plot_curves(curves: dict[str, list[dict]], path: Path) -> None:
    """Writes one panel per step of the recipe."""
    panels = {
        "language": ("Base 1: language model on text", ("loss", "accuracy")),
        "encoder": ("Base 2: encoder, losses per word and frame", ("words", "said", "phones", "spoken")),
        "join": ("Base 3: both joined", ("loss", "accuracy")),
        "ctc": ("Stage 1: CTC decoder", ("loss", "eval_loss", "eval_wer")),
        "dct": ("Stage 2: dynamic compression", ("loss", "eval_L200_loss")),
        "dct-long": ("Stage 2 again: recordings of minutes", ("loss", "eval_L750_loss")),
    }
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, len(panels), figsize=(24, 3.6), layout="constrained")
    for axis, (name, (title, metrics)) in zip(axes, panels.items(), strict=True):
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in curves[name] if metric in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=metric, marker="." if "eval" in metric else None)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        if name in ("language", "encoder", "ctc"):
            axis.set_yscale("symlog", linthresh=1)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def figures_table(summary: dict) -> str:
    """Returns the exact answers as a Markdown table."""
    headings = ["split", "L", "heard", "facts, exact", "questions", "voice, exact", "questions"]
    rows = []
    for row in summary["exact_answers"]:
        facts, voice = row["facts"], row["voice"]
        rows.append(
            [row["split"], str(row["target_length"] or "all"), row["condition"]]
            + [f"{facts['exact']:.1%}", str(facts["questions"]), f"{voice['exact']:.1%}", str(voice["questions"])]
        )
    return table(headings, rows, words=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the recipe; its history.md, if any, goes into the card")
    parser.add_argument("checkpoint", type=Path, help="folder to publish to; what is in it is replaced")
    arguments = parser.parse_args()
    work, checkpoint = arguments.work, arguments.checkpoint

    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(work / "average", checkpoint)
    summary = json.loads((work / "heldout.json").read_text())
    curves = read_curves(work)
    (checkpoint / "learning-curves.json").write_text(json.dumps(curves))
    plot_curves(curves, checkpoint / "learning-curves.png")
    manifests = [work / "corpus" / split / "recordings.jsonl" for split in ("train", "train-long")]
    rows = [json.loads(line) for manifest in manifests for line in manifest.read_text().splitlines()]
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in list(weights.keys())) / 1e6
    heard = (row for row in summary["exact_answers"] if row["condition"] == "the recording")
    answered = {(row["split"], row["target_length"]): row for row in heard}
    history = work / "history.md"
    card = CARD.format(
        history=f"{history.read_text().strip()}\n\n" if history.exists() else "",
        parameters=parameters,
        hours=sum(row["duration"] for row in rows) / 3600,
        words=len(vocabulary()),
        table=figures_table(summary),
        clips=answered["test", None]["facts"]["exact"],
        long=answered["long", 750]["facts"]["exact"],
        voice=answered["test", None]["voice"]["exact"],
        error_rates=", ".join(
            f"{rate:.1%} word errors on {split}" for split, rate in summary["word_error_rates"].items()
        ),
        **summary["versions"],
    )
    (checkpoint / "README.md").write_text(card)
    print(f"published to {checkpoint}")


if __name__ == "__main__":
    main()
