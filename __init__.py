"""FastLongSpeech: ask questions about recordings of any duration.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints load without
`trust_remote_code`.
"""

import sys

try:
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    from .audio_fastlongspeech import load_recording
    from .configuration_fastlongspeech import FastLongSpeechConfig
    from .modeling_fastlongspeech import (
        FastLongSpeechAudioOutput,
        FastLongSpeechForConditionalGeneration,
        FastLongSpeechModel,
    )
    from .processing_fastlongspeech import FastLongSpeechProcessor
    from .recordings_fastlongspeech import EncodedRecordings
except KeyboardInterrupt:
    if hasattr(sys, "ps1"):
        raise
    sys.exit(130)  # Ctrl-C while torch loads: commands leave quietly

__all__ = [
    "EncodedRecordings",
    "FastLongSpeechAudioOutput",
    "FastLongSpeechConfig",
    "FastLongSpeechForConditionalGeneration",
    "FastLongSpeechModel",
    "FastLongSpeechProcessor",
    "load_recording",
]

AutoConfig.register(FastLongSpeechConfig.model_type, FastLongSpeechConfig, exist_ok=True)
AutoModel.register(FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FastLongSpeechConfig, FastLongSpeechProcessor, exist_ok=True)
