"""`fastlongspeech assemble`: a model of any Whisper and any language model hears and answers as its parts do."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import speech
from ctranslate2.converters.transformers import WhisperLoader
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from fastlongspeech.app import assemble as command
from fastlongspeech.app.cli import main
from fastlongspeech.app.whisper import read_whisper

LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of 2 layers and 80 mel bins, as transformers saves it."""
    torch.manual_seed(0)
    config = WhisperConfig(
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        init_std=0.3,
    )
    folder = tmp_path_factory.mktemp("whisper")
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def language_model(folder: Path, tied: bool, template: str | None = None, **config: Any) -> Path:
    """A random language model with a tokenizer of bytes that begins texts with <s>, as Llama's does."""
    words = ["<unk>", "<s>", "</s>", "<|start|>", "<|eot|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|start|>", "<|eot|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(1)
    kind: dict[str, Any] = {
        "model_type": "llama",
        **sizes,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(kind | config)))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def assembled(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a tied language model with a template of its own, and of the model that is made with it."""
    folder = tmp_path_factory.mktemp("assembled")
    text = language_model(folder / "text", tied=True, template=LLAMA3_LIKE)
    arguments = ["--encoder", str(whisper), "--language-model", str(text), "--output", str(folder / "model")]
    assert main(["assemble", *arguments]) == 0
    return text, folder / "model"


def test_a_stranger_loads_the_folder_and_asks_about_a_recording(assembled: tuple[Path, Path]) -> None:
    processor = AutoProcessor.from_pretrained(assembled[1], trust_remote_code=True)
    model = AutoModelForMultimodalLM.from_pretrained(assembled[1], trust_remote_code=True)
    parts = [{"type": "audio", "audio": speech(2.0)}, {"type": "text", "text": "Who speaks?"}]
    chat = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    heard = "<|audio_bos|>" + "<|AUDIO|>" * 50 + "<|audio_eos|>\n"
    assert text == f"<s><|start|>user\n{heard}Who speaks?<|eot|><|start|>assistant\n"
    assert not model.config.ctc_trained


def test_frames_are_whispers_own(whisper: Path, assembled: tuple[Path, Path]) -> None:
    stock = WhisperForConditionalGeneration.from_pretrained(whisper).model.encoder.eval()
    before_norm = []
    stock.layer_norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    model = command.FastLongSpeechForConditionalGeneration.from_pretrained(assembled[1])
    mel = torch.randn(1, 80, 3000)
    with torch.no_grad():
        stock(mel)
        frames = model.encode(mel, torch.ones(1, 3000, dtype=torch.long)).frames
    pairs = before_norm[0][0].unflatten(0, (750, 2)).mean(1)
    torch.testing.assert_close(frames, pairs, rtol=1e-4, atol=1e-4)


def test_text_is_answered_as_the_language_model_does(assembled: tuple[Path, Path]) -> None:
    own = AutoModelForCausalLM.from_pretrained(assembled[0])
    tokenizer: Any = AutoTokenizer.from_pretrained(assembled[0])
    chat = [{"role": "user", "content": "Where is the cat?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = command.FastLongSpeechForConditionalGeneration.from_pretrained(assembled[1])
    processor = command.FastLongSpeechProcessor.from_pretrained(assembled[1])
    ours = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.equal(ours["input_ids"], ids)
    with torch.no_grad():
        rows = own.config.vocab_size  # the tokens around audio come after
        assert torch.equal(model(input_ids=ids).logits[..., :rows], own(input_ids=ids).logits)


def test_a_tied_head_stays_tied_and_the_new_tokens_have_the_mean_embedding(assembled: tuple[Path, Path]) -> None:
    weights = load_file(assembled[1] / "model.safetensors")
    assert not any("lm_head" in name or "ctc_decoder" in name for name in weights)
    old = load_file(assembled[0] / "model.safetensors")["model.embed_tokens.weight"]
    new = weights["model.language_model.embed_tokens.weight"]
    assert torch.equal(new[: len(old)], old) and len(new) == len(old) + 3
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(3, -1))
    assert "_name_or_path" not in json.loads((assembled[1] / "config.json").read_text())["text_config"]


def test_a_language_model_without_a_template_gets_a_plain_one(whisper: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"head_dim": 8, "vocab_size": 300}  # more rows than tokens: the new ones need no more
    text = language_model(tmp_path / "text", tied=False, model_type="qwen3", **sizes)
    command.assemble(str(whisper), str(text), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (300, 24)
    processor = command.FastLongSpeechProcessor.from_pretrained(tmp_path / "model")
    assert processor.end_of_turn_token == "</s>"
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Who?"}]}]
    written = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert written == "User: <|audio_bos|><|AUDIO|><|audio_eos|>\nWho?\nAssistant: "


def test_a_ctranslate2_folder_has_the_same_encoder(whisper: Path, tmp_path: Path) -> None:
    """The file is written by ctranslate2's own converter."""
    stock = WhisperForConditionalGeneration.from_pretrained(whisper)
    spec = WhisperLoader().get_model_spec(stock)
    spec.register_vocabulary([str(number) for number in range(20)])
    spec.validate()
    spec.optimize(quantization="float16")
    spec.save(str(tmp_path))
    encoder, extractor = read_whisper(str(tmp_path))
    assert extractor.feature_size == 80
    for name, weight in stock.model.encoder.half().state_dict().items():
        assert torch.equal(encoder.state_dict()[name], weight), name
    mel = torch.randn(1, 80, 3000)
    with torch.no_grad():
        expected = stock.model.encoder.float()(mel).last_hidden_state
        torch.testing.assert_close(encoder.float()(mel).last_hidden_state, expected)

    bin_file = tmp_path / "model.bin"
    data = bin_file.read_bytes()
    bin_file.write_bytes(data[:40])
    with pytest.raises(ValueError, match="ends too early .* fetch it again"):
        read_whisper(str(tmp_path))
    bin_file.write_bytes(b"\x07" + data[1:])
    with pytest.raises(ValueError, match="has version 7 .* convert it again"):
        read_whisper(str(tmp_path))
    spec = WhisperLoader().get_model_spec(stock)
    spec.register_vocabulary([str(number) for number in range(20)])
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(tmp_path))
    with pytest.raises(ValueError, match="quantised to integers; convert it with --quantization float16"):
        read_whisper(str(tmp_path))


