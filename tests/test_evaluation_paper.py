"""The paper's comparisons: every condition is a command, and the page holds what the commands came to."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from fastlongspeech.app import cli
from fastlongspeech.app.markdown import insert_blocks
from fastlongspeech.data.tasks import Example, QuestionSet
from fastlongspeech.demo import evaluation_set
from fastlongspeech.evaluation import run, scoring
from fastlongspeech.evaluation.answering import Answerer
from fastlongspeech.evaluation.journal import read_journal
from fastlongspeech.evaluation.paper import run as paper
from fastlongspeech.evaluation.paper.plots import binned
from fastlongspeech.evaluation.paper.recipe import RIVALS, Recipe
from fastlongspeech.evaluation.paper.results import difference
from fastlongspeech.evaluation.run import parse_arguments
from fastlongspeech.train import dct

RATE = 16000
RECIPES = Path(run.__file__).parent / "recipes"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the tiny model, without rivals, and noises of 31, 1 and 2 s."""
    folder = tmp_path_factory.mktemp("paper")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate((31, 1, 2)):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(seconds * RATE), RATE)
    fact = {"question": "What is it?", "answer": "noise", "time": 0.8}
    other = {"question": "Who speaks?", "answer": "man"}
    long = [{"audio": f"{clip}.wav", **asked} for clip in (0, 1) for asked in (fact, other)]
    short = [{"audio": f"{clip}.wav", **fact} for clip in (1, 2)]
    asr = [{"audio": f"{clip}.wav", "text": "the cat"} for clip in (1, 2)]
    asked = {"max_new_tokens": 4}
    content = {
        "output": str(folder / "out"),
        "page": str(folder / "results.md"),
        "models": {name: str(checkpoint) for name in ("fastlongspeech", "stage1")}
        | {name: str(folder / name) for name in RIVALS},
        "training": ["--model", str(checkpoint), "--train_data", write(folder / "train.jsonl", short), "--use_cpu"]
        + ["--lora_r", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"],
        "lengths": [750, 400, 12],
        "benchmarks": {
            "long": asked | {"title": "Noises", "long": True, "task": "qa", "data": write(folder / "l.jsonl", long)},
            "qa": asked | {"tables": [3, 7], "task": "qa", "data": write(folder / "s.jsonl", short)},
            "asr": asked | {"task": "asr", "data": write(folder / "a.jsonl", asr)},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def models() -> paper.Models:
    return paper.Models()


@pytest.fixture(scope="module")
def quick(recipe: Path, models: paper.Models) -> Path:
    """The folder of a quick run, by these models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "RESAMPLES", 20)
        patch.setattr("fastlongspeech.evaluation.answering.TRANSCRIPT_TOKENS", 2)
        patch.setattr(paper, "Models", lambda: models)
        paper.main([str(recipe), "--quick"])
    return recipe.parent / "out" / "quick"


def test_a_quick_run_makes_every_table_and_plot(quick):
    page = (quick / "results.md").read_text()
    assert "conditions are not there yet" not in page and "these figures mean nothing" in page
    for name in ("lengths", "table 1", "table 2", "table 3", "table 4", "table 5", "table 7", "long"):
        assert f"<!-- begin {name} " in page
    assert "| FastLongSpeech | 3.55 | 0.0 [0.0, 0.0] |" in page  # of Table 1: the paper's score and ours
    assert [path.name for path in sorted(quick.glob("*.svg"))] == ["results-lengths.svg", "results-long.svg"]
    assert len(read_journal(quick / "long" / "seconds.jsonl")) == 4  # of two methods, two recordings


@pytest.mark.skipif(
    not (shutil.which("espeak-ng") and shutil.which("flite")), reason="espeak-ng and flite are not installed"
)
def test_the_demo_recipe_runs_on_a_few_recordings_of_the_demo_set(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "RESAMPLES", 20)
    monkeypatch.setattr(evaluation_set, "durations", lambda: [35.0] * evaluation_set.LONG)
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    Path("work/dct").symlink_to(RECIPES.parents[1] / "checkpoints" / "fastlongspeech-demo")
    monkeypatch.setattr("sys.argv", ["evaluation_set", "work/demo-set", "--recordings", "2", "--workers", "1"])
    evaluation_set.main()
    steps = ["--steps", "evaluate", "report", "--models", "fastlongspeech"]
    paper.main([str(RECIPES / "paper-demo.yaml"), "--quick", *steps])
    summary = json.loads(Path("work/paper/quick/long/fastlongspeech-iterative_fusion-750/summary.json").read_text())
    assert summary["questions"] == 4 and summary["scores"]["exact_match"]["value"] > 0
    page = Path("work/paper/quick/results.md").read_text()
    assert "--quick --steps train evaluate time report --models fastlongspeech plain" in page
    for title in ("Facts in clips under 30 s", "Transcripts of clips under 30 s", "Man or woman, in clips under 30 s"):
        assert f"### {title}: " in page
    assert "| always the commonest answer |" not in page  # which the base model's answers would tell


def test_all_models_hear_the_same_frames(quick, models):
    assert [len(recording.frames) for _, recording in sorted(models.frames.items())] == [775, 25, 50]


def test_rivals_are_trained_as_the_demo_model_but_for_their_compression(tmp_path, monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(dct, "main", asked.append)
    monkeypatch.chdir(tmp_path)  # where none is there
    paper.main([str(RECIPES / "paper-demo.yaml"), "--steps", "train", "--models", "plain", "most_similar"])
    monkeypatch.chdir(RECIPES.parents[1])
    demo = dct.parse_settings(dct.DCTArguments, ["demo/dct.yaml"])
    same = ("model", "train_data", "lora_r", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")
    for words, compression in zip(asked, ("none", "most_similar"), strict=True):
        rival = dct.parse_settings(dct.DCTArguments, words)
        for name in same:
            assert [getattr(of, name) for of in rival if hasattr(of, name)] == [
                getattr(of, name) for of in demo if hasattr(of, name)
            ]
        assert rival[0].compression == compression and rival[1].output_dir != demo[1].output_dir


def test_a_condition_is_repeated_by_its_command(recipe, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "RESAMPLES", 20)
    capsys.readouterr()
    paper.main([str(recipe), "--quick", "--commands", "--models", "plain"])
    commands = capsys.readouterr().out.splitlines()
    assert all(f"--model {quick}/models/plain " in line for line in commands)
    (line,) = [line for line in commands if "--compression random --target-length 12" in line and "--task qa" in line]
    program, *words = line.split()
    folder = Path(words[-1])
    assert program == "fastlongspeech" and cli.main([*words[:-1], str(tmp_path)]) == 0
    made, again = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path))
    assert made["scores"] == again["scores"]
    assert read_journal(folder / "predictions.jsonl") == read_journal(tmp_path / "predictions.jsonl")


def test_what_is_there_is_not_done_again(recipe, quick, monkeypatch):
    monkeypatch.setattr(scoring, "RESAMPLES", 20)
    for place, name in ((dct, "main"), (Answerer, "answer"), (paper, "score")):
        monkeypatch.setattr(place, name, None)
    page = (quick / "results.md").read_text()
    plots = {path: path.read_bytes() for path in quick.glob("*.svg")}
    paper.main([str(recipe), "--quick"])
    assert (quick / "results.md").read_text() == page
    assert plots == {path: path.read_bytes() for path in quick.glob("*.svg")}


def test_the_page_can_be_written_before_anything_has_run(recipe):
    paper.main([str(recipe), "--steps", "report"])
    page = (recipe.parent / "results.md").read_text()
    conditions = len(Recipe.read(str(recipe)).conditions())
    assert f"**{conditions} of {conditions} conditions are not there yet" in page
    assert "| NTK-RoPE | 3.44 | 61.21 | 4.80 | – | – | – |" in page
    with pytest.raises(ValueError, match="holds no model; train it with --steps train --models plain"):
        paper.main([str(recipe), "--steps", "evaluate"])


def test_judged_answers_are_compared_by_the_judge_who_is_asked_once(recipe, tmp_path, monkeypatch):
    content = yaml.safe_load(recipe.read_text())
    content["benchmarks"] = {"long": content["benchmarks"]["long"] | {"judge": True}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | {"output": str(tmp_path / "out")}))
    judged = []
    monkeypatch.setattr(run, "Chat", lambda *_: SimpleNamespace(model="strict"))
    monkeypatch.setattr(run, "judge", lambda rows, *_: judged.append(len(rows)) or [2] * len(rows))
    monkeypatch.setattr("fastlongspeech.evaluation.answering.TRANSCRIPT_TOKENS", 2)
    for _ in range(2):
        paper.main([str(path), "--quick", "--models", "fastlongspeech", "--steps", "evaluate", "report"])
    assert judged == [4] * 5  # ours, two ablations, two cascades
    page = (tmp_path / "out/quick/results.md").read_text()
    assert "| method | paper: score, 1 to 5 | here: score, 1 to 5 |" in page
    assert "| FastLongSpeech | 3.55 | 2.00 [2.00, 2.00] |" in page and "| Random | 2.54 | – |" in page


def test_text_outside_the_blocks_is_kept():
    page = insert_blocks("# Title\n\nBy hand.\n", {"a": "1", "b": "2"}, "page.md", "evaluation/paper.py")
    page = page.replace("<!-- end a -->", "<!-- end a -->\n\nBetween.")
    again = insert_blocks(page, {"a": "3", "b": "4"}, "page.md", "evaluation/paper.py")
    assert again == page.replace("\n1\n", "\n3\n").replace("\n2\n", "\n4\n")
    assert again.startswith("# Title\n\nBy hand.\n\n<!-- begin a ") and "\n\nBetween.\n\n<!-- begin b " in again
    with pytest.raises(ValueError, match="page.md has the line .* but not <!-- end b -->"):
        insert_blocks(again.replace("<!-- end b -->", ""), {"b": "5"}, "page.md", "evaluation/paper.py")


@pytest.mark.parametrize("name", ["paper-demo.yaml", "paper-qwen2-audio-7b.yaml", "paper-small.yaml"])
def test_every_command_of_our_recipes_is_understood(name):
    recipe = Recipe.read(str(RECIPES / name))
    conditions = recipe.conditions()
    of_paper = [750, 400, 200, 100, 50, 25, 12]
    assert recipe.lengths == [length for length in of_paper if length in recipe.lengths] and recipe.lengths[0] == 750
    folders = {parse_arguments(recipe.command(condition)).output for condition in conditions}
    assert len(folders) == len(conditions)


def test_the_most_important_conditions_come_first_and_the_cascades_last():
    conditions = Recipe.read(str(RECIPES / "paper-demo.yaml")).conditions()
    assert conditions[0] == ("long", "fastlongspeech", "iterative_fusion", 750)
    first = [condition for condition in conditions if condition.model in ("fastlongspeech", "plain")]
    assert conditions[: len(first) - 2] == first[:-2]
    assert all("cascade" in condition.compression for condition in conditions[-4:])
    assert ("qa", "plain", "none", None) in conditions  # L = 750
    assert not any(condition.length == 750 for condition in conditions if condition.benchmark != "long")


def test_a_recipe_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output: out\n")
    with pytest.raises(ValueError, match="must set benchmarks, lengths, models, output, page, training and nothing"):
        Recipe.read(str(path))
    content = yaml.safe_load((RECIPES / "paper-demo.yaml").read_text())
    models = content["models"]
    for named in ({"plain": models["plain"]}, models | {"other": "folder"}):
        path.write_text(yaml.safe_dump(content | {"models": named}))
        with pytest.raises(
            ValueError, match="must name the model fastlongspeech, and none but fastlongspeech, stage1"
        ):
            Recipe.read(str(path))


def test_rivals_without_a_model_are_asked_of_ours(recipe, tmp_path, capsys):
    content = yaml.safe_load(recipe.read_text())
    content |= {"output": str(tmp_path / "out"), "page": str(tmp_path / "page.md")}
    content["models"] = {"fastlongspeech": content["models"]["fastlongspeech"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    read = Recipe.read(str(path))
    conditions = read.conditions()
    assert {condition.model for condition in conditions} == {"fastlongspeech"}
    of_long = [condition.compression for condition in conditions if condition.benchmark == "long"]
    rivals = ["random", "most_similar", "average_pooling", "adjacent_merging", "ntk_rope", "cascade", "ctc_cascade"]
    assert sorted(of_long) == sorted([*rivals, "iterative_fusion", "single_step_fusion", "uniform_density"])
    paper.main([str(path), "--steps", "report"])
    page = (tmp_path / "page.md").read_text()
    assert "| Random | fastlongspeech | `random` |" in page and "leaves out the models stage1, plain" in page
    assert not any(
        name in page for name in ("| AvgPool, trained", "w/o DCT", "| cascade, stage 1", "plain fine-tune |")
    )
    with pytest.raises(SystemExit):
        paper.main([str(path), "--models", "plain"])
    assert "--models plain is not in" in capsys.readouterr().err


def test_frames_are_kept_for_models_with_the_same_encoder(checkpoint, tmp_path):
    def load(folder: Path) -> Any:
        words = ["--task", "qa", "--data", "x", "--output", "y", "--model", str(folder)]
        return loader.load(parse_arguments(words), "cpu")

    loader = paper.Models()
    model, processor = load(checkpoint)
    loader.frames["a"] = "frames"
    for part, folder in ((model.lm_head, tmp_path / "text"), (model.model.audio_tower.conv1, tmp_path / "sound")):
        part.weight.data += 1
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    assert load(tmp_path / "text")[0] is load(tmp_path / "text")[0] is not model
    assert loader.frames == {"a": "frames"}
    load(tmp_path / "sound")
    assert loader.frames == {}


def test_recordings_are_timed_over_all_durations():
    rows = [{"row": number, "recording": str(number), "duration": number} for number in range(160)]
    examples = [Example(**row, question="?", answers=["x"], choices=[], notes={}) for row in rows]
    chosen = paper.spread(QuestionSet("answer", examples, rows, 0), quick=False)
    assert [example.duration for example in chosen] == list(range(5, 160, 10))


def test_differences_are_taken_question_by_question():
    def rows(scores: list[int]) -> list[dict[str, Any]]:
        return [{"row": n, "recording": str(n), "exact_match": score} for n, score in enumerate(scores)]

    ours = rows([1, 0, 1, 0])
    assert difference(rows([0, 0, 0, 0]), ours, "exact_match").startswith("-50.0 [-100.0, ")
    assert difference(rows([1, 0, 1, 0]), ours, "exact_match") == "+0.0 [+0.0, +0.0]"
    assert difference(None, ours, "exact_match") == "–"


def test_questions_are_sorted_by_duration_and_by_the_place_of_their_fact():
    rows = [{"duration": 50.0, "time": 45.0}, {"duration": 60.5, "time": 0.0}, {"duration": 2000.0}]
    assert [len(part) for part in binned(rows, "duration", (0, 60, 120, 1000))] == [1, 1, 1]
    assert [len(part) for part in binned(rows, "place", (0, 0.5, 1))] == [1, 1]
    assert binned(None, "place", (0, 1)) == [[]]
