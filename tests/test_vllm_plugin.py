"""The vLLM plugin (`vllm/`): registration, fields, placeholders, profiling, names of weights, and embeddings beside
those of our own model, on a CPU; and, marked slow, answers of vLLM's engine. vLLM is too large for continuous
integration: where it is not installed, all of this is skipped. `vllm/README.md` says how it is run."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RATE, speech
from torch import nn

from fastlongspeech import (
    FastLongSpeechConfig,
    FastLongSpeechForConditionalGeneration,
    FastLongSpeechProcessor,
    load_recording,
)

pytest.importorskip("vllm.multimodal.inputs", reason="vLLM is not installed", exc_type=ImportError)
ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "fastlongspeech-demo"
sys.path.insert(0, str(ROOT / "vllm"))

import fastlongspeech_vllm  # noqa: E402
from fastlongspeech_vllm import processing  # noqa: E402
from fastlongspeech_vllm.model import FastLongSpeechForConditionalGeneration as InVLLM  # noqa: E402

NAME = "FastLongSpeechForConditionalGeneration"
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>"


class Context:
    """What vLLM hands to a processor: configuration, processor, and the server's own options."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options

    def get_hf_config(self, kind: Any) -> Any:
        return kind.from_pretrained(self.folder)

    def get_hf_processor(self, kind: Any, **kwargs: Any) -> Any:
        assert not kwargs
        return kind.from_pretrained(self.folder)

    def get_merged_mm_kwargs(self, kwargs: Any) -> dict[str, Any]:
        return self.options | dict(kwargs)

    def call_hf_processor(self, processor: Any, data: Any, kwargs: Any) -> Any:
        return processor(**data, **self.get_merged_mm_kwargs(kwargs))


def make_processor(folder: Path, **options: Any) -> Any:
    processor = processing.MultiModalProcessor.__new__(processing.MultiModalProcessor)
    processor.info = processing.ProcessingInfo(Context(folder, **options))
    processor.dummy_inputs = processing.DummyInputsBuilder(processor.info)
    return processor


def call(processor: Any, *seconds: float, **options: Any) -> Any:
    audio = [speech(length, seed=number) for number, length in enumerate(seconds)]
    data = {"text": PROMPT * len(audio), "audio": audio}
    return processor._call_hf_processor(data, {"sampling_rate": RATE, **options})


def test_vllm_knows_the_model_however_often_it_is_registered() -> None:
    from vllm import ModelRegistry  # type: ignore[attr-defined]

    for _ in range(2):
        fastlongspeech_vllm.register()
    assert NAME in ModelRegistry.get_supported_archs()
    registered = ModelRegistry.models[NAME]
    assert (registered.module_name, registered.class_name) == ("fastlongspeech_vllm.model", NAME)


def test_a_prompt_has_as_many_placeholders_as_the_processor_would_write(checkpoint: Path) -> None:
    processor = make_processor(checkpoint)
    ours = FastLongSpeechProcessor.from_pretrained(checkpoint)
    for length in (7, 750):
        outputs = call(processor, 2.0, 31.0, 62.5, target_length=length)
        assert outputs["windows_per_audio"].tolist() == [1, 2, 3]
        counted = outputs["num_audio_tokens"].tolist()
        for tokens, seconds, seed in zip(counted, (2.0, 31.0, 62.5), range(3), strict=True):
            inputs = ours(text=PROMPT, audio=speech(seconds, seed=seed), sampling_rate=RATE, target_length=length)
            assert tokens == (inputs["input_ids"] == ours.audio_token_id).sum()
        kwargs = type("Items", (), {"get_data": lambda self, data=outputs: data})()
        (update,) = processor._get_prompt_updates(None, {}, kwargs)
        assert [len(update.replacement(item)) for item in range(3)] == counted
        assert update.target == [ours.audio_token_id]


def test_every_recording_keeps_all_of_its_windows(checkpoint: Path) -> None:
    processor = make_processor(checkpoint)
    outputs = call(processor, 2.0, 62.5, 31.0)
    fields = processor._get_mm_fields_config(outputs, {})
    items = fields["input_features"].build_elems("input_features", outputs["input_features"])
    assert [len(item.data) for item in items] == [1, 3, 2]
    assert torch.equal(torch.cat([item.data for item in items]), outputs["input_features"])
    masks = fields["feature_attention_mask"].build_elems("feature_attention_mask", outputs["feature_attention_mask"])
    assert [int(mask.data.sum()) for mask in masks] == [200, 6250, 3100]


