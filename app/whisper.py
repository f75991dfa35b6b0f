"""Whisper's encoder, from a folder or Hub id of transformers or from a CTranslate2 folder, the form of faster-whisper.

A CTranslate2 `model.bin` is plain: a version, the name and revision of the model, then for every tensor its name,
shape, type and bytes, and last the names of equal tensors, all little-endian; `ctranslate2/specs/model_spec.py` writes
it.
"""

import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

CTRANSLATE2_VERSION = 6
CTRANSLATE2_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}  # 5 is bfloat16
CTRANSLATE2_FILE = "model.bin"


def read_whisper(source: str) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """Returns the encoder (as saved, in evaluation mode) and the feature extractor of a Whisper.

    Args:
        source: a folder of transformers or CTranslate2, or a Hub id of transformers.

    Raises:
        OSError: there is no model.
        ValueError: it is no Whisper, or a CTranslate2 file of a kind that is not read here.
    """
    if (Path(source) / CTRANSLATE2_FILE).is_file():
        encoder = _ctranslate2_encoder(Path(source) / CTRANSLATE2_FILE)
        # Such a folder need not have a preprocessor_config.json; all of Whisper's but the mel bins are the same.
        extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins, return_attention_mask=True)
        return encoder.eval(), extractor
    if os.path.isdir(source) and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"encoder {source} has neither config.json nor {CTRANSLATE2_FILE}; pass the folder of a Whisper model."
        )
    config = WhisperConfig.get_config_dict(source)[0]
    if config.get("model_type") != "whisper":
        raise ValueError(
            f"encoder {source} is a model of the type {config.get('model_type')!r}; pass a Whisper, such as "
            "openai/whisper-base."
        )
    encoder = WhisperModel.from_pretrained(source, dtype="auto").get_encoder()
    extractor = WhisperFeatureExtractor.from_pretrained(source, return_attention_mask=True)
    return encoder.eval(), extractor


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a CTranslate2 `model.bin` by their names.

    Raises:
        ValueError: it has another version of the format, is cut off, or holds bfloat16.
    """
    data = memoryview(path.read_bytes())
    at = 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def take_text() -> str:
        nonlocal at
        length = take("H")
        at += length
        return bytes(data[at - length : at - 1]).decode()  # the last byte is 0

    tensors = {}
    try:
        if (version := take("I")) != CTRANSLATE2_VERSION:
            raise ValueError(
                f"{path} has version {version} of CTranslate2's format, and {CTRANSLATE2_VERSION} is read; convert it "
                "again with a current ctranslate2."
            )
        take_text()
        take("I")  # revision of the model
        for _ in range(take("I")):
            name = take_text()
            shape = [take("I") for _ in range(take("B"))]
            kind, size = take("B"), take("I")
            if kind not in CTRANSLATE2_TYPES:
                raise ValueError(f"{path} holds tensors of CTranslate2's type {kind}; convert it with float16.")
            tensors[name] = np.frombuffer(data[at : at + size], CTRANSLATE2_TYPES[kind]).reshape(shape)
            at += size
        for _ in range(take("I")):  # equal tensors are written once
            name, written = take_text(), take_text()
            tensors[name] = tensors[written]
    except struct.error as error:
        raise ValueError(f"{path} ends too early ({error}); fetch it again.") from error
    return tensors


def _ctranslate2_encoder(path: Path) -> WhisperEncoder:
    tensors = {
        name.removeprefix("encoder/"): value
        for name, value in read_ctranslate2(path).items()
        if name.startswith("encoder/")
    }
    if "conv2/weight" not in tensors or "num_heads" not in tensors:
        raise ValueError(f"{path} is no Whisper: it has no encoder with convolutions; pass a Whisper.")
    if any(name.endswith("weight_scale") for name in tensors):
        raise ValueError(f"{path} is quantised to integers; convert it with --quantization float16, or none.")

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(tensors[name].copy())

    def both(theirs: str, ours: str, weight: str = "weight", bias: str = "bias") -> dict[str, Tensor]:
        return {f"{ours}.weight": tensor(f"{theirs}/{weight}"), f"{ours}.bias": tensor(f"{theirs}/{bias}")}

    def norm(theirs: str, ours: str) -> dict[str, Tensor]:
        return both(theirs, ours, "gamma", "beta")

    state = {
        **both("conv1", "conv1"),
        **both("conv2", "conv2"),
        "embed_positions.weight": tensor("position_encodings/encodings"),
        **norm("layer_norm", "layer_norm"),
    }
    layers = len({name.split("/")[0] for name in tensors if name.startswith("layer_") and "/self_attention/" in name})
    for number in range(layers):
        theirs, ours = f"layer_{number}", f"layers.{number}"
        # Queries, keys and values are one matrix; Whisper's keys have no bias, and theirs is 0.
        joined = both(f"{theirs}/self_attention/linear_0", "joined")
        weights, biases = (joined[f"joined.{name}"].chunk(3) for name in ("weight", "bias"))
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{ours}.self_attn.{name}_proj.weight"] = weight.contiguous()
            if name != "k":
                state[f"{ours}.self_attn.{name}_proj.bias"] = bias.contiguous()
        state |= both(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        state |= norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        state |= both(f"{theirs}/ffn/linear_0", f"{ours}.fc1") | both(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        state |= norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    width, mel_bins = state["conv1.weight"].shape[:2]
    config = WhisperConfig(
        num_mel_bins=mel_bins,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=int(tensors["num_heads"]),
        encoder_ffn_dim=len(state["layers.0.fc1.weight"]),
        max_source_positions=len(state["embed_positions.weight"]),
    )
    encoder = WhisperEncoder._from_config(config)
    encoder.to(state["conv1.weight"].dtype).load_state_dict(state)
    return encoder


__all__ = ["read_ctranslate2", "read_whisper"]
