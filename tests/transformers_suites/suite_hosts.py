"""transformers' model suite on the other hosts, stock and ours, with the same inputs; see `suite_modeling.py`."""

import copy
import unittest
from typing import Any
from unittest.mock import patch

import torch
import transformers
from suite_modeling import CONVERSIONS, SUBMODEL_CONVERSION
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from fastlongspeech.app.hosts import HOSTS

MEL_BINS = 80
VOCABULARY = 99
AUDIO_TOKEN_ID = 0
SPECIAL = 4  # placeholders; the tests that shrink the vocabulary leave the first tokens alone
PATCH = 3 * 2 * 4 * 4  # values of one: colours, frames, height, width
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
TEXT = {**SIZES, "hidden_size": 32, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 128}
WHISPER = {**SIZES, "hidden_size": 16, "num_mel_bins": MEL_BINS, "max_source_positions": 30}


class HostTester:
    """Builds a tiny host's configuration and a batch of three texts, each with one recording of one window at most.

    Where the host sees, an image of one patch follows.
    """

    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(
        self,
        config_class: Any,
        config: dict[str, Any],
        window: int,
        frames: int,
        mask: str | None,
        rows: int = MEL_BINS,
        time_first: bool = False,
    ) -> None:
        self.config_class, self.config, self.mask = config_class, config, mask
        self.window, self.frames, self.rows, self.time_first = window, frames, rows, time_first
        self.seq_length = self.encoder_seq_length = frames + 10

    def get_config(self) -> Any:
        ours = {"ctc_vocab_size": 20, "target_length": self.frames} if hasattr(self.config_class, "ctc_blank") else {}
        return self.config_class(**copy.deepcopy(self.config), **ours)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY - SPECIAL) + SPECIAL
        input_ids[:, 1 : 1 + self.frames] = AUDIO_TOKEN_ID
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:, 0] = 0
        features = floats_tensor([self.batch_size, self.rows, self.window])
        inputs = {
            "input_features": features.transpose(1, 2) if self.time_first else features,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        if self.mask is not None:
            inputs[self.mask] = torch.ones(self.batch_size, self.window, dtype=torch.long)
        config = self.get_config()
        if hasattr(config, "vision_config"):
            input_ids[:, -4:-2] = torch.tensor([config.vision_start_token_id, config.image_token_id])
            inputs["pixel_values"] = floats_tensor([self.batch_size, PATCH])
            inputs["image_grid_thw"] = torch.ones(self.batch_size, 3, dtype=torch.long)
        return config, inputs


class HostTests(ModelTesterMixin, GenerationTesterMixin):
    """What the suite has to know of any host."""

    _is_composite = True
    tester: dict[str, Any]
    config_class: Any
    mask: str | None

    def setUp(self: Any) -> None:
        self.model_tester = HostTester(self.config_class, **self.tester, mask=self.mask)

    def test_causal_lm_loss_honors_shift_labels(self: Any) -> None:
        """Also asked of classes that transformers' tables of language models do not name."""
        names = {kind.__name__: kind.__name__ for kind in self.all_model_classes}
        with patch.dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, names):
            super().test_causal_lm_loss_honors_shift_labels()


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