def test_a_gguf_file_is_read(whisper: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    command.assemble(str(whisper), str(file), tmp_path / "model")
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()  # a Trainer would refuse it
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[f"model.language_model.{name}"], own.state_dict()[f"model.{name}"])


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_without_what_reads_it(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=f"needs {package}, which is missing; install it with: pip install"):
        command.read_language_model(str(tmp_path / "tiny.gguf"), "auto")


def write_gguf(path: Path) -> Path:
    """Writes a random Llama with gguf's own writer."""
    import gguf

    words = ["<unk>", "<s>", "</s>", "ab", "cd", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(words), 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        **{f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (32, 16),
        "blk.0.ffn_up": (32, 16),
        "blk.0.ffn_down": (16, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder": "text"}, "is a model of the type 'llama'; pass a Whisper"),
        ({"encoder": "nowhere"}, "nowhere"),
        ({"encoder": "empty"}, "has neither config.json nor model.bin; pass the folder of a Whisper"),
        ({"language-model": "absent.gguf"}, "absent.gguf does not exist; check the path"),
        ({"output": "text"}, "exists already; choose another folder, or delete it"),
    ],
)
def test_mistakes_are_named_in_one_sentence(
    changed: dict[str, str],
    message: str,
    whisper: Path,
    assembled: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").symlink_to(assembled[0])
    options = {"encoder": str(whisper), "language-model": str(assembled[0]), "output": str(tmp_path / "new")}
    options |= {name: str(tmp_path / value) for name, value in changed.items()}
    assert main(["assemble", *(word for name, value in options.items() for word in (f"--{name}", value))]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_answers_otherwise_gets_no_name(
    whisper: Path, assembled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = command.whisper_frames
    monkeypatch.setattr(command, "whisper_frames", lambda *inputs: frames(*inputs) + 1)
    with pytest.raises(ValueError, match="frames of .* differ from Whisper's by up to"):
        command.assemble(str(whisper), str(assembled[0]), tmp_path / "model")
    assert not (tmp_path / "model").exists()
