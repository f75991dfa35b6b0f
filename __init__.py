"""FastLongSpeech: ask questions about recordings of any duration.

Taking anything from the package, as by `from fastlongspeech import FastLongSpeechProcessor`, loads torch and
transformers and registers the classes with transformers' Auto classes, so that checkpoints load without
`trust_remote_code`. Importing the package alone loads neither: a command that needs no model answers at once.
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

__all__ = [
    "EncodedRecordings",
    "FastLongSpeechAudioOutput",
    "FastLongSpeechConfig",
    "FastLongSpeechForConditionalGeneration",
    "FastLongSpeechModel",
    "FastLongSpeechProcessor",
    "load_recording",
]


if not TYPE_CHECKING:  # a type checker would take this for leave to name anything

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        loaded = _load()
        globals().update({public: loaded[public] for public in __all__})
        return globals()[name]


def _load() -> dict[str, Any]:
    """Returns the public names with what they stand for, which transformers' Auto classes know from then on."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

    from . import audio_fastlongspeech, modeling_fastlongspeech, processing_fastlongspeech, recordings_fastlongspeech

    modules = (audio_fastlongspeech, modeling_fastlongspeech, processing_fastlongspeech, recordings_fastlongspeech)
    loaded = {name: value for module in modules for name, value in vars(module).items()}
    config, model = loaded["FastLongSpeechConfig"], loaded["FastLongSpeechForConditionalGeneration"]
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForCausalLM):
        auto_class.register(config, model, exist_ok=True)
    AutoProcessor.register(config, loaded["FastLongSpeechProcessor"], exist_ok=True)
    return loaded


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
