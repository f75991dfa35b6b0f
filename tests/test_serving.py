"""transformers' own doors, its server and its pipelines, on a saved folder; its server needs no port to be tested."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import RATE, speech

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor

Chat = list[dict[str, Any]]

# What `transformers serve` does with a request, in a process that knows of this model only what the folder says.
SERVER = """
    import json, sys
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler

    folder, messages, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    manager = ModelManager(device="cpu", trust_remote_code=True, model_timeout=-1)  # no timer that outlives the test
    model, processor = manager.load_model_and_processor(folder + "@main")
    modality = manager.get_model_modality(model, processor=processor)
    chat = BaseHandler.get_processor_inputs_from_messages(messages, modality)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True, target_length=length
    )
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, stop_strings=["no such text"], tokenizer=processor
    )
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    placeholders = inputs["input_ids"].eq(model.config.audio_token_id).sum().item()
    print(json.dumps({"modality": modality.name, "placeholders": placeholders, "new": new}))
"""


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """Two recordings of different durations, a window each."""
    paths = [tmp_path / "one.wav", tmp_path / "two.wav"]
    for number, path in enumerate(paths):
        soundfile.write(path, speech(2.0 + number, seed=number), RATE)
    return paths


def chat_about(clip: Path, question: str) -> Chat:
    return [{"role": "user", "content": [{"type": "audio", "path": str(clip)}, {"type": "text", "text": question}]}]


def new_tokens(checkpoint: Path, chat: Chat, target_length: int, prepared: int | None = None) -> list[int]:
    """The answer of the model itself, called without any door."""
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, target_length=prepared or target_length
    )
    out = model.generate(**inputs, target_length=target_length, max_new_tokens=5, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


# The server


def test_transformers_serve_loads_and_answers(checkpoint: Path, clips: list[Path]) -> None:
    pytest.importorskip("transformers.cli.serving.model_manager", reason="this transformers has no such server")
    part = {"type": "audio_url", "audio_url": {"url": str(clips[0])}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    code = "\n".join(line[4:] for line in SERVER.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), json.dumps(messages), "20"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout.splitlines()[-1])
    expected = new_tokens(checkpoint, chat_about(clips[0], "What?"), 20)
    assert served == {"modality": "MULTIMODAL", "placeholders": 20, "new": expected}


def test_stop_strings_find_their_tokens_by_the_processor(checkpoint: Path, clips: list[Path]) -> None:
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    assert processor.get_vocab() == processor.tokenizer.get_vocab()
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        chat_about(clips[0], "What?"), add_generation_prompt=True, tokenize=True, return_dict=True, target_length=9
    )
    width = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, width:]
    # One token per byte: the first printable one is a stop string by itself.
    ends, stop = next(
        (n, s) for n, s in enumerate(processor.tokenizer.batch_decode(out[:, None]), 1) if s.isascii() and s
    )
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "stop_strings": [stop], "tokenizer": processor}
    assert model.generate(**inputs, **options, eos_token_id=None)[0, width:].tolist() == out[:ends].tolist()


# Pipelines


@pytest.fixture
def pipe(checkpoint: Path, tmp_path: Path) -> Any:
    """The tokenizer pads on the left by itself, as Qwen2-Audio's does."""
    from transformers import pipeline

    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    return pipeline("any-to-any", str(tmp_path / "model"), trust_remote_code=True, device="cpu")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_answers_several_chats_as_each_alone(
    checkpoint: Path, pipe: Any, clips: list[Path], batch_size: int
) -> None:
    chats = [chat_about(clips[0], "What?"), chat_about(clips[1], "Who was it?")]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = pipe(chats, batch_size=batch_size, return_tensors=True, generate_kwargs=options | {"target_length": 9})
    for chat, records in zip(chats, found, strict=True):
        tokens = records[0]["generated_token_ids"]
        assert tokens[-5:].tolist() == new_tokens(checkpoint, chat, 9, prepared=750)


def test_a_pipeline_that_loses_windows_of_long_recordings_says_what_to_do(pipe: Any, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", speech(31), RATE)
    chats = [chat_about(tmp_path / "long.wav", "What?")] * 2
    options = {"max_new_tokens": 5, "target_length": 9}
    assert len(pipe(chats, generate_kwargs=dict(options))) == 2
    with pytest.raises(ValueError, match="windows_per_audio .* call a pipeline with batch_size=1 for recordings of"):
        pipe(chats, batch_size=2, generate_kwargs=dict(options))


def test_target_length_reaches_the_model_through_a_pipeline(checkpoint: Path, pipe: Any, clips: list[Path]) -> None:
    heard: list[int] = []
    language_model = pipe.model.model.language_model
    language_model.register_forward_pre_hook(
        lambda _, args, kwargs: heard.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    chat = chat_about(clips[0], "What?")
    options = {"max_new_tokens": 5, "do_sample": False}

    def ask(**kwargs: Any) -> tuple[int, int, list[int]]:
        """How many placeholders the prompt has, tokens the language model reads first, and the answer."""
        heard.clear()
        ids = pipe(text=chat, return_tensors=True, **kwargs)[0]["generated_token_ids"]
        return int((ids == pipe.model.config.audio_token_id).sum()), heard[0], ids[-5:].tolist()

    frames, tokens, _ = ask(generate_kwargs=dict(options))
    assert frames == 50  # 2 s
    text = tokens - 50
    by_generate = ask(generate_kwargs=options | {"target_length": 7})
    by_processor = ask(generate_kwargs=dict(options), processor_kwargs={"target_length": 7})
    assert by_generate[:2] == (50, text + 7) and by_processor[:2] == (7, text + 7)
    assert by_generate[2] == by_processor[2] == new_tokens(checkpoint, chat, 7)
