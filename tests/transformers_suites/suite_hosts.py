"""transformers' model suite on the other hosts, stock and ours, with the same inputs; see `suite_modeling.py`."""

import unittest
from typing import Any
from unittest.mock import patch

import torch
import transformers
from suite_modeling import CONVERSIONS, SUBMODEL_CONVERSION
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from fastlongspeech.app.hosts import HOSTS

MEL_BINS = 80
VOCABULARY = 99
AUDIO_TOKEN_ID = 0
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
TEXT = {**SIZES, "hidden_size": 32, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 128}
WHISPER = {**SIZES, "hidden_size": 16, "num_mel_bins": MEL_BINS, "max_source_positions": 30}


class HostTester:
    """Builds a tiny host's configuration and a batch of three texts, each with one recording of one full window."""

    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(
        self,
        config_class: Any,
        audio: dict[str, Any],
        text: dict[str, Any],
        window: int,
        frames: int,
        mask: str | None,
    ) -> None:
        self.config_class, self.audio, self.text = config_class, audio, text
        self.window, self.frames, self.mask = window, frames, mask
        self.seq_length = self.encoder_seq_length = frames + 10

    def get_config(self) -> Any:
        ours = {"ctc_vocab_size": 20, "target_length": self.frames} if hasattr(self.config_class, "ctc_blank") else {}
        return self.config_class(
            audio_config=dict(self.audio), text_config=dict(self.text), audio_token_id=AUDIO_TOKEN_ID, **ours
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY - 1) + 1
        input_ids[:, 1 : 1 + self.frames] = AUDIO_TOKEN_ID
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, 0] = 0
        inputs = {
            "input_features": floats_tensor([self.batch_size, MEL_BINS, self.window]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        if self.mask is not None:
            inputs[self.mask] = torch.ones(self.batch_size, self.window, dtype=torch.long)
        return self.get_config(), inputs


class HostTests(ModelTesterMixin, GenerationTesterMixin):
    """What the suite has to know of any host."""

    _is_composite = True
    tester: dict[str, Any]
    config_class: Any
    mask: str | None

    def setUp(self: Any) -> None:
        self.model_tester = HostTester(self.config_class, **self.tester, mask=self.mask)


class OurHostTests(HostTests):
    """The same for ours; as `FastLongSpeechModelTest`, which says why."""

    mask = "feature_attention_mask"
    test_can_init_all_missing_weights_before_2023 = True
    test_all_params_have_gradient = False

    def _prepare_for_class(self: Any, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_can_load_from_already_mapped_keys(self: Any) -> None:
        with patch(CONVERSIONS, return_value=[SUBMODEL_CONVERSION]):
            super().test_can_load_from_already_mapped_keys()

    def test_reverse_loading_mapping(self: Any) -> None:
        with patch(CONVERSIONS, return_value=[SUBMODEL_CONVERSION]):
            super().test_reverse_loading_mapping(check_keys_were_modified=False)


TESTERS: dict[str, dict[str, Any]] = {
    "AudioFlamingo3": {
        "audio": {"model_type": "audioflamingo3_encoder", **WHISPER},
        "text": {"model_type": "qwen2", **TEXT},
        "window": 60,
        "frames": 15,
    },
    "Voxtral": {
        "audio": {"model_type": "voxtral_encoder", **WHISPER, "intermediate_size": 64, "max_source_positions": 32},
        "text": {"model_type": "llama", **TEXT, "head_dim": 8},
        "window": 64,
        "frames": 8,
    },
    "Qwen3ASR": {
        "audio": {
            **{"model_type": "qwen3_asr_encoder", "num_mel_bins": MEL_BINS, "encoder_layers": 2, "d_model": 16},
            **{"encoder_attention_heads": 4, "encoder_ffn_dim": 16, "output_dim": 32, "downsample_hidden_size": 4},
        },
        "text": {"model_type": "qwen3", **TEXT, "head_dim": 8},
        "window": 100,
        "frames": 13,
    },
}
STOCK_MASKS = {"AudioFlamingo3": "input_features_mask", "Voxtral": None, "Qwen3ASR": "input_features_mask"}

for name, tester in TESTERS.items():
    stock = getattr(transformers, f"{name}ForConditionalGeneration", None)
    if stock is None:
        continue  # a transformers without the host
    config, ours, _ = next(host for host in HOSTS if host.name == f"FastLongSpeech{name}").load()
    fields = {"tester": tester, "all_model_classes": (stock,), "config_class": stock.config_class}
    fields["mask"] = STOCK_MASKS[name]
    globals()[f"Stock{name}ModelTest"] = type(f"Stock{name}ModelTest", (HostTests, unittest.TestCase), fields)
    fields = {"tester": tester, "all_model_classes": (ours,), "config_class": config}
    globals()[f"FastLongSpeech{name}ModelTest"] = type(
        f"FastLongSpeech{name}ModelTest", (OurHostTests, unittest.TestCase), fields
    )
