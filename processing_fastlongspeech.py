"""The processor of FastLongSpeech on Qwen2-Audio: its tokens and its chat template."""

from .configuration_fastlongspeech import FastLongSpeechConfig
from .processor_fastlongspeech import SpeechProcessor

# Qwen2-Audio's: every recording is announced as "Audio 1:", "Audio 2:", ... and has one placeholder.
CHAT_TEMPLATE = (
    "{% set audio = namespace(count=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
    "{% set audio.count = audio.count + 1 %}"
    "Audio {{ audio.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in part %}"
    "{{ part['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)


class FastLongSpeechProcessor(SpeechProcessor):
    """Turns prompts and recordings of any duration into the inputs of FastLongSpeech; see `SpeechProcessor`."""

    config_class = FastLongSpeechConfig
    template = CHAT_TEMPLATE
    tokens = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "end_of_turn_token": "<|im_end|>",
    }


__all__ = ["FastLongSpeechProcessor"]
