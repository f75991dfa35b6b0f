"""Registers FastLongSpeech with vLLM, which calls `register` in each of its processes before a model is loaded."""


def register() -> None:
    """Makes vLLM know the configuration and the model. It may be called any number of times, and touches no GPU."""
    from fastlongspeech import FastLongSpeechConfig  # taking it registers it with transformers' AutoConfig
    from vllm import ModelRegistry  # type: ignore[attr-defined]  # a type checker takes our folder for vLLM

    name = "FastLongSpeechForConditionalGeneration"
    assert FastLongSpeechConfig.model_type == "fastlongspeech"
    if name not in ModelRegistry.get_supported_archs():
        # As text: vLLM imports the model in a process of its own, so that CUDA is not started in this one.
        ModelRegistry.register_model(name, f"fastlongspeech_vllm.model:{name}")
