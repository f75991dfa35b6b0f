"""The hosts: every model of transformers that can be a FastLongSpeech, and where its classes are.

A host's classes are loaded when they are asked for, so that no host loads another one's. A new host is a line in
`HOSTS` and the file that it names.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

PACKAGE = __package__.rpartition(".")[0]


@dataclass(frozen=True)
class Host:
    """A host's classes, loaded and made known to transformers' Auto classes when they are asked for.

    Attributes:
        name: what the names of its classes start with.
        modules: the modules that hold its configuration, its model and its processor.
        vanilla_types: the `model_type`s of checkpoints that are not ours yet.
        model_type: of those that are.
    """

    name: str
    modules: tuple[str, str, str]
    vanilla_types: tuple[str, ...]
    model_type: str

    @property
    def class_names(self) -> tuple[str, str, str]:
        """The names of the configuration, the model and the processor."""
        return (f"{self.name}Config", f"{self.name}ForConditionalGeneration", f"{self.name}Processor")

    def load(self) -> tuple[Any, Any, Any]:
        """Returns the configuration class, the model class and the processor class.

        Raises:
            ValueError: the transformers that is installed lacks the host.
        """
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

        try:
            modules = [importlib.import_module(f"{PACKAGE}.{module}") for module in self.modules]
            config, model, processor = map(getattr, modules, self.class_names)
        except ImportError as error:
            raise ValueError(
                f"{self.model_type} needs a newer transformers ({error}); get it with: pip install -U transformers."
            ) from error
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForCausalLM):
            auto_class.register(config, model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
        return config, model, processor

    @property
    def config(self) -> Any:
        """The configuration class."""
        return self.load()[0]

    @property
    def model(self) -> Any:
        """The class of the model."""
        return self.load()[1]

    @property
    def processor(self) -> Any:
        """The class of the processor."""
        return self.load()[2]


def _host(name: str, file: str, *vanilla_types: str) -> Host:
    return Host(f"FastLongSpeech{name}", 3 * (f"{file}_fastlongspeech",), vanilla_types, f"fastlongspeech_{file}")


QWEN2_AUDIO = Host(
    "FastLongSpeech",
    ("configuration_fastlongspeech", "modeling_fastlongspeech", "processing_fastlongspeech"),
    ("qwen2_audio", "long_speech_qwen2audio"),
    "fastlongspeech",
)
HOSTS = (
    QWEN2_AUDIO,
    _host("AudioFlamingo3", "audioflamingo3", "audioflamingo3"),
    _host("Voxtral", "voxtral", "voxtral"),
    _host("Qwen3ASR", "qwen3_asr", "qwen3_asr"),
    _host("GraniteSpeech", "granite_speech", "granite_speech"),
    _host("Qwen2_5Omni", "qwen2_5_omni", "qwen2_5_omni", "qwen2_5_omni_thinker"),
    _host("Qwen3Omni", "qwen3_omni", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
)


def host_of(config: Any) -> Host:
    """Returns the host whose configuration this is, an object or what its config.json holds, ours or vanilla.

    Raises:
        ValueError: it is that of another kind of model.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    for host in HOSTS:
        if model_type == host.model_type or model_type in host.vanilla_types:
            return host
    known = ", ".join(name for host in HOSTS for name in (host.model_type, *host.vanilla_types))
    raise ValueError(f"{model_type!r} is no model that FastLongSpeech can be built on; pass one of {known}.")


def find_host(source: str) -> Host:
    """Returns the host of the model in a folder or on the Hub, ours or vanilla, by its config.json.

    Raises:
        ValueError: there is no config.json, or it is that of another kind of model.
    """
    return host_of(read_json(source))


def read_json(source: str) -> dict[str, Any]:
    """Returns what the config.json of a folder or of a Hub id holds.

    Raises:
        ValueError: there is none.
    """
    path = Path(source, "config.json")
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, "config.json"))
        except (OSError, ValueError, EntryNotFoundError) as error:
            raise ValueError(f"{source} is no folder, and no config.json can be fetched for it: {error}") from error
    elif not path.is_file():
        raise ValueError(f"{source} holds no config.json; pass the folder of a model or a Hub id.")
    return json.loads(path.read_text(encoding="utf-8"))


__all__ = ["HOSTS", "QWEN2_AUDIO", "Host", "find_host", "host_of", "read_json"]