TEXT_OF_3_AXES = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OMNI_AUDIO = {"num_mel_bins": MEL_BINS, "encoder_layers": 2, "d_model": 16, "encoder_attention_heads": 4}
OMNI_AUDIO |= {"encoder_ffn_dim": 16, "output_dim": 32}
QWEN3_AUDIO = {**OMNI_AUDIO, "downsample_hidden_size": 4}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 16, "num_heads": 4, "out_hidden_size": 32}
VISION |= {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 2}
AUDIO_TOKEN = {"audio_token_id": AUDIO_TOKEN_ID}
OMNI_TOKENS = {**AUDIO_TOKEN, "image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3}

TESTERS: dict[str, dict[str, Any]] = {
    "AudioFlamingo3": {
        "config": {
            "audio_config": {"model_type": "audioflamingo3_encoder", **WHISPER},
            "text_config": {"model_type": "qwen2", **TEXT},
            **AUDIO_TOKEN,
        },
        "window": 60,
        "frames": 15,
    },
    "Voxtral": {
        "config": {
            "audio_config": {
                **{"model_type": "voxtral_encoder", **WHISPER},
                **{"intermediate_size": 64, "max_source_positions": 32},
            },
            "text_config": {"model_type": "llama", **TEXT, "head_dim": 8},
            **AUDIO_TOKEN,
        },
        "window": 64,
        "frames": 8,
    },
    "Qwen3ASR": {
        "config": {
            "audio_config": {"model_type": "qwen3_asr_encoder", **QWEN3_AUDIO},
            "text_config": {"model_type": "qwen3", **TEXT, "head_dim": 8},
            **AUDIO_TOKEN,
        },
        "window": 100,
        "frames": 13,
    },
    "Qwen2_5Omni": {
        "config": {
            "audio_config": OMNI_AUDIO,
            "text_config": TEXT_OF_3_AXES,
            "vision_config": {**VISION, "window_size": 8, "fullatt_block_indexes": [0]},
            **OMNI_TOKENS,
        },
        "window": 60,
        "frames": 15,
    },
    "Qwen3Omni": {
        "config": {
            "audio_config": QWEN3_AUDIO,
            "text_config": {
                **{**TEXT_OF_3_AXES, "head_dim": 8, "moe_intermediate_size": 16},
                **{"num_experts": 4, "num_experts_per_tok": 2},
            },
            "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **OMNI_TOKENS,
        },
        "window": 100,
        "frames": 13,
    },
    "GraniteSpeech": {
        "config": {
            "encoder_config": {
                **{"input_dim": 2 * MEL_BINS, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 10},
                **{"context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3},
            },
            "projector_config": {
                **{"model_type": "blip_2_qformer", **SIZES, "hidden_size": 16, "vocab_size": 8},
                **{"encoder_hidden_size": 16, "cross_attention_frequency": 1},
            },
            "text_config": {"model_type": "granite", **TEXT},
            "audio_token_index": AUDIO_TOKEN_ID,
            "has_lora_adapter": False,
        },
        "window": 45,
        "frames": 9,
        "rows": 2 * MEL_BINS,
    },
}
# What the stock class is called, what it calls its mask (None: it takes none), and how it takes the features.
STOCK: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "AudioFlamingo3": ("AudioFlamingo3", "input_features_mask", {}),
    "Voxtral": ("Voxtral", None, {}),
    "Qwen3ASR": ("Qwen3ASR", "input_features_mask", {}),
    "Qwen2_5Omni": ("Qwen2_5OmniThinker", "feature_attention_mask", {}),
    "Qwen3Omni": ("Qwen3OmniMoeThinker", "feature_attention_mask", {}),
    "GraniteSpeech": ("GraniteSpeech", None, {"time_first": True}),
}
# What the suite may not ask of a stock class. Its audio features of all recordings stand in one row.
IN_ONE_ROW = {"skip_test_audio_features_output_shape": True}
NOT_OF_STOCK: dict[str, dict[str, bool]] = {
    "Qwen3ASR": IN_ONE_ROW,
    "Qwen2_5Omni": {**IN_ONE_ROW, "test_all_params_have_gradient": False},  # it never reads `audio_bos_eos_token`
    "Qwen3Omni": IN_ONE_ROW,
}

for name, tester in TESTERS.items():
    stock_name, mask, more = STOCK[name]
    stock = getattr(transformers, f"{stock_name}ForConditionalGeneration", None)
    if stock is None:
        continue  # a transformers without the host
    config, ours, _ = next(host for host in HOSTS if host.name == f"FastLongSpeech{name}").load()
    fields = {"all_model_classes": (stock,), "config_class": stock.config_class, "tester": {**tester, **more}}
    fields |= {"mask": mask, **NOT_OF_STOCK.get(name, {})}
    globals()[f"Stock{name}ModelTest"] = type(f"Stock{name}ModelTest", (HostTests, unittest.TestCase), fields)
    fields = {"all_model_classes": (ours,), "config_class": config, "tester": tester}
    globals()[f"FastLongSpeech{name}ModelTest"] = type(
        f"FastLongSpeech{name}ModelTest", (OurHostTests, unittest.TestCase), fields
    )
