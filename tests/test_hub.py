"""Publishing and fetching over HTTP: the real `huggingface_hub` client and a Hub on loopback (`loopback_hub.py`)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import soundfile
import torch
import yaml
from conftest import RATE, speech
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from test_remote_code import CODE, DATA

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app import cli
from fastlongspeech.hub import push as publishing
from fastlongspeech.hub.card import make_card

REPO = "org/tiny"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def environment(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes that know this Hub alone, and have a cache of their own."""
    place = tmp_path_factory.mktemp("home")
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_CACHE")}
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place), "HF_TOKEN": "a-token", "HF_HUB_OFFLINE": "0"}
    return own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def connected(hub: LoopbackHub, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub, to this process as well."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return hub


def run(environment: dict[str, str], code: str, *arguments: str) -> dict[str, Any]:
    """Returns what a fresh process prints as JSON."""
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def published(
    hub: LoopbackHub, environment: dict[str, str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What `push` printed when it published the tiny model, with the check in a fresh process."""
    program = "import sys; from fastlongspeech.app.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["push", REPO, "--model", str(checkpoint), "--private", "--license", "apache-2.0", "--language", "en"]
    own = environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    place = tmp_path_factory.mktemp("place")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=own, cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(hub: LoopbackHub, repo: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[repo]
    return repository.commits[repository.branches[branch]]


# Publishing


def test_all_goes_in_one_commit_and_is_tried_in_a_fresh_process(
    hub: LoopbackHub, published: str, checkpoint: Path
) -> None:
    files = files_of(hub, REPO)
    assert set(files) == CODE | DATA | {"README.md"}
    assert all(files[name] == (checkpoint / name).read_bytes() for name in CODE | DATA)
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.commits) == 2  # an empty one when it was made, and this
    last = published.splitlines()[-1]
    assert last.startswith(f"{REPO} at {repository.branches['main']} answers as ")
    assert last.endswith("logits differ by 0.0e+00 of the largest one.")


def test_the_card_says_what_the_records_know(hub: LoopbackHub, published: str) -> None:
    card = files_of(hub, REPO)["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["fastlongspeech", "audio", "speech", "long-audio", "custom_code"],
    }
    assert f'from_pretrained("{REPO}", trust_remote_code=True' in card
    assert "fused to: 750" in card


def test_a_dry_run_lists_what_would_go_and_sends_nothing(
    connected: LoopbackHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "training_args.bin").write_bytes(b"a pickle")
    settings = {"model": "Qwen/Qwen2-Audio-7B", "learning_rate": 2e-4, "train_data": "/home/me/asr.jsonl"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    before = len(connected.requests)
    assert cli.main(["push", "org/new", "--model", str(folder), "--dry-run", "--dataset", "org/speech"]) == 0
    printed = capsys.readouterr().out
    assert len(connected.requests) == before and "org/new" not in connected.repositories
    listed = {line.split()[-1] for line in printed.split("stays here")[0].splitlines() if "README" not in line}
    assert listed == CODE | DATA
    assert "stays here: checkpoint-3, settings.yaml, training_args.bin" in printed
    data = yaml.safe_load(printed.split("---")[1])
    assert data["base_model"] == "Qwen/Qwen2-Audio-7B" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/speech"]
    assert "| learning_rate | 0.0002 |" in printed and "/home/me" not in printed


def test_the_base_model_is_followed_through_folders(checkpoint: Path, tmp_path: Path) -> None:
    """A model of stage 2 names the folder of stage 1, which names that of a conversion, which names a Hub id."""
    for name in ("converted", "ctc", "dct"):
        shutil.copytree(checkpoint, tmp_path / name)
    record = {"source": "Qwen/Qwen2-Audio-7B-Instruct", "model_type": "qwen2_audio", "adapter": None}
    (tmp_path / "converted" / "conversion.json").write_text(json.dumps(record | {"differences": {"logits": 1e-6}}))
    (tmp_path / "ctc" / "settings.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "converted")}))
    (tmp_path / "dct" / "settings.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "ctc")}))
    state = {"global_step": 7, "log_history": [{"loss": 2.5}, {"loss": 1.5}, {"eval_L750_loss": 1.25}]}
    (tmp_path / "dct" / "trainer_state.json").write_text(json.dumps(state))
    card = make_card(tmp_path / "dct", "org/name")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2-Audio-7B-Instruct"
    assert "- loss: 1.5\n" in card and "- eval_L750_loss: 1.25\n" in card and "- steps: 7\n" in card
    assert str(tmp_path) not in card
    converted = make_card(tmp_path / "converted", "org/name")
    assert "Converted from `Qwen/Qwen2-Audio-7B-Instruct`" in converted and "logits 1.0e-06" in converted


def test_a_folder_with_its_own_card_keeps_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    assert make_card(tmp_path, "org/name") == "# Mine\n"


def test_a_folder_that_is_not_complete_is_refused(
    connected: LoopbackHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["push", "org/half", "--model", str(tmp_path)]) == 1
    assert (
        "has no processor_config.json, tokenizer.json, *_fastlongspeech.py, *.safetensors" in capsys.readouterr().err
    )
    assert "org/half" not in connected.repositories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b/c"], "argument REPO: "),
        (["org/name", "--license", "bad license: ["], "a name such as apache-2.0"),
        (["org/name", "--base-model", "not an id"], "argument --base-model: "),
        (["org/name", "--model", "nowhere"], "--model nowhere is no folder"),
        (["org/name", "--license", "mit"], "--license would change nothing: "),
    ],
)
def test_arguments_that_a_hub_would_refuse_or_that_change_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# Mine\n")
    with pytest.raises(SystemExit):
        cli.main(["push", "--model", str(tmp_path / "model"), "--dry-run", *arguments])
    assert message in capsys.readouterr().err


def test_a_hub_that_can_not_be_reached_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    assert cli.main(["push", "org/name", "--model", str(checkpoint)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"fastlongspeech: {nobody} can't be reached (") and "nothing is published" in printed


def test_another_branch(connected: LoopbackHub, checkpoint: Path) -> None:
    files, _ = publishing.list_files(checkpoint)
    commit = publishing.push(checkpoint, files, "# card", "org/branched", False, "v2")
    repository = connected.repositories["org/branched"]
    assert not repository.private
    assert repository.branches["v2"] == commit and repository.commits[repository.branches["main"]] == {}


def test_an_upload_that_breaks_publishes_nothing_and_goes_on(
    connected: LoopbackHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connected.large.clear()
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    pieces = hashlib.sha256((checkpoint / "ctc.model").read_bytes()).hexdigest()
    connected.break_upload = weights
    assert cli.main(["push", "org/cut", "--model", str(checkpoint)]) == 1
    assert "nothing is published, and what has arrived stays there: run push again" in capsys.readouterr().err
    assert files_of(connected, "org/cut") == {}
    connected.large.setdefault(pieces, (checkpoint / "ctc.model").read_bytes())
    before = len(connected.requests)
    files, _ = publishing.list_files(checkpoint)
    publishing.push(checkpoint, files, "# card", "org/cut", False, "main")
    sent = [request for request in connected.requests[before:] if request.startswith("PUT")]
    assert [request.split("/")[-1] for request in sent] == [weights]  # the other one has arrived before
    assert set(files_of(connected, "org/cut")) == CODE | DATA | {"README.md"}


@pytest.mark.slow
def test_what_does_not_load_is_said(connected: LoopbackHub, published: str, checkpoint: Path) -> None:
    """The published weights are those of another model."""
    files = dict(files_of(connected, REPO))
    weights = load_file(checkpoint / "model.safetensors")
    path = checkpoint.parent / "other.safetensors"
    save_file({name: weight * 1.5 for name, weight in weights.items()}, path, metadata={"format": "pt"})
    connected.repositories["org/other"] = type(connected.repositories[REPO])(private=False)
    commit = connected.repositories["org/other"].commit("main", files | {"model.safetensors": path.read_bytes()})
    with pytest.raises(ValueError, match="logits differ from the source's by"):
        publishing.check_published(checkpoint, "org/other", commit)


# Fetching, as someone who does not have this package

FETCH = """
    import json, sys
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    repo, recording = sys.argv[1:]
    options = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(repo, **options)
    processor = AutoProcessor.from_pretrained(repo, **options)
    model = AutoModel.from_pretrained(repo, **options).eval()
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>What?"
    inputs = processor(text=prompt, audio=recording, target_length=9)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :5].tolist()
    try:
        AutoModel.from_pretrained(repo, revision="no-such-branch", **options)
        message = None
    except OSError as error:
        message = str(error)
    print(json.dumps({"class": type(model).__name__, "logits": logits, "wrong revision": message,
        "package": "fastlongspeech" in sys.modules}))
"""


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "recording.wav", speech(2), RATE, subtype="FLOAT")
    return tmp_path / "recording.wav"


def test_the_auto_classes_load_by_name_and_then_without_a_network(
    hub: LoopbackHub, published: str, environment: dict[str, str], checkpoint: Path, recording: Path
) -> None:
    hub.break_download = ("model.safetensors", 1000)  # the line is cut once, after so many bytes
    before = len(hub.requests)
    found = run(environment, FETCH, REPO, str(recording))
    asked = [request for request in hub.requests[before:] if "GET" in request and "model.safetensors" in request]
    assert len(asked) == 2, asked
    assert found["class"] == "FastLongSpeechForConditionalGeneration" and not found["package"]
    assert "no-such-branch" in found["wrong revision"]

    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint).eval()
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>What?"
    with torch.no_grad():
        expected = model(**processor(text=prompt, audio=str(recording), target_length=9)).logits[0, -1, :5]
    assert found["logits"] == pytest.approx(expected.tolist(), rel=1e-6)

    before = len(hub.requests)
    again = run(environment | {"HF_HUB_OFFLINE": "1"}, FETCH, REPO, str(recording))
    assert again["logits"] == found["logits"]
    assert len(hub.requests) == before


# Adapters


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA adapters of the tiny model, as training leaves them: with its folder as their base."""
    folders = {}
    for seed, name in enumerate(("questions", "summaries")):
        torch.manual_seed(seed)
        model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
        targets = r".*language_model.*\.(q_proj|v_proj)"
        settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        folders[name] = tmp_path_factory.mktemp(name)
        peft.get_peft_model(model, settings).save_pretrained(str(folders[name]))
    return folders


def publish_adapter(folder: Path, base: str, repo: str, place: Path) -> None:
    """As docs/publishing.md says, without the trial in a fresh process."""
    assert cli.main(["convert", str(folder), str(place), "--base", base]) == 0
    files, _ = publishing.list_files(place)
    publishing.push(place, files, make_card(place, repo), repo, False, "main")


@torch.no_grad()
def last_logits(model: Any, inputs: Any) -> torch.Tensor:
    return model.eval()(**inputs).logits[0, -1]


def test_adapters_are_published_apart_or_merged(
    connected: LoopbackHub,
    checkpoint: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Model = FastLongSpeechForConditionalGeneration
    files, _ = publishing.list_files(checkpoint)
    publishing.push(checkpoint, files, "# card", "org/base", False, "main")
    for name, folder in adapters.items():
        publish_adapter(folder, "org/base", f"org/{name}", tmp_path / name)
    fetched = [request for request in connected.requests if "/org/base/resolve" in request]
    assert not any("safetensors" in request for request in fetched)  # an adapter needs the base's configuration alone
    assert set(files_of(connected, "org/questions")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    card = yaml.safe_load(files_of(connected, "org/questions")["README.md"].decode().split("---")[1])
    assert (card["library_name"], card["base_model"], card["base_model_relation"]) == ("peft", "org/base", "adapter")

    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>What?"
    inputs = processor(text=prompt, audio=speech(2), sampling_rate=RATE, target_length=9)
    expected = {}  # by PEFT from the folders that training has left
    for name, folder in adapters.items():
        expected[name] = last_logits(peft.PeftModel.from_pretrained(Model.from_pretrained(checkpoint), folder), inputs)
    assert (expected["questions"] - expected["summaries"]).abs().max() > 1e-2

    alone = peft.AutoPeftModelForCausalLM.from_pretrained("org/questions", trust_remote_code=True)
    torch.testing.assert_close(last_logits(alone, inputs), expected["questions"])
    base = Model.from_pretrained("org/base")
    model = peft.PeftModel.from_pretrained(base, "org/questions", adapter_name="questions")
    model.load_adapter("org/summaries", adapter_name="summaries")
    for name in ("summaries", "questions", "summaries"):
        model.set_adapter(name)
        torch.testing.assert_close(last_logits(model, inputs), expected[name])
    with model.disable_adapter():
        torch.testing.assert_close(last_logits(model, inputs), last_logits(Model.from_pretrained(checkpoint), inputs))

    merged = tmp_path / "merged"
    assert cli.main(["convert", str(checkpoint), str(merged), "--adapter", "org/summaries"]) == 0
    files, _ = publishing.list_files(merged)
    publishing.push(merged, files, make_card(merged, "org/merged"), "org/merged", False, "main")
    assert "adapter_config.json" not in files_of(connected, "org/merged")
    torch.testing.assert_close(last_logits(Model.from_pretrained("org/merged"), inputs), expected["summaries"])


@pytest.mark.slow
def test_a_published_adapter_is_tried_in_a_fresh_process(
    hub: LoopbackHub, published: str, environment: dict[str, str], adapters: dict[str, Path], tmp_path: Path
) -> None:
    program = "import sys; from fastlongspeech.app.cli import main; sys.exit(main(sys.argv[1:]))"
    own = environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    for arguments in (
        ["convert", str(adapters["questions"]), "lora", "--base", REPO],
        ["push", "org/tried", "--model", "lora"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=own, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "answers as lora: logits differ by " in done.stdout.splitlines()[-1]
