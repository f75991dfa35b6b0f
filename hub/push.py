"""Publishes a model's folder on a Hub, and tries what was published as a stranger would.

    fastlongspeech push org/name --model MODEL --dry-run    # lists what would go, and shows the card
    fastlongspeech push org/name --model MODEL --license apache-2.0 --language en

Weights, code, processor and card go in one commit: others see all of it or nothing. A push that was stopped is run
again; large files that have arrived are not sent twice. Then a fresh process downloads that commit, loads it with
trust_remote_code, and its logits are compared with those of the folder.
"""

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file

from ..app.defaults import find_model
from ..app.loading import load_model
from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import is_adapter
from .card import make_card
from .verify import compare, make_recording

# Everything that a model needs and nothing else: no checkpoints of the training, no settings with paths, no pickle.
PUBLISHED = ["*.safetensors", "*.safetensors.index.json", "*_fastlongspeech.py", "config.json", "*_config.json"]
PUBLISHED += ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
PUBLISHED += ["*.jinja", "ctc.model", "*.png", "learning-curves.json", "README.md"]
MADE = ("license", "language", "dataset", "base_model")  # for a card that is made
# The error of the client's own HTTP library, whichever that is; those that a Hub answers with are kinds of it.
HTTP_ERROR: Any = HfHubHTTPError.__mro__[1]
NEEDED = ["config.json", "processor_config.json", "tokenizer.json", "*_fastlongspeech.py", "*.safetensors"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="fastlongspeech push", description=__doc__.split("\n")[0])
    parser.add_argument("repo", metavar="REPO", type=repo_id, help="org/name")
    parser.add_argument("--model", help="folder of the model or adapter (default: the demo model of a checkout)")
    parser.add_argument("--private", action="store_true", help="for those alone who may see it; if it is new")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch, made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and show the card")
    parser.add_argument("--license", metavar="ID", type=license_id, help="such as apache-2.0, for a card that is made")
    parser.add_argument("--language", action="append", metavar="CODE", help="such as en; may be repeated")
    parser.add_argument("--dataset", action="append", metavar="ID", help="trained on it; may be repeated")
    parser.add_argument(
        "--base-model", metavar="ID", type=repo_id, help="Hub id it was made of (default: what its records say)"
    )
    arguments = parser.parse_args(argv)
    folder = Path(find_model(arguments.model))
    if not folder.is_dir():
        parser.error(f"--model {folder} is no folder; name one with a model or an adapter.")
    made = [f"--{name.replace('_', '-')}" for name in MADE if getattr(arguments, name)]
    if made and (folder / "README.md").exists():
        parser.error(
            f"{', '.join(made)} would change nothing: {folder} has a README.md, which is its card; edit that."
        )
    files, left_out = list_files(folder)
    card = make_card(
        folder, arguments.repo, arguments.license, arguments.language, arguments.dataset, arguments.base_model
    )
    for path in files:
        print(f"{path.stat().st_size:>15,} bytes  {path.name}")
    print(f"{len(card.encode()):>15,} bytes  README.md, the card")
    if left_out:
        print(f"stays here: {', '.join(left_out)}")
    if arguments.dry_run:
        print(f"\n{card}")
        return
    commit = push(folder, files, card, arguments.repo, arguments.private, arguments.revision)
    print(f"published as {commit}; trying it in a fresh process")
    apart = check_published(folder, arguments.repo, commit)
    print(f"{arguments.repo} at {commit} answers as {folder}: logits differ by {apart:.1e} of the largest one.")


def repo_id(text: str) -> str:
    """Returns the name of a repository on a Hub; another text is refused as an argument."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def license_id(text: str) -> str:
    """Returns the name of a licence as the Hub writes them; another text is refused as an argument."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"it must be a name such as apache-2.0, cc-by-4.0 or other, got {text}.")
    return text


def list_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the files of a folder that are published, the card not counted, and the names of what stays.

    Raises:
        ValueError: the folder is not complete.
    """
    here = sorted(folder.iterdir())
    files = [p for p in here if p.is_file() and any(fnmatch.fnmatch(p.name, pattern) for pattern in PUBLISHED)]
    needed = [ADAPTER_CONFIG, "*.safetensors"] if is_adapter(folder) else NEEDED
    missing = [pattern for pattern in needed if not fnmatch.filter([path.name for path in files], pattern)]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: it is no complete model; save model and processor into it, or "
            "make one by fastlongspeech convert."
        )
    if is_adapter(folder) and Path(str(_base_of(folder))).exists():
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names the folder {_base_of(folder)} as its base, which others do not have; "
            "publish the base first, and set base_model_name_or_path to its Hub id (convert --base)."
        )
    stays = [path.name for path in here if path not in files]
    return [path for path in files if path.name != "README.md"], stays


def push(folder: Path, files: list[Path], card: str, repo: str, private: bool, revision: str) -> str:
    """Returns the id of the commit that brought files and card to a Hub.

    Raises:
        OSError: the Hub can't be reached, refuses, or the line was cut; nothing is published then.
    """
    api = HfApi()
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    message = f"Publish {folder.resolve().name}"
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        return api.create_commit(repo, operations, commit_message=message, revision=revision).oid
    except OSError:  # what the Hub itself answers
        raise
    except HTTP_ERROR as error:
        raise OSError(f"{api.endpoint} can't be reached ({error}); nothing is published: run push again.") from error
    except RuntimeError as error:  # of the upload of a large file; the reason is its cause
        raise OSError(
            f"{error} ({error.__cause__}); nothing is published, and what has arrived stays there: run push again."
        ) from error


def check_published(folder: Path, repo: str, commit: str) -> float:
    """Returns how far the logits of a published commit are from those of the folder, as a part of the largest one.

    Raises:
        ValueError: what was published does not load, or answers otherwise.
    """
    base = _base_of(folder) if is_adapter(folder) else None
    with tempfile.TemporaryDirectory() as place:
        recording, output = Path(place, "recording.wav"), Path(place, "logits.safetensors")
        soundfile.write(recording, make_recording(16_000), 16_000, subtype="FLOAT")
        code = Path(__file__).with_name("fresh.py").read_text(encoding="utf-8")
        arguments = [repo, commit, str(recording), str(output), *([base] if base else [])]
        # A cache of its own, so that the commit is fetched and nothing of ours is found.
        caches = {"HF_HUB_CACHE": f"{place}/hub", "HF_MODULES_CACHE": f"{place}/modules"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=place,
            env=os.environ | caches,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it ended without a word"]
            raise ValueError(f"{repo} at {commit} is published, but does not load in a fresh process: {lines[-1]}")
        found = load_file(output)
        expected = _own_logits(folder, base, recording)
    return compare({"logits": expected["logits"]}, found, expected["dtype"])["logits"]


@torch.no_grad()
def _own_logits(folder: Path, base: str | None, recording: Path) -> dict[str, Any]:
    """Returns what the folder itself answers to the question of `fresh.py`, and the dtype it was computed in."""
    model: Any
    model, processor = load_model(base or str(folder), "cpu")
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).eval()
    parts = [{"type": "audio", "path": str(recording)}, {"type": "text", "text": "What is said?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    inputs["input_features"] = inputs["input_features"].to(model.dtype)
    return {"logits": model(**inputs).logits[0].float(), "dtype": model.dtype}


def _base_of(folder: Path) -> str | None:
    return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")


if __name__ == "__main__":
    main()
