"""Granite Speech, a host whose own CTC head weighs frames, against its class in transformers."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import TinyHost
from peft import LoraConfig
from safetensors.torch import load_file
from test_fusion import fuse_by_the_book
from test_hosts import FRESH_PROCESS, OTHERS, RATE, arguments, noise
from test_quantised import QUANTISED, assert_same_densities
from test_remote_code import run_without_the_package
from transformers import (
    AutoProcessor,
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
)

from fastlongspeech.app import cli
from fastlongspeech.app.cost import ModelCost
from fastlongspeech.app.loading import load_model
from fastlongspeech.evaluation import run
from fastlongspeech.granite_speech_fastlongspeech import FastLongSpeechGraniteSpeechForConditionalGeneration
from fastlongspeech.hub.convert import convert
from fastlongspeech.train import ctc, dct

MEL_BINS = 80
TINY = TinyHost(
    model_type="granite_speech",
    stock="GraniteSpeechForConditionalGeneration",
    audio={},
    text={},
    tokens=("<|audio|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
)
TOKENIZER = TINY.tokenizer()
AUDIO_TOKEN = TOKENIZER.convert_tokens_to_ids("<|audio|>")


@pytest.fixture(scope="module")
def stock() -> GraniteSpeechForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    config = GraniteSpeechConfig(
        encoder_config={
            **{"input_dim": 2 * MEL_BINS, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 10},
            **{"context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3, "dropout": 0.0},
        },
        projector_config={
            **sizes,
            **{"model_type": "blip_2_qformer", "hidden_size": 16, "intermediate_size": 16, "vocab_size": 8},
            **{"encoder_hidden_size": 16, "cross_attention_frequency": 1},
        },
        text_config={
            **sizes,
            **{"model_type": "granite", "vocab_size": len(TOKENIZER), "hidden_size": 24, "intermediate_size": 32},
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
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(vanilla: Path) -> Any:
    return FastLongSpeechGraniteSpeechForConditionalGeneration.from_pretrained(vanilla).eval()


def audio(*recordings: list[int]) -> dict[str, torch.Tensor]:
    """The windows of recordings, each given by the encoder frames (20 ms) of its windows."""
    lengths = torch.tensor([length for recording in recordings for length in recording])
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(len(lengths), 2 * MEL_BINS, 300, generator=generator).repeat_interleave(10, dim=2)
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


@torch.no_grad()
def test_several_recordings_are_heard_in_order(model):
    inputs = audio([437], [3000, 200])
    ids = torch.tensor([[5, AUDIO_TOKEN, 6, AUDIO_TOKEN, 7]])
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(ids, **inputs, target_length=9, **options)[0, ids.shape[1] :]
    heard = [
        model.get_audio_features(**audio_of, target_length=9).pooler_output
        for audio_of in (
            {name: inputs[name][:1] for name in inputs},
            {name: inputs[name][1:] for name in inputs},
        )
    ]
    first, between, last = model.get_input_embeddings()(torch.tensor([[5], [6], [7]]))
    by_hand = torch.cat([first, heard[0], between, heard[1], last])[None]
    torch.testing.assert_close(model.generate(inputs_embeds=by_hand, **options)[0], answer)


def test_hours_take_linear_time_and_bounded_memory(model, monkeypatch):
    extractor, read = model.model, []

    def count(input_features: torch.Tensor, mel_frames: torch.Tensor) -> torch.Tensor:
        read.append(len(input_features))
        frames = int(extractor.windows.count_frames(mel_frames).max())
        return torch.zeros(len(mel_frames), frames, extractor.config.frame_width)

    monkeypatch.setattr(extractor, "encode_windows", count)
    for hours in (1, 2):
        windows = hours * 60  # of 3,000 encoder frames of 20 ms
        features = torch.zeros(1, 1, 3000).expand(windows, 2 * MEL_BINS, -1)
        mask = torch.ones(1, 3000, dtype=torch.long).expand(windows, -1)
        recordings = extractor.encode(features, mask, torch.tensor([windows]))
        assert len(recordings.frames) == hours * 36_000  # 10 in a second
        assert sum(read) == windows and max(read) * 3000 <= 6000  # encoder frames that a CPU reads at a time
        read.clear()


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = FastLongSpeechGraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, *[AUDIO_TOKEN] * 9, 7]]), **audio([437])}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def save_adapter(vanilla: Path, folder: Path) -> Any:
    """Writes a random adapter of the stock model, and returns both together."""
    stock = GraniteSpeechForConditionalGeneration.from_pretrained(vanilla).eval()
    targets = r"model\.language_model\..*self_attn\.[qv]_proj"
    stock.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    with tempfile.TemporaryDirectory() as both:
        stock.save_pretrained(both)
        for path in Path(both).glob("adapter_*"):
            shutil.copy(path, folder)
    return stock


@torch.no_grad()
def test_an_adapter_beside_the_weights_is_merged(vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "released")
    stock = save_adapter(vanilla, tmp_path / "released")
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


@pytest.mark.slow
def test_cost_with_the_sizes_of_the_class():
    # The encoder is 1024 wide by default, and the projector reads another width.
    projector = {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}
    cost = ModelCost(TINY.host.config(projector_config=projector)).recording(3600, answer_tokens=100)
    assert cost.frames == 36_000
    assert cost.flops["encoder"] > 1e13 and cost.flops["ctc decoder"] == 0


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4"])
def test_quantised_loading_keeps_the_densities(model, tmp_path, kind):
    model.save_pretrained(tmp_path)
    inputs = audio([437])
    quantised = type(model).from_pretrained(tmp_path, quantization_config=QUANTISED[kind]()).eval()
    layer = quantised.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight.data) is not torch.Tensor  # it is quantised indeed
    found = quantised.density(quantised.encode(**inputs).frames)
    assert_same_densities(found, model.density(model.encode(**inputs).frames))


# With a processor


@pytest.fixture(scope="module")
def released(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all parts of a released checkpoint: weights, tokenizer, feature extractor, adapter."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError) as error:  # the latter where PyPI's torchaudio, built for CUDA, meets a CPU's torch
        pytest.skip(f"Granite Speech's feature extractor needs torchaudio: {error}")
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(vanilla, folder, dirs_exist_ok=True)
    GraniteSpeechFeatureExtractor().save_pretrained(folder)
    save_adapter(vanilla, folder)
    return folder


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    record = convert(released, folder, device="cpu")
    assert 0 <= record["differences"]["logits"] < 1e-4
    return folder


def test_convert_merges_the_adapter_beside_the_weights(released, converted):
    """As PEFT merges it in the stock class, and nothing else is changed."""
    ours, _ = load_model(str(converted), "cpu")
    stock = GraniteSpeechForConditionalGeneration.from_pretrained(released).eval()
    ids, inputs = torch.tensor([[5, *[AUDIO_TOKEN] * 90, 7]]), audio([437])
    features = inputs["input_features"][..., :437].transpose(1, 2)
    with torch.no_grad():
        expected = stock(input_ids=ids, input_features=features).logits
        torch.testing.assert_close(ours(input_ids=ids, **inputs).logits, expected, rtol=0, atol=1e-4)
    assert not list(converted.glob("adapter_*"))
    with pytest.raises(ValueError, match="has an adapter of its own beside its weights"):
        convert(released, converted.parent / "other", adapter=str(released), device="cpu")


def test_a_processor_makes_the_features_of_the_stock_one(converted):
    samples = noise(7.3)[0]
    processor = AutoProcessor.from_pretrained(converted)
    found = processor(audio=samples, sampling_rate=RATE)
    expected = GraniteSpeechFeatureExtractor()(samples)["input_features"][0]
    held = len(expected)
    assert found["feature_attention_mask"].sum() == held == int(processor.windows.mel_frames(len(samples)).sum())
    torch.testing.assert_close(found["input_features"][0, :, :held].T, expected)


def test_stage_2_starts_at_once_and_stage_1_says_why_not(converted, data, tmp_path):
    with pytest.raises(ValueError, match="CTC head of its own"):
        ctc.main(arguments(ctc, converted, data, tmp_path / "stage-1"))
    dct.main(arguments(dct, converted, data, tmp_path / "stage-2"))
    before, after = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "stage-2"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"language_model\..*self_attn\.[qkvo]_proj\.weight", name)}


@pytest.mark.slow
def test_a_fresh_process_loads_a_folder_without_the_package(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    np.save(tmp_path / "audio.npy", noise(2.3)[0])
    model, processor = load_model(str(converted), "cpu")
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(chat)
    run_without_the_package(tmp_path, FRESH_PROCESS, prompt, ",".join(OTHERS))
    found = load_file(tmp_path / "out.safetensors")
    inputs = processor(text=prompt, audio=noise(2.3), target_length=9)
    torch.testing.assert_close(found["logits"], model(**inputs).logits, rtol=0, atol=1e-5)
    assert torch.equal(found["answer"], model.generate(**inputs, max_new_tokens=3, do_sample=False))


@pytest.mark.slow
def test_evaluate(converted, data, tmp_path):
    command = ["--task", "qa", "--data", data / "qa.jsonl", "--model", converted, "--device", "cpu"]
    command += ["--target-length", 5, "--max-new-tokens", 3, "--limit", 2, "--output", tmp_path / "out"]
    run.main([str(word) for word in command])
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2


def test_ask_and_transcribe_leave_the_ctc_decoder_out(converted, data, capsys):
    recording = str(data / "clips" / "0.wav")
    options = ["--model", str(converted), "--device", "cpu"]
    assert cli.main(["ask", recording, "Who?", *options, "--max-new-tokens", "3"]) == 0
    assert cli.main(["transcribe", recording, *options]) == 0
    assert cli.main(["transcribe", recording, *options, "--ctc"]) == 1
    assert "this model has no trained CTC decoder" in capsys.readouterr().err
