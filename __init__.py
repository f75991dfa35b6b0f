"""FastLongSpeech: ask questions about recordings of any duration.

Taking anything from the package, as by `from fastlongspeech import FastLongSpeechProcessor`, loads torch and
transformers and registers the classes with transformers' Auto classes, so that checkpoints load without
`trust_remote_code`. The classes of other hosts, such as `FastLongSpeechAudioFlamingo3Config`, are there by their names
too: a host is loaded and registered when one of its classes is taken. Importing the package alone loads neither torch
nor transformers: a command that needs no model answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio_fastlongspeech import load_recording
    from .configuration_fastlongspeech import FastLongSpeechConfig
    from .modeling_fastlongspeech import (
        FastLongSpeechAudioOutput,
        FastLongSpeechForConditionalGeneration,
        FastLongSpeechModel,
    )
    from .processing_fastlongspeech import FastLongSpeechProcessor
    from .recordings_fastlongspeech import EncodedRecordings
    from .summarised_fastlongspeech import SummarisedRecordings

__all__ = [
    "EncodedRecordings",
    "FastLongSpeechAudioOutput",
    "FastLongSpeechConfig",
    "FastLongSpeechForConditionalGeneration",
    "FastLongSpeechModel",
    "FastLongSpeechProcessor",
    "SummarisedRecordings",
    "load_recording",
]


if not TYPE_CHECKING:  # a type checker would take this for leave to name anything

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            loaded = _load_host(name) if name.startswith("FastLongSpeech") else None
            if loaded is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            return loaded
        loaded = _load()
        globals().update({public: loaded[public] for public in __all__})
        return globals()[name]


def _load() -> dict[str, Any]:
    """Returns the public names with what they stand for, which transformers' Auto classes know from then on."""
    from . import audio_fastlongspeech, modeling_fastlongspeech, recordings_fastlongspeech, summarised_fastlongspeech
    from .app.hosts import QWEN2_AUDIO

    modules = (audio_fastlongspeech, modeling_fastlongspeech, recordings_fastlongspeech, summarised_fastlongspeech)
    loaded = {name: value for module in modules for name, value in vars(module).items()}
    return loaded | dict(zip(QWEN2_AUDIO.class_names, QWEN2_AUDIO.load(), strict=True))


def _load_host(name: str) -> Any:
    """Returns a class of another host than Qwen2-Audio by its name; None: there is no such class."""
    from .app.hosts import HOSTS

    for host in HOSTS:
        if name in host.class_names:
            globals().update(zip(host.class_names, host.load(), strict=True))
            return globals()[name]
    return None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
