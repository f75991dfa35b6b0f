"""transformers' processor suite, on stock Qwen2-Audio's and on FastLongSpeech's."""

import unittest

from tokenizers import pre_tokenizers
from transformers import Qwen2AudioProcessor, Qwen2Tokenizer, WhisperFeatureExtractor
from transformers_tests.test_processing_common import ProcessorTesterMixin

from fastlongspeech import FastLongSpeechProcessor


class AudioProcessorTests(ProcessorTesterMixin):
    """Parts of a tiny Qwen2-Audio processor: 80 mel bins, one token per byte."""

    @classmethod
    def _setup_feature_extractor(cls) -> WhisperFeatureExtractor:
        return WhisperFeatureExtractor(feature_size=80)

    @classmethod
    def _setup_tokenizer(cls) -> Qwen2Tokenizer:
        vocab = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        return Qwen2Tokenizer(
            vocab=vocab,
            merges=[],
            eos_token="<|im_end|>",
            extra_special_tokens=["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
        )


class StockProcessorTest(AudioProcessorTests, unittest.TestCase):
    """The measure: what fails or is skipped here can't be asked of FastLongSpeech."""

    processor_class = Qwen2AudioProcessor
    audio_unstructured_max_length = 500  # stock hands `max_length` to the feature extractor too, as samples


class FastLongSpeechProcessorTest(AudioProcessorTests, unittest.TestCase):
    processor_class = FastLongSpeechProcessor