def test_memory_is_planned_for_the_length_and_not_for_hours(checkpoint: Path) -> None:
    for options, length in (({}, 750), ({"target_length": 1200}, 1200)):
        info = make_processor(checkpoint, **options).info
        assert info.get_mm_max_tokens_per_item(100_000, {"audio": 1}) == {"audio": length}
        builder = processing.DummyInputsBuilder(info)
        (audio,) = builder.get_dummy_mm_data(100_000, {"audio": 1}, {})["audio"]
        assert call(make_processor(checkpoint, **options), len(audio) / RATE)["num_audio_tokens"].tolist() == [length]
        assert len(audio) / RATE < length * 0.04 + 1


def test_more_than_what_was_planned_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="target_length must lie between 1 and 750, got 800; start vLLM with"):
        call(make_processor(checkpoint), 2.0, target_length=800)


class Embedder(InVLLM):
    """The class in vLLM with the parts of our model, without its engine and language model."""

    def __init__(self, model: FastLongSpeechForConditionalGeneration) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        for name in ("audio_tower", "multi_modal_projector", "ctc_decoder"):
            setattr(self, name, getattr(model.model, name))


@torch.no_grad()
def test_embeddings_are_those_of_our_model(checkpoint: Path) -> None:
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint).eval()
    outputs = call(make_processor(checkpoint), 2.0, 62.5, target_length=30)
    names = ("input_features", "feature_attention_mask", "windows_per_audio", "num_audio_tokens")
    given = {name: outputs[name] for name in names}
    found = Embedder(model).embed_multimodal(**given)
    ours = FastLongSpeechProcessor.from_pretrained(checkpoint)
    for embeddings, seconds, seed in zip(found, (2.0, 62.5), range(2), strict=True):
        audio = dict(ours(audio=speech(seconds, seed=seed), sampling_rate=RATE))
        expected = model.get_audio_features(**audio, target_length=30).pooler_output
        torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    split = {name: list(given[name].split([1, 3] if len(given[name]) == 4 else 1)) for name in names}
    for embeddings, expected in zip(Embedder(model).embed_multimodal(**split), found, strict=True):
        assert torch.equal(embeddings, expected)
    assert Embedder(model).embed_multimodal() == []


def test_every_weight_has_a_place(checkpoint: Path) -> None:
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    names = list(InVLLM.hf_to_vllm_mapper.apply_list(list(model.state_dict())))
    parts = {name.split(".")[0] for name in names}
    assert parts == {"audio_tower", "multi_modal_projector", "ctc_decoder", "language_model"}
    text = {name.removeprefix("language_model.") for name in names if name.startswith("language_model.")}
    assert "lm_head.weight" in text and "model.embed_tokens.weight" in text  # as vLLM's Qwen2ForCausalLM has them
    assert len(set(names)) == len(names) == len(model.state_dict())


def test_the_configuration_is_known_without_remote_code(checkpoint: Path) -> None:
    from transformers import AutoConfig

    assert isinstance(AutoConfig.from_pretrained(checkpoint), FastLongSpeechConfig)
    assert np.isclose(FastLongSpeechConfig.from_pretrained(checkpoint).target_length, 750)


# The engine. It finds the plugin by its entry point: `pip install --no-deps ./vllm` first.

INSTALLED = any(dist.name == "fastlongspeech-vllm" for dist in importlib.metadata.distributions())


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the plugin is not installed")
def test_the_engine_answers_as_our_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions about a recording of several windows, all in one batch, each with a length of its own."""
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams  # type: ignore[attr-defined]

    samples = load_recording(str(ROOT / "demo" / "recording.flac"))
    processor = FastLongSpeechProcessor.from_pretrained(DEMO)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    recordings = model.encode(**processor(audio=samples, sampling_rate=RATE))
    asked, expected = [], []
    for question in ("When does Patrick arrive?", "Is the speaker a man or a woman?"):
        turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        for length in (750, 200):
            options: Any = {"tokenize": True, "return_dict": True, "target_length": length, "recordings": recordings}
            inputs = processor.apply_chat_template([turn], add_generation_prompt=True, **options)
            answer = model.generate(
                **inputs, recordings=recordings, target_length=length, max_new_tokens=24, do_sample=False
            )
            said = processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            expected.append((inputs["input_ids"].shape[1], said.strip()))
            asked.append(
                {
                    "prompt": prompt,
                    "multi_modal_data": {"audio": (samples, RATE)},
                    "mm_processor_kwargs": {"target_length": length},
                }
            )
    engine = LLM(str(DEMO), dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4)
    answers = engine.generate(asked, SamplingParams(temperature=0, max_tokens=24))
    assert [(len(a.prompt_token_ids), a.outputs[0].text.strip()) for a in answers] == expected
