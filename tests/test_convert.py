"""`fastlongspeech convert`: weights of others in our form. What is expected comes from tensors that the released
implementation recorded, from transformers' own class, or from sums written out here."""

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import RATE, speech
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, INDEX, audio_inputs, close, load, prompt
from test_remote_code import CODE
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForMultimodalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech import recordings_fastlongspeech as saving
from fastlongspeech.app import cli
from fastlongspeech.hub import convert as converting
from fastlongspeech.hub import weights as storing

Model = FastLongSpeechForConditionalGeneration
PROJECTION = "language_model.model.layers.{layer}.self_attn.{part}_proj"
RANK, ALPHA = 4, 6


def convert(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return converting.convert(source, output, device="cpu", **options)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded release with a tokenizer of 1000 tokens, whose placeholder is 990, and 50 pieces for CTC."""
    folder = tmp_path_factory.mktemp("released")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(GOLDEN / name, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate(letters + [f"{n}" * 3 for n in range(1000)][:732])}
    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", *(f"<|{n}|>" for n in range(6))]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=special
    )
    assert (tokenizer.convert_tokens_to_ids("<|AUDIO|>"), len(tokenizer)) == (990, 1000)
    with open(folder / "spm.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                "".join(letters) for letters in np.random.default_rng(0).choice([*"abcdefghij "], (60, 25))
            ),
            model_writer=file,
            vocab_size=50,
            model_type="bpe",
            minloglevel=2,
        )
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(released, folder, shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter under the released names, on q and v of both layers."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads((GOLDEN / "config.json").read_text())["text_config"]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        for part, rows in (("q", config["hidden_size"]), ("v", config["hidden_size"] // 2)):
            name = "base_model.model." + PROJECTION.format(layer=layer, part=part)
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, config["hidden_size"], generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    write_adapter_config(folder)
    return folder


def write_adapter_config(folder: Path, **fields: Any) -> None:
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def with_adapter(released: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released weights with what the adapter adds, summed up here, still under the released names."""
    folder = tmp_path_factory.mktemp("summed")
    shutil.copytree(released, folder, dirs_exist_ok=True)
    weights, added = load_file(folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for layer in range(2):
        for part in "qv":
            name = PROJECTION.format(layer=layer, part=part)
            left, right = (added[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "BA")
            weights[f"{name}.weight"] += ALPHA / RANK * (left @ right)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Any, seconds: str = "5.3") -> torch.Tensor:
    inputs = audio_inputs(seconds)
    length = INDEX["audio"][seconds]["frames"]
    return model(input_ids=prompt(sum(length)), **inputs, compression="none").logits


# The released weights


@torch.no_grad()
@pytest.mark.parametrize("seconds", ["5.3", "30", "47"])
def test_the_released_weights_give_the_recorded_logits(converted: Path, seconds: str) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(converted).eval()
    for length in (200, 50):
        if length < sum(INDEX["audio"][seconds]["frames"]):
            found = model(input_ids=prompt(length), **audio_inputs(seconds)).logits[0, -2:]
            close(found, load(f"long_{seconds}s")[f"L{length}.logits_last2"])
    recordings = model.encode(**audio_inputs(seconds))
    recorded = load(f"audio_{seconds}s")["density"]
    counts = INDEX["audio"][seconds]["frames"]
    close(model.density(recordings.frames), torch.cat([w[:n] for w, n in zip(recorded, counts, strict=True)]))


def test_the_folder_is_complete(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert names >= CODE | {"config.json", "generation_config.json", "ctc.model", "tokenizer.json", "conversion.json"}
    assert not [name for name in names if "unfinished" in name]
    processor = FastLongSpeechProcessor.from_pretrained(converted)
    assert (processor.ctc_vocab_size, processor.audio_token_id) == (50, 990)
    config = json.loads((converted / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["ctc_trained"]) == ("fastlongspeech", "float32", True)
    assert config["architectures"] == ["FastLongSpeechForConditionalGeneration"]


def test_every_weight_is_there_once_and_in_small_files(converted: Path, released: Path) -> None:
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert max(path.stat().st_size for path in converted.glob("*.safetensors")) < 600_000  # one matrix has 384 KB
    before = load_file(released / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for name in set(index.values()):
        after |= load_file(converted / name)
    assert len(after) == len(before) == len(index)
    assert sum(float(weight.double().sum()) for weight in after.values()) == pytest.approx(
        sum(float(weight.double().sum()) for weight in before.values())
    )
    _, info = Model.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())


def test_the_record_says_what_was_compared(converted: Path, released: Path) -> None:
    record = json.loads((converted / "conversion.json").read_text())
    assert (record["source"], record["model_type"], record["weights"]) == (
        str(released),
        "long_speech_qwen2audio",
        len(load_file(released / "model.safetensors")),
    )
    assert set(record["differences"]) == {"logits", "ctc"}
    assert max(record["differences"].values()) < 1e-5


def test_half_precision(released: Path, tmp_path: Path) -> None:
    record = convert(released, tmp_path / "half", dtype="bfloat16")
    assert record["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert Model.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


# Adapters


def test_a_merged_adapter(released: Path, adapter: Path, with_adapter: Path, tmp_path: Path) -> None:
    record = convert(released, tmp_path / "merged", adapter=str(adapter))
    assert record["differences"]["logits"] < 1e-4  # beside the adapter that PEFT puts on transformers' own class
    expected = logits(Model.from_pretrained(with_adapter).eval())
    assert (logits(Model.from_pretrained(released).eval()) - expected).abs().max() > 0.1
    close(logits(Model.from_pretrained(tmp_path / "merged").eval()), expected)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.fixture
def kept(converted: Path, adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    assert cli.main(["convert", str(adapter), str(folder), "--base", str(converted)]) == 0
    return folder


def test_a_kept_adapter_loads_by_peft(converted: Path, kept: Path, with_adapter: Path) -> None:
    expected = logits(Model.from_pretrained(with_adapter).eval())
    model = PeftModel.from_pretrained(Model.from_pretrained(converted), kept).eval()
    close(logits(model), expected)
    with model.disable_adapter():
        close(logits(model), logits(Model.from_pretrained(converted).eval()))
    close(logits(AutoPeftModelForCausalLM.from_pretrained(kept).eval()), expected)


def test_adapters_are_swapped_while_the_model_is_loaded(converted: Path, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "other")
    weights = load_file(kept / "adapter_model.safetensors")
    save_file({name: -2 * weight for name, weight in weights.items()}, tmp_path / "other/adapter_model.safetensors")
    alone = {name: logits(PeftModel.from_pretrained(Model.from_pretrained(converted), tmp_path / name).eval())
             for name in ("kept", "other")}  # fmt: skip
    model = PeftModel.from_pretrained(Model.from_pretrained(converted), kept, adapter_name="kept").eval()
    model.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("other", "kept", "other"):
        model.set_adapter(name)
        close(logits(model), alone[name])


def test_answers_through_an_adapter(converted: Path, kept: Path, with_adapter: Path) -> None:
    inputs = audio_inputs("5.3")
    options = {"target_length": 50, "max_new_tokens": 6, "do_sample": False}
    expected = Model.from_pretrained(with_adapter).generate(input_ids=prompt(1), **inputs, **options)
    model = AutoPeftModelForCausalLM.from_pretrained(kept)
    assert model.generate(input_ids=prompt(1), **inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}])
def test_adapters_that_are_more_than_two_matrices_are_refused(
    released: Path, adapter: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    write_adapter_config(tmp_path / "adapter", **setting)
    with pytest.raises(ValueError, match="can't be converted|give a LoRA one"):
        convert(released, tmp_path / "output", adapter=str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_refused(released: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    other = {name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}
    save_file(other, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"changes model\.language_model\.layers\.7.* of another model"):
        convert(released, tmp_path / "output", adapter=str(tmp_path / "adapter"))


# Vanilla Qwen2-Audio


@pytest.fixture
def vanilla(checkpoint: Path, tmp_path: Path) -> Path:
    """A stock Qwen2-Audio of random weights, as transformers saves it."""
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    fields = Qwen2AudioConfig.from_pretrained(checkpoint).to_dict()
    torch.manual_seed(3)
    config = Qwen2AudioConfig(**{name: fields[name] for name in ("audio_config", "text_config", "audio_token_index")})
    Qwen2AudioForConditionalGeneration(config).save_pretrained(tmp_path / "vanilla")
    Qwen2AudioProcessor(processor.feature_extractor, processor.tokenizer).save_pretrained(tmp_path / "vanilla")
    return tmp_path / "vanilla"


@torch.no_grad()
def test_vanilla_answers_as_transformers_own_class(vanilla: Path, tmp_path: Path) -> None:
    record = convert(vanilla, tmp_path / "ours")
    assert set(record["differences"]) == {"logits"} and record["differences"]["logits"] < 1e-5
    processor = FastLongSpeechProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(text="<|audio_bos|><|AUDIO|><|audio_eos|>Who?", audio=speech(3), sampling_rate=RATE)
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(vanilla).eval()
    expected = stock(**{name: value for name, value in inputs.items() if name != "windows_per_audio"}).logits
    model = Model.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_vanilla_model_gets_a_ctc_decoder_that_is_not_trained(
    vanilla: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(vanilla, tmp_path / "ours")
    model, info = Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert not model.config.ctc_trained
    assert 0 < model.model.ctc_decoder.linear.weight.detach().std().item() < 1


def test_the_command_converts(vanilla: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ours"
    assert cli.main(["convert", str(vanilla), str(output), "--dtype", "float16", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((output / "conversion.json").read_text())
    assert cli.main(["convert", str(vanilla), str(output)]) == 1
    assert "already holds a finished conversion" in capsys.readouterr().err


# Faults


def test_a_stopped_run_goes_on_where_it_was(
    released: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = saving.save_file
    written: list[Path] = []

    def stop(weights: Any, path: Path, **options: Any) -> None:
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path)
        save(weights, path, **options)

    monkeypatch.setattr(saving, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path / "output", shard_size="200KB")
    monkeypatch.setattr(saving, "save_file", save)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output").glob("*.safetensors")}
    assert len(before) == 2
    assert not (tmp_path / "output" / "config.json").exists()  # nothing takes it for a model
    with pytest.raises(ValueError, match="holds another conversion that was begun"):
        convert(released, tmp_path / "output", shard_size="200KB", dtype="float16")
    with pytest.raises(ValueError, match="holds another conversion that was begun"):  # its shards would stay
        convert(released, tmp_path / "output", shard_size="400KB")
    convert(released, tmp_path / "output", shard_size="200KB")
    assert {name: (tmp_path / "output" / name).stat().st_mtime_ns for name in before} == before
    for path in converted.glob("*.safetensors"):
        assert (tmp_path / "output" / path.name).read_bytes() == path.read_bytes()


def test_weights_of_one_shard_are_in_memory_at_a_time(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the bytes of all tensors that were made and not yet let go, whenever a shard is written."""
    alive: dict[int, int] = {}
    most, save = [0], saving.save_file
    read = storing.StoredWeights.read

    def counted(self: Any, name: str) -> torch.Tensor:
        weight = read(self, name).clone()
        alive[id(weight)] = weight.nbytes
        weakref.finalize(weight, alive.pop, id(weight))
        return weight

    def look(weights: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        most[0] = max(most[0], sum(alive.values()))
        save(weights, path, **options)

    monkeypatch.setattr(storing.StoredWeights, "read", counted)
    monkeypatch.setattr(saving, "save_file", look)
    convert(released, tmp_path / "output", shard_size="200KB")
    assert 0 < most[0] < 500_000 < sum(path.stat().st_size for path in (tmp_path / "output").glob("*.safetensors"))


def test_names_that_are_missing_or_unknown_are_refused(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "source")
    weights = load_file(released / "model.safetensors")
    weights["ctc_decoder.extra.weight"] = weights.pop("multi_modal_projector.linear.bias")
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 .* has 1 .*multi_modal_projector\.linear\.bias.*extra"):
        convert(tmp_path / "source", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_shapes_that_differ_from_the_configuration_are_refused(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "source")
    config = json.loads((released / "config.json").read_text())
    config["ctc_embed_num"] = 49
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"ctc_decoder\.linear\.weight has the shape \(51, 96\) in the source, \(50, 96\)"
    ):
        convert(tmp_path / "source", tmp_path / "output")


def test_wrong_weights_do_not_pass_the_comparison(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One projection of one layer is disturbed on its way."""
    read = storing.StoredWeights.read

    def wrong(self: Any, name: str) -> torch.Tensor:
        weight = read(self, name)
        return weight * 1.1 if name.endswith("layers.1.self_attn.o_proj.weight") else weight

    monkeypatch.setattr(storing.StoredWeights, "read", wrong)
    with pytest.raises(ValueError, match="the converted model's logits differ from the source's by"):
        convert(released, tmp_path / "output")
    assert "differences" not in json.loads((tmp_path / "output" / "conversion.json").read_text())


def test_a_sentencepiece_model_of_another_size_is_refused(released: Path, ctc_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tells 50 pieces apart, but its SentencePiece model has"):
        convert(released, tmp_path / "output", ctc_model=ctc_model)


def test_a_file_that_is_no_sentencepiece_model_is_refused(released: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no pieces")
    with pytest.raises(ValueError, match="text.wav is no SentencePiece model; name another file"):
        convert(released, tmp_path / "output", ctc_model=tmp_path / "text.wav")


def test_options_that_would_have_no_effect_are_refused(
    released: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, options, message in (
        (released, ["--base", "org/name"], "--base is for adapters"),
        (adapter, ["--base", "org/name", "--dtype", "float16"], "--dtype: "),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", str(source), str(tmp_path / "output"), *options])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: os.remove(folder / "model.safetensors"),
            "holds no model.safetensors; weights in another",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"12345678" * 9),
            "can't be read: .* fetch it",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
            "'bert' is no model .* qwen2_audio, ",
        ),
    ],
)
def test_sources_that_can_not_be_read(
    released: Path, tmp_path: Path, prepare: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(released, tmp_path / "source")
    prepare(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "output")


def test_a_folder_with_something_else_is_left_alone(released: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        convert(released, tmp_path)
    assert np.array_equal([path.name for path in tmp_path.iterdir()], ["mine.txt"])
