"""Every host against its own class in transformers: the same frames and logits, and all that Qwen2-Audio can."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hosts import TINY_HOSTS, TinyHost
from safetensors.torch import load_file
from test_fusion import fuse_by_the_book
from test_quantised import QUANTISED, assert_same_densities
from test_remote_code import run_without_the_package
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from fastlongspeech.app.cost import ModelCost
from fastlongspeech.app.counting import count
from fastlongspeech.app.loading import load_model
from fastlongspeech.evaluation import run
from fastlongspeech.hub.convert import convert
from fastlongspeech.train import ctc, dct

RATE = 16000
WHOLE = 60  # seconds that fill whole windows of every host


# What takes seconds is asked of the first host in the quick tests, of the others in the slow ones.
LONG = (
    "test_both_stages_train_what_they_should",
    "test_quantised_loading_keeps_the_densities",
    "test_convert_a_vanilla_folder",
    "test_cost_with_the_sizes_of_the_released_model",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny" in metafunc.fixturenames:
        others = [pytest.mark.slow] if metafunc.function.__name__ in LONG else []
        hosts = [
            pytest.param(tiny, id=tiny.model_type, marks=[] if tiny is TINY_HOSTS[0] else others)
            for tiny in TINY_HOSTS
        ]
        metafunc.parametrize("tiny", hosts, indirect=True, scope="module")


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> TinyHost:
    request.param.skip_if_missing()
    return request.param


@pytest.fixture(scope="module")
def vanilla(tiny: TinyHost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it of the host's own model, with tokenizer and feature extractor."""
    folder = tmp_path_factory.mktemp("vanilla")
    stock = tiny.make_stock()
    stock.generation_config.eos_token_id = None
    stock.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.feature_extractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tiny: TinyHost, vanilla: Path) -> SimpleNamespace:
    """The same as a model of ours, with a CTC decoder of 2 pieces that weighs frames, and the processor."""
    model: Any
    model, processor = load_model(str(vanilla), "cpu")
    torch.manual_seed(1)
    model.model.reset_ctc_decoder(2)
    for weight in model.model.ctc_decoder.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)  # densities that differ, none of them near 0 or 1
    model.config.ctc_trained = True
    return SimpleNamespace(model=model.eval(), processor=processor, stock=tiny.make_stock())


def noise(seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    """A recording that changes from second to second, and its sampling rate."""
    generator = np.random.default_rng(seed)
    loudness = generator.uniform(0.01, 0.5, size=round(seconds) + 1).repeat(RATE)[: round(seconds * RATE)]
    return (loudness * generator.standard_normal(len(loudness))).astype(np.float32), RATE


def ask(loaded: SimpleNamespace, recordings: list, **options: Any) -> Any:
    """The inputs of a question about every recording."""
    chats = [
        [{"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": "What is said?"}]}]
        for audio in recordings
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **options}
    return loaded.processor.apply_chat_template(chats, **options)


@torch.no_grad()
def test_frames_projected_by_hand_are_the_stock_features(tiny, loaded):
    inputs = loaded.processor(audio=noise(WHOLE))
    recordings = loaded.model.encode(**inputs)
    assert recordings.lengths.tolist() == [2 * tiny.frames]
    extractor = loaded.model.model
    found = extractor.project(extractor.normalise(recordings.frames))
    expected = loaded.stock.get_audio_features(**tiny.stock_inputs(inputs)).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_compression_logits_are_those_of_the_stock_model(tiny, loaded):
    inputs = ask(loaded, [noise(WHOLE / 2)], compression="none")
    expected = loaded.stock(input_ids=inputs["input_ids"], **tiny.stock_inputs(inputs)).logits
    torch.testing.assert_close(loaded.model(**inputs, compression="none").logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_fusion_is_that_of_the_book(loaded):
    extractor = loaded.model.model
    recordings = extractor.encode(**loaded.processor(audio=noise(8.3)))
    density = loaded.model.density(recordings.frames)
    assert bool((density != density[0]).any())  # it weighs indeed
    fused, members = fuse_by_the_book(recordings.frames, 7, extractor.density, loaded.model.config.fusion_schedule)
    found = extractor.compress(recordings, 7)
    torch.testing.assert_close(found.last_hidden_state, extractor.normalise(fused), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.pooler_output, extractor.project(extractor.normalise(fused)), rtol=1e-3, atol=1e-4
    )
    starts = [float(recordings.starts[frames[0]]) for frames in members]
    torch.testing.assert_close(found.spans[:, 0].tolist(), starts)


@torch.no_grad()
def test_frames_cover_the_recording(loaded):
    for seconds in (0.3, 3.21875, 31.7):
        inputs = loaded.processor(audio=noise(seconds))
        counted = loaded.processor.windows.mel_frames(round(seconds * RATE))
        assert counted.tolist() == inputs["feature_attention_mask"].sum(1).tolist()
        recordings = loaded.model.encode(**inputs)
        assert recordings.starts[0] == 0
        assert bool((recordings.ends > recordings.starts).all())
        torch.testing.assert_close(recordings.starts[1:], recordings.ends[:-1])
        heard = loaded.processor.windows.seconds(int(counted.sum()))
        assert abs(float(recordings.ends[-1]) - heard) < 0.1


@torch.no_grad()
def test_a_batch_answers_as_its_rows_alone(loaded):
    recordings = [noise(41.3, 1), noise(2.9, 2), noise(9.3, 3)]
    options = {"max_new_tokens": 4, "do_sample": False, "target_length": 9}
    together = ask(loaded, recordings)
    answers = loaded.model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for recording, answer in zip(recordings, answers, strict=True):
        alone = ask(loaded, [recording])
        assert torch.equal(loaded.model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], answer)


