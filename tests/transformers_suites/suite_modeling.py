"""transformers' model suite, on stock Qwen2-Audio and on FastLongSpeech, with the same inputs for both.

Generation is not tested here: `GenerationTesterMixin` is an empty class, see `run.py`.
"""

import unittest
from typing import Any
from unittest.mock import Mock, patch

import torch
from transformers import PreTrainedModel, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechModel

MEL_FRAMES = 60  # of one window of the tiny model: twice its encoder's positions
AUDIO_TOKENS = 15  # one for each pooled frame of such a window
MEL_BINS = 80
VOCABULARY = 99
AUDIO_TOKEN_ID = 0

# Custom classes have no entry in transformers' table of renamed parameters, and without one two tests of saving and
# loading are skipped. Any entry lets them run.
CONVERSIONS = "transformers_tests.test_modeling_common.get_model_conversion_mapping"
SUBMODEL_CONVERSION = Mock(scope_prefix="a submodel, which these tests leave alone")


class AudioModelTester:
    """Builds a tiny model's config and a batch of three texts, each with one recording of one full window."""

    batch_size = 3
    seq_length = encoder_seq_length = 25
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, config_class: type[Qwen2AudioConfig], **settings: Any) -> None:
        self.config_class = config_class
        self.settings = settings

    def get_config(self) -> Qwen2AudioConfig:
        text_config = {
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden_size,
            "intermediate_size": 36,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 52,
        }
        audio_config = {
            "model_type": "qwen2_audio_encoder",
            "d_model": 16,
            "encoder_layers": self.num_hidden_layers,
            "encoder_attention_heads": self.num_attention_heads,
            "encoder_ffn_dim": 16,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": MEL_FRAMES // 2,
        }
        return self.config_class(
            text_config=text_config, audio_config=audio_config, audio_token_index=AUDIO_TOKEN_ID, **self.settings
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Qwen2AudioConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY - 1) + 1
        input_ids[:, 1 : 1 + AUDIO_TOKENS] = AUDIO_TOKEN_ID
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, 0] = 0
        inputs = {
            "input_features": floats_tensor([self.batch_size, MEL_BINS, MEL_FRAMES]),
            "feature_attention_mask": torch.ones(self.batch_size, MEL_FRAMES, dtype=torch.long),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        return self.get_config(), inputs


class AudioModelTests(ModelTesterMixin, GenerationTesterMixin):
    """What the suite has to know about any Qwen2-Audio."""

    _is_composite = True
    config_tester: ConfigTester
    base_model_class: type[PreTrainedModel]

    def setUp(self: Any) -> None:
        """Lets the tests of rotary positions run: they look for a class without a head, by its name in a table."""
        if "rope" in self._testMethodName:
            self.all_model_classes = (self.base_model_class,)
            name = {"the base model under test": self.base_model_class.__name__}
            named = patch.dict(MODEL_MAPPING_NAMES, name)
            named.start()
            self.addCleanup(named.stop)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class StockModelTest(AudioModelTests, unittest.TestCase):
    """The measure: what fails or is skipped here can't be asked of FastLongSpeech."""

    all_model_classes = (Qwen2AudioForConditionalGeneration,)
    base_model_class = Qwen2AudioModel

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = AudioModelTester(Qwen2AudioConfig)
        self.config_tester = ConfigTester(self, config_class=Qwen2AudioConfig, has_text_modality=False)


class FastLongSpeechModelTest(AudioModelTests, unittest.TestCase):
    all_model_classes = (FastLongSpeechForConditionalGeneration,)
    base_model_class = FastLongSpeechModel
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack
    test_all_params_have_gradient = False  # with text labels the CTC decoder only weighs frames, without gradient

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = AudioModelTester(FastLongSpeechConfig, ctc_vocab_size=20, target_length=AUDIO_TOKENS)
        self.config_tester = ConfigTester(self, config_class=FastLongSpeechConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:  # which the suite makes for the names of its own classes only
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_can_load_from_already_mapped_keys(self) -> None:
        with patch(CONVERSIONS, return_value=[SUBMODEL_CONVERSION]):
            super().test_can_load_from_already_mapped_keys()

    def test_reverse_loading_mapping(self) -> None:
        with patch(CONVERSIONS, return_value=[SUBMODEL_CONVERSION]):
            super().test_reverse_loading_mapping(check_keys_were_modified=False)
