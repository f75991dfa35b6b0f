"""Granite Speech, a host whose own CTC head weighs frames, against its class in transformers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_fusion import fuse_by_the_book
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

from fastlongspeech.app.cost import ModelCost
from fastlongspeech.granite_speech_fastlongspeech import FastLongSpeechGraniteSpeechForConditionalGeneration

AUDIO_TOKEN = 60


@pytest.fixture(scope="module")
def stock() -> GraniteSpeechForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    config = GraniteSpeechConfig(
        encoder_config={
            **{"input_dim": 8, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 10},
            **{"context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3, "dropout": 0.0},
        },
        projector_config={
            **sizes,
            **{"model_type": "blip_2_qformer", "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8},
            **{"encoder_hidden_size": 16, "cross_attention_frequency": 1},
        },
        text_config={
            **sizes,
            **{"model_type": "granite", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32},
            **{"num_key_value_heads": 1, "max_position_embeddings": 4096, "logits_scaling": 2.0},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        },
        audio_token_index=AUDIO_TOKEN,
        initializer_range=0.3,
        has_lora_adapter=False,
    )
    model = GraniteSpeechForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def vanilla(stock: GraniteSpeechForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vanilla")
    stock.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(vanilla: Path) -> Any:
    return FastLongSpeechGraniteSpeechForConditionalGeneration.from_pretrained(vanilla).eval()


def audio(*recordings: list[int]) -> dict[str, torch.Tensor]:
    """The windows of recordings, each given by the encoder frames (20 ms) of its windows."""
    lengths = torch.tensor([length for recording in recordings for length in recording])
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(len(lengths), 8, 300, generator=generator).repeat_interleave(10, dim=2)
    return {
        "input_features": steps + 0.3 * torch.randn(steps.shape, generator=generator),
        "feature_attention_mask": (torch.arange(3000) < lengths[:, None]).long(),
        "windows_per_audio": torch.tensor([len(recording) for recording in recordings]),
    }


@torch.no_grad()
@pytest.mark.parametrize("length", [3000, 437, 16])
def test_frames_are_the_stock_features(stock, model, length):
    inputs = audio([length])
    recordings = model.encode(**inputs)
    assert len(recordings.frames) == 3 * -(-length // 15)
    features = inputs["input_features"][..., :length].transpose(1, 2)
    found = model.model.project(model.model.normalise(recordings.frames))
    torch.testing.assert_close(found, stock.get_audio_features(features).pooler_output[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_compression_logits_are_those_of_the_stock_model(stock, model):
    inputs = audio([437])
    ids = torch.tensor([[5, 6, *[AUDIO_TOKEN] * 90, 7, 8]])
    features = inputs["input_features"][..., :437].transpose(1, 2)
    expected = stock(input_ids=ids, input_features=features).logits
    found = model(input_ids=ids, **inputs, compression="none").logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_own_ctc_head_weighs_frames(stock, model):
    inputs = audio([437])
    recordings = model.encode(**inputs)
    encoder = stock.model.encoder
    hidden_states = encoder(inputs["input_features"][..., :437].transpose(1, 2)).last_hidden_state[0]
    spoken = [1 - float(logits.softmax(-1)[0]) for logits in encoder.out(hidden_states)]
    spoken += [0.0] * (450 - 437)
    expected = torch.tensor([sum(spoken[start : start + 5]) / 5 for start in range(0, 450, 5)])
    torch.testing.assert_close(model.density(recordings.frames), expected, rtol=0, atol=1e-5)

    recordings = model.encode(**audio([450]))
    fused, _ = fuse_by_the_book(recordings.frames, 9, model.model.density, model.config.fusion_schedule)
    found = model.compress(recordings, 9)
    torch.testing.assert_close(found.pooler_output, fused[:, :-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batch_answers_as_its_rows_alone(model):
    recordings = ([3000, 437], [200], [16])
    batch = audio(*recordings)
    ids = torch.tensor([[5, AUDIO_TOKEN, 7]]).expand(3, -1)
    options = {"target_length": 9, "max_new_tokens": 4, "do_sample": False}
    answers = model.generate(ids, **batch, **options)
    first = 0
    for number, recording in enumerate(recordings):
        rows = slice(first, first := first + len(recording))
        alone = {name: batch[name][rows] for name in ("input_features", "feature_attention_mask")}
        alone["windows_per_audio"] = torch.tensor([len(recording)])
        assert torch.equal(model.generate(ids[:1], **alone, **options)[0], answers[number])


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = FastLongSpeechGraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.ctc_trained
    inputs = {"input_ids": torch.tensor([[5, *[AUDIO_TOKEN] * 9, 7]]), **audio([437])}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_an_adapter_beside_the_weights_is_merged(vanilla, tmp_path):
    stock = GraniteSpeechForConditionalGeneration.from_pretrained(vanilla).eval()
    targets = r"model\.language_model\..*self_attn\.[qv]_proj"
    stock.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    stock.save_pretrained(str(tmp_path / "both"))
    shutil.copytree(vanilla, tmp_path / "released")
    for path in (tmp_path / "both").glob("adapter_*"):
        shutil.copy(path, tmp_path / "released")
    model = FastLongSpeechGraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "released").eval()
    ids, inputs = torch.tensor([[5, *[AUDIO_TOKEN] * 90, 7]]), audio([437])
    features = inputs["input_features"][..., :437].transpose(1, 2)
    expected = stock(input_ids=ids, input_features=features).logits
    torch.testing.assert_close(model(input_ids=ids, **inputs).logits, expected, rtol=0, atol=1e-4)
    assert not [name for name in model.state_dict() if "lora" in name]


def test_stage_1_is_refused(model):
    with pytest.raises(ValueError, match="CTC head of its own"):
        model.model.reset_ctc_decoder(12)
    with pytest.raises(ValueError, match="CTC head of its own"):
        model.ctc_transcribe(**audio([437]))


def test_cost_counts_no_second_ctc_decoder(model):
    cost = ModelCost(model.config).recording(61, target_length=100)
    assert (cost.windows, cost.frames, cost.tokens) == (2, 612, 100)
    assert cost.flops["ctc decoder"] == cost.flops["projector"] == 0