@torch.no_grad()
def test_a_batch_may_hold_a_row_of_text_alone(loaded):
    text = [{"role": "user", "content": [{"type": "text", "text": "Who wrote a letter to whom?"}]}]
    heard = [{"role": "user", "content": [{"type": "audio", "audio": noise(2.9)}, {"type": "text", "text": "Who?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "target_length": 1}
    answers = []
    for chats in ([heard, text], [heard], [text]):
        inputs = loaded.processor.apply_chat_template(chats, **options)
        found = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers += found[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers[:2] == answers[2:]


def test_recordings_too_short_for_a_frame_are_refused(tiny, loaded):
    for samples, message in ((0, "holds no samples"), (1, "must last at least one 40 ms frame")):
        with pytest.raises(ValueError, match=message):
            ask(loaded, [(np.zeros(samples, np.float32), RATE)])
    shortest = loaded.model.encode(**loaded.processor(audio=(0.1 * np.ones(640, np.float32), RATE)))
    # The feature extractor of Qwen3-ASR fills up to half a second.
    assert shortest.lengths.tolist() == [7 if tiny.model_type == "qwen3_asr" else 1]


@torch.no_grad()
def test_several_recordings_in_turns_are_heard_in_order(loaded):
    first, second = noise(3.1, 4), noise(5.7, 5)
    chat = [
        {"role": "user", "content": [{"type": "audio", "audio": first}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Anna"},
        {"role": "user", "content": [{"type": "audio", "audio": second}, {"type": "text", "text": "And now?"}]},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "target_length": [9, 5]}
    inputs = loaded.processor.apply_chat_template(chat, **options)
    placeholders = inputs["input_ids"] == loaded.processor.audio_token_id
    assert placeholders.sum() == 14
    logits = loaded.model(**inputs).logits
    embeddings = loaded.model.get_input_embeddings()(inputs["input_ids"])
    heard = [
        loaded.model.get_audio_features(**loaded.processor(audio=audio), target_length=length).pooler_output
        for audio, length in ((first, 9), (second, 5))
    ]
    embeddings[placeholders] = torch.cat(heard)
    by_hand = loaded.model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-4)


def test_hours_take_linear_time_and_bounded_memory(tiny, loaded, monkeypatch):
    extractor, read = loaded.model.model, []

    def count(input_features: torch.Tensor, mel_frames: torch.Tensor) -> torch.Tensor:
        read.append(tuple(input_features.shape))
        frames = int(extractor.windows.count_frames(mel_frames).max())
        return torch.zeros(len(mel_frames), frames, extractor.config.frame_width)

    monkeypatch.setattr(extractor, "encode_windows", count)
    of_hours = {}
    for hours in (1, 2):
        length = extractor.windows.mel_frames_per_window
        windows = hours * 360_000 // length
        mask = torch.ones(1, length, dtype=torch.long).expand(windows, -1)
        features = torch.zeros(1, 1, length).expand(windows, 80, -1)
        recordings = extractor.encode(features, mask, torch.tensor([windows]))
        assert len(recordings.frames) == hours * 120 * tiny.frames
        of_hours[hours] = sum(size[0] for size in read)
        assert max(size[0] * size[2] for size in read) <= 6000  # mel frames that a CPU reads at a time
        read.clear()
    assert of_hours[2] == 2 * of_hours[1]


def test_saved_and_loaded_again(loaded, tmp_path):
    names = transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    assert names[loaded.model.config.model_type] == type(loaded.model).__name__
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path), "cpu")
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(loaded.model.config)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(loaded.processor)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is type(loaded.model)
    inputs = ask(loaded, [noise(4.2)], target_length=9)
    again = ask(SimpleNamespace(processor=processor), [noise(4.2)], target_length=9)
    # Where weights lie in memory decides in what order they are summed up.
    torch.testing.assert_close(model(**again).logits, loaded.model(**inputs).logits, rtol=0, atol=1e-5)


def arguments(stage: Any, model: Path, data: Path, output: Path) -> list[str]:
    """Two steps of two rows at a learning rate that shows."""
    own = ["--vocab_size", 30] if stage is ctc else ["--lora_r", 4, "--target_lengths", 5]
    manifest = data / ("asr.jsonl" if stage is ctc else "qa.jsonl")
    settings = ["--model", model, "--train_data", manifest, "--output_dir", output, *own, "--max_steps", 2]
    settings += ["--per_device_train_batch_size", 2, "--learning_rate", 0.02, "--optim", "sgd", "--use_cpu"]
    return [str(setting) for setting in [*settings, "--disable_tqdm", "true", "--save_strategy", "no"]]


@pytest.fixture(scope="module")
def trained(tiny: TinyHost, vanilla: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both stages make of the vanilla folder: `stage-1` and `stage-2`."""
    folder = tmp_path_factory.mktemp("trained")
    ctc.main(arguments(ctc, vanilla, data, folder / "stage-1"))
    dct.main(arguments(dct, folder / "stage-1", data, folder / "stage-2"))
    return folder


def test_both_stages_train_what_they_should(tiny, trained):
    first, second = (load_file(trained / stage / "model.safetensors") for stage in ("stage-1", "stage-2"))
    before = tiny.make_stock().state_dict()
    decoder = {name for name in first if ".ctc_decoder." in name}
    assert decoder
    assert all(torch.equal(first[name], before[name]) for name in first if name not in decoder)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if re.search(r"language_model\..*self_attn\.[qkvo]_proj\.weight", name)}


@pytest.mark.slow
def test_a_fresh_process_loads_a_folder_without_the_package(tiny, trained, tmp_path):
    shutil.copytree(trained / "stage-2", tmp_path / "model")
    np.save(tmp_path / "audio.npy", noise(2.3)[0])
    model, processor = load_model(str(tmp_path / "model"), "cpu")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]}]
    )
    run_without_the_package(tmp_path, FRESH_PROCESS, prompt, ",".join(OTHERS - {tiny.model_type}))
    found = load_file(tmp_path / "out.safetensors")
    inputs = processor(text=prompt, audio=noise(2.3), target_length=9)
    assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["answer"], model.generate(**inputs, max_new_tokens=3, do_sample=False))
    needed = {path.name for path in (trained / "stage-2").glob("*.py")}
    assert not needed & {
        "modeling_fastlongspeech.py",
        "processing_fastlongspeech.py",
        "configuration_fastlongspeech.py",
    }
    assert [name for name in needed if name == f"{tiny.host.modules[1]}.py"]
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == needed


# Runs where `import fastlongspeech` fails; its second argument names hosts that it must not import.
FRESH_PROCESS = """
    import sys
    import numpy as np
    from safetensors.torch import save_file
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
    model = AutoModelForMultimodalLM.from_pretrained("model", trust_remote_code=True)
    inputs = processor(text=sys.argv[1], audio=np.load("audio.npy"), sampling_rate=16000, target_length=9)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    save_file({"logits": model(**inputs).logits, "answer": answer}, "out.safetensors")
    model.save_pretrained("again")
    processor.save_pretrained("again")
    for other in sys.argv[2].split(","):
        assert f"transformers.models.{other}.modeling_{other}" not in sys.modules, other
"""
OTHERS = {"qwen2_audio", *(tiny.model_type for tiny in TINY_HOSTS)}


@pytest.mark.slow
def test_evaluate(tiny, trained, data, tmp_path):
    command = ["--task", "qa", "--data", data / "qa.jsonl", "--model", trained / "stage-2", "--device", "cpu"]
    command += ["--target-length", 5, "--max-new-tokens", 3, "--limit", 2, "--output", tmp_path / "out"]
    run.main([str(word) for word in command])
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2


@torch.no_grad()
def test_cost_is_what_torch_counts_in_the_model(tiny, loaded):
    cost = ModelCost(loaded.model.config).recording(9.7, compression="none", text_tokens=4)
    extractor = loaded.model.model
    inputs = loaded.processor(audio=noise(9.7))
    extractor.set_attn_implementation("eager")
    recordings = extractor.encode(**inputs)  # what a device would do once is done
    encoder = count(lambda: extractor.encode(**inputs))
    projector = count(lambda: extractor.compress(recordings, compression="none"))
    extractor.set_attn_implementation("sdpa")
    assert cost.frames == len(recordings.frames)
    assert cost.flops["projector"] == projector
    assert cost.flops["encoder"] == encoder


def test_cost_with_the_sizes_of_the_released_model(tiny):
    config = tiny.host.config(**tiny.released)
    cost = ModelCost(config).recording(3600, answer_tokens=100)
    assert cost.frames == 120 * tiny.frames
    assert cost.flops["encoder"] > 1e13 > cost.flops["projector"] > 1e9


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4"])
def test_quantised_loading_keeps_the_densities(loaded, tmp_path, kind):
    loaded.model.save_pretrained(tmp_path)
    frames = loaded.model.encode(**loaded.processor(audio=noise(9.1))).frames
    options = {"quantization_config": QUANTISED[kind]()}
    model = type(loaded.model).from_pretrained(tmp_path, **options).eval()
    assert_same_densities(model.density(frames), loaded.model.density(frames))


def test_convert_a_vanilla_folder(tiny, vanilla, tmp_path):
    record = convert(vanilla, tmp_path / "out", dtype="float32", device="cpu")
    assert record["ctc_trained"] is False
    assert 0 <= record["differences"]["logits"] < 1e-4
    model, processor = load_model(str(tmp_path / "out"), "cpu")
    inputs = ask(SimpleNamespace(processor=processor), [noise(3.3)], target_length=9)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
