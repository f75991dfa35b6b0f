"""The model: checkpoints it reads, recordings it joins, what trains; generation has a file of its own."""

import copy
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, host_fastlongspeech

Model = FastLongSpeechForConditionalGeneration
Inputs = dict[str, Tensor]
Make = Callable[..., Any]


def to_old_names(folder: Path) -> None:
    """Rewrites a checkpoint with the names that transformers gave Qwen2-Audio's parameters before 5.0."""
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.")
        if name.startswith("lm_head."):
            name = f"language_model.{name}"
        elif name.startswith("language_model.") and not name.startswith(
            ("language_model.model.", "language_model.lm")
        ):
            name = name.replace("language_model.", "language_model.model.", 1)
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Checkpoints


@pytest.mark.parametrize("layout", ["as saved", "old names"])
def test_a_stock_checkpoint_loads_and_gives_identical_logits(
    stock: Qwen2AudioForConditionalGeneration, make_audio: Make, make_prompts: Make, tmp_path: Path, layout: str
) -> None:
    stock.save_pretrained(tmp_path)
    if layout == "old names":
        to_old_names(tmp_path)
    model, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("model.ctc_decoder.") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == "fastlongspeech"

    def logits(*mel_frames: int) -> tuple[Tensor, Tensor]:
        audio = make_audio(*([count] for count in mel_frames))
        prompts = make_prompts(*([((count - 1) // 2 + 1) // 2] for count in mel_frames))
        inputs = {k: v for k, v in audio.items() if k != "windows_per_audio"} | prompts
        with torch.no_grad():
            return model(**inputs, compression="none").logits, stock(**inputs).logits

    assert torch.equal(*logits(3000))
    # A shorter clip is encoded at its own length, whose sums round in another way.
    torch.testing.assert_close(*logits(3000, 517), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_without_ctc_decoder_fuses_uniformly_and_says_so(
    stock: Qwen2AudioForConditionalGeneration,
    make_audio: Make,
    make_prompts: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock.save_pretrained(tmp_path)
    warnings: list[str] = []
    monkeypatch.setattr(host_fastlongspeech.logger, "warning", warnings.append)
    model = Model.from_pretrained(tmp_path)
    assert "ctc_trained is set to false" in warnings[0]
    assert (model.config.ctc_trained, model.config.content_density) == (False, "ctc")
    assert model.density(torch.randn(3, 16)).tolist() == [1, 1, 1]
    audio = make_audio([3000, 3000, 100])
    assert model.generate(**audio, **make_prompts([1]), target_length=20, max_new_tokens=2).shape[1] == 9
    with pytest.raises(ValueError, match="ctc_trained is false: this CTC decoder can't transcribe"):
        model.ctc_transcribe(**audio)

    # Saved and loaded again it stays what it was, and the warning does not come back.
    model.save_pretrained(tmp_path / "ours")
    again, info = Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and len(warnings) == 1
    assert not again.config.ctc_trained
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(model.state_dict())


def test_a_stock_configuration_object_is_translated(stock: Qwen2AudioForConditionalGeneration, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, config=Qwen2AudioConfig.from_pretrained(tmp_path))
    assert model.config.model_type == "fastlongspeech"


def test_saving_keeps_everything(model: Model, make_audio: Make, make_prompts: Make, tmp_path: Path) -> None:
    inputs = make_audio([400]) | make_prompts([20])
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.config.content_density == "ctc"
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert {
        "model.ctc_decoder.projector.weight",
        "model.ctc_decoder.projector.bias",
        "model.ctc_decoder.linear.weight",
    } == {name for name in model.state_dict() if "ctc_decoder" in name}


def test_reset_ctc_decoder(model: Model) -> None:
    model.model.reset_ctc_decoder(31)
    assert model.config.ctc_vocab_size == 31 and not model.config.ctc_trained
    assert model.model.ctc_decoder.linear.weight.shape == (32, 24)
    assert 0.2 < float(model.model.ctc_decoder.linear.weight.std()) < 0.4  # initializer_range


def test_offloaded_parts(model: Model, make_audio: Make, make_prompts: Make, tmp_path: Path) -> None:
    inputs = make_audio([400]) | make_prompts([20])
    model.save_pretrained(tmp_path / "model")
    expected = model(**inputs).logits
    parts = {name: "disk" for name in ("model.audio_tower", "model.ctc_decoder", "model.language_model")}
    device_map = {"model.multi_modal_projector": "cpu", "lm_head": "cpu"} | parts
    offloaded = Model.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(offloaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(offloaded.ctc_transcribe(**make_audio([400]))) == 1


# Recordings


@pytest.mark.parametrize(
    ("mels", "frames"), [([2900], 725), ([3000], 750), ([3000, 100], 775), ([3000, 3000, 100], 1525), ([3], 1)]
)
def test_lengths_and_spans_of_recordings(model: Model, make_audio: Make, mels: list[int], frames: int) -> None:
    audio = make_audio(mels)
    everything = model.get_audio_features(**audio, compression="none")
    assert everything.audio_lengths.tolist() == [frames]
    assert everything.pooler_output.shape == (frames, 24)
    starts = 0.04 * torch.arange(frames)
    torch.testing.assert_close(everything.spans, torch.stack((starts, starts + 0.04), 1), rtol=0, atol=1e-4)

    for target_length in (1, 100, frames, 5000):
        fused = model.get_audio_features(**audio, target_length=target_length)
        kept = min(frames, target_length)
        assert fused.audio_lengths.tolist() == [kept] and fused.spans.dtype == torch.float32
        assert torch.equal(fused.spans[1:, 0], fused.spans[:-1, 1])
        torch.testing.assert_close(fused.spans[[0, -1], [0, 1]], torch.tensor([0.0, 0.04 * frames]))
        if kept == frames:
            assert torch.equal(fused.pooler_output, everything.pooler_output)


def test_spans_skip_the_padding_of_inner_windows(model: Model, make_audio: Make) -> None:
    """530 mel frames are 132 frames; the second window begins after 5.3 s, not after 5.28 s."""
    spans = model.get_audio_features(**make_audio([530, 100]), compression="none").spans
    torch.testing.assert_close(spans[131:133], torch.tensor([[5.24, 5.28], [5.30, 5.34]]))


def test_a_batch_of_recordings_equals_each_alone(model: Model, make_audio: Make) -> None:
    recordings: list[list[int]] = [[3000, 411], [4], [1500], [90]]
    audio = make_audio(*recordings)
    targets = [50, 3, 375, 7]
    batch = model.get_audio_features(**audio, target_length=torch.tensor(targets))
    embeddings = batch.pooler_output.split(batch.audio_lengths.tolist())
    spans = batch.spans.split(batch.audio_lengths.tolist())
    first = 0
    for row, windows in enumerate(recordings):
        own = slice(first, first + len(windows))
        first += len(windows)
        alone = model.get_audio_features(
            audio["input_features"][own],
            audio["feature_attention_mask"][own],
            torch.tensor([len(windows)]),
            target_length=targets[row],
        )
        assert torch.equal(alone.spans, spans[row])
        torch.testing.assert_close(alone.pooler_output, embeddings[row], rtol=1e-4, atol=1e-4)


def test_defaults_of_get_audio_features(model: Model, make_audio: Make) -> None:
    """One window per recording, the configuration's length and compression."""
    audio = make_audio([500], [300])
    del audio["windows_per_audio"]
    model.config.target_length = 100
    assert model.get_audio_features(**audio).audio_lengths.tolist() == [100, 75]
    model.config.compression = "none"
    assert model.get_audio_features(**audio).audio_lengths.tolist() == [125, 75]


@pytest.mark.parametrize("fields", [{"ctc_projector": False}, {"ctc_vocab_size": 0}, {"content_density": "uniform"}])
def test_variants_of_the_density(make_model: Make, make_audio: Make, fields: dict[str, Any]) -> None:
    model = make_model(**fields)
    assert model.model.ctc_decoder.linear.weight.shape == (101 if "ctc_vocab_size" in fields else 13, 24)
    assert (model.model.ctc_decoder.projector is None) == ("ctc_projector" in fields)
    fused = model.get_audio_features(**make_audio([900]), target_length=50)
    assert fused.pooler_output.isfinite().all() and fused.audio_lengths.tolist() == [50]
    assert not torch.equal(
        fused.pooler_output, make_model().get_audio_features(**make_audio([900])).pooler_output[:50]
    )


def test_refuses_arguments_that_do_not_fit(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio = make_audio([300, 300], [300])
    with pytest.raises(ValueError, match=r"windows_per_audio \[2, 2\] does not share out the 3 windows"):
        model.get_audio_features(**(audio | {"windows_per_audio": torch.tensor([2, 2])}))
    with pytest.raises(ValueError, match="target_length must be a positive integer, got 0; pass compression"):
        model.get_audio_features(**audio, target_length=0)
    with pytest.raises(ValueError, match="got 3 integers for 2 recordings"):
        model.get_audio_features(**audio, target_length=[1, 2, 3])
    with pytest.raises(ValueError, match="compression must be one of iterative_fusion, .*, none; got 'zip'"):
        model.get_audio_features(**audio, compression="zip")
    with pytest.raises(ValueError, match="feature_attention_mask is missing"):
        model.get_audio_features(audio["input_features"], None)
    with pytest.raises(ValueError, match="no recording as long as one frame"):
        model.get_audio_features(**make_audio([2]))


# Forward


def test_forward_fuses_each_recording_to_its_placeholders(model: Model, make_audio: Make, make_prompts: Make) -> None:
    audio, prompts = make_audio([400], [3000, 50], [4]), make_prompts([30, 99], [1])
    embeddings = model.get_audio_features(**audio, target_length=[30, 99, 1]).pooler_output
    inputs_embeds = model.get_input_embeddings()(prompts["input_ids"])
    inputs_embeds[prompts["input_ids"] == model.config.audio_token_id] = embeddings
    expected = model(inputs_embeds=inputs_embeds, attention_mask=prompts["attention_mask"]).logits
    torch.testing.assert_close(model(**audio, **prompts).logits, expected)
    by_embeddings = {"inputs_embeds": model.get_input_embeddings()(prompts["input_ids"])}
    mask = {"attention_mask": prompts["attention_mask"]}
    torch.testing.assert_close(model(**audio, **by_embeddings, **mask).logits, expected)
    with pytest.raises(ValueError, match="Recording 1 has 99 audio placeholders for 10 frames"):
        model(**audio, **prompts, target_length=[30, 10, 1])
    with pytest.raises(ValueError, match="Recording 0 has 30 audio placeholders for 100 frames"):
        model(**audio, **prompts, compression="none")
    with pytest.raises(ValueError, match="Recording 2 has 2 audio placeholders for 1 frames"):
        model(**audio, **make_prompts([30, 99], [2]))


def test_logits_to_keep(model: Model, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([400]) | make_prompts([20])
    logits = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 25])).logits, logits[:, [0, 25]])
    assert isinstance(model(**inputs, return_dict=False), tuple)
    with pytest.raises(ValueError, match="labels need the logits of all positions, got logits_to_keep=2"):
        model(**inputs, labels=inputs["input_ids"], logits_to_keep=2)


# NTK-RoPE


@pytest.mark.parametrize("head", [{}, {"head_dim": 10}])
def test_ntk_rope_stretches_the_rotary_base_of_the_language_model(head: dict[str, int]) -> None:
    """The slowest dimension turns as far over the context as it did over the window, the fastest as ever."""
    fields = tiny_config()
    fields["text_config"] |= {"max_position_embeddings": 6000, "rope_parameters": {"rope_theta": 500.0}} | head
    config = FastLongSpeechConfig(**fields)
    dim = head.get("head_dim", 6)
    theta = 500.0 * (6000 / 750) ** (dim / (dim - 2))
    expected = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    found = Model(config.with_ntk_rope()).model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    plain = Model(config).model.language_model.rotary_emb.inv_freq
    assert found[0] == plain[0] == 1
    torch.testing.assert_close(found[-1] * 6000, plain[-1] * 750)


def test_a_checkpoint_is_read_with_stretched_positions(
    model: Model, make_audio: Make, make_prompts: Make, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "plain")
    config = FastLongSpeechConfig.from_pretrained(tmp_path / "plain").with_ntk_rope()
    stretched = Model.from_pretrained(tmp_path / "plain", config=config)
    inputs = make_audio([3000, 3000]) | make_prompts([1500])
    plain, logits = (one(**inputs, compression="none").logits for one in (model, stretched))
    torch.testing.assert_close(logits[0, 0], plain[0, 0])  # position 0
    assert (logits[0, 1400:] - plain[0, 1400:]).abs().mean() > 1e-3
    stretched.save_pretrained(tmp_path / "stretched")
    again = Model.from_pretrained(tmp_path / "stretched")
    torch.testing.assert_close(again(**inputs, compression="none").logits, logits)


# Training


def training_batch(make_audio: Make, make_prompts: Make) -> Inputs:
    batch = make_audio([400], [90], [200], [3000, 10]) | make_prompts([20], [12], [20], [30])
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    labels[1, -3] = labels[2, -3:-1] = -100  # so that the rows differ in how much they teach
    return batch | {"labels": labels}


def row_of(batch: Inputs, row: int) -> Inputs:
    first = int(batch["windows_per_audio"][:row].sum())
    windows = slice(first, first + int(batch["windows_per_audio"][row]))
    whole = ("input_features", "feature_attention_mask")
    return {k: v[windows] if k in whole else v[row : row + 1] for k, v in batch.items()}


def test_gradient_accumulation_sums_to_the_batch(model: Model, make_audio: Make, make_prompts: Make) -> None:
    batch = training_batch(make_audio, make_prompts)
    items = (batch["labels"] != -100).sum()
    whole = model(**batch, num_items_in_batch=items).loss
    parts = [model(**row_of(batch, row), num_items_in_batch=items).loss for row in range(4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**batch).loss, whole, rtol=1e-4, atol=1e-5)


def test_ctc_loss_is_nats_per_label_and_accumulates(model: Model, make_audio: Make) -> None:
    audio = make_audio([400], [3000, 10])
    labels = torch.tensor([[1, 2, 2, 3], [5, 0, -100, -100]])
    loss = model(**audio, ctc_labels=labels).loss
    parts = []
    for row, n in enumerate([4, 2]):
        one = row_of(audio | {"ctc_labels": labels[:, :4]}, row)
        parts.append(model(**(one | {"ctc_labels": one["ctc_labels"][:, :n]})).loss)
        heard = model.encode(*(one[k] for k in list(one)[:3]))
        lengths = heard.lengths
        log_probs = model.model.ctc_decoder(model.model._ctc_input(heard.frames)).log_softmax(-1)
        nats = torch.nn.functional.ctc_loss(
            log_probs, labels[row, :n], lengths[0], torch.tensor(n), blank=12, reduction="sum"
        )
        torch.testing.assert_close(parts[-1], nats / n)
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2)
    whole = model(**audio, ctc_labels=labels, num_items_in_batch=6).loss
    torch.testing.assert_close(whole, (4 * parts[0] + 2 * parts[1]) / 6)
    with pytest.raises(ValueError, match="leave input_ids out"):
        model(**audio, ctc_labels=labels, input_ids=labels)
    with pytest.raises(ValueError, match="3 transcripts for 2 recordings"):
        model(**audio, ctc_labels=labels[[0, 0, 1]])


def test_only_the_ctc_decoder_learns_when_all_else_is_frozen(model: Model, make_audio: Make) -> None:
    model.requires_grad_(False).train()
    model.model.ctc_decoder.requires_grad_(True)
    labels = torch.tensor([[1, 2, 2, 3]])
    optimizer = torch.optim.Adam(model.model.ctc_decoder.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(**make_audio([400]), ctc_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 3


def test_ctc_transcription_collapses_repeats_and_then_drops_blanks(model: Model, make_audio: Make) -> None:
    audio = make_audio([400], [3000, 80])
    heard = model.encode(**audio)
    best = model.model.ctc_decoder(model.model._ctc_input(heard.frames)).argmax(-1)
    expected = [
        [piece for piece, _ in groupby(pieces.tolist()) if piece != 12]
        for pieces in best.split(heard.lengths.tolist())
    ]
    assert model.ctc_transcribe(**audio) == expected
    assert 12 in best and any(a == b for pieces in expected for a, b in zip(pieces, pieces[1:], strict=False))


def test_nothing_frozen_is_recorded_for_autograd(model: Model, make_audio: Make, make_prompts: Make) -> None:
    model.requires_grad_(False).train()
    model.model.language_model.requires_grad_(True)
    model.enable_input_require_grads()  # as gradient checkpointing with adapters does; it reaches the encoder as well
    seen: list[Tensor] = []
    model.model.audio_tower.layers[0].register_forward_hook(lambda _, args, output: seen.append(output))
    audio = model.get_audio_features(**make_audio([400]), target_length=20)
    assert not audio.pooler_output.requires_grad and not seen[0].requires_grad
    model(**training_batch(make_audio, make_prompts)).loss.backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad is not None


def test_gradients_reach_the_encoder_through_the_fusion(model: Model, make_audio: Make, make_prompts: Make) -> None:
    model.train()
    model(**training_batch(make_audio, make_prompts)).loss.backward()
    assert model.model.audio_tower.conv1.weight.grad.abs().sum() > 0
    assert model.model.ctc_decoder.linear.weight.grad is None  # the density is a constant


def test_gradient_checkpointing_changes_nothing(model: Model, make_audio: Make, make_prompts: Make) -> None:
    batch = training_batch(make_audio, make_prompts)
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable()
    for one in (model.train(), other):
        one(**batch).loss.backward()
    for (name, plain), (_, checkpointed) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(checkpointed.grad, plain.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_train_and_generate(model: Model, make_audio: Make, make_prompts: Make) -> None:
    peft = pytest.importorskip("peft")
    batch = training_batch(make_audio, make_prompts)
    targets = r".*language_model.*\.(q|k|v|o)_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    adapted.train()
    adapted(**batch).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("language_model" in name and "lora_" in name for name in trained)
    adapted.eval()
    inputs = make_audio([400]) | make_prompts([20])
    out = adapted.generate(**inputs, target_length=9, max_new_tokens=3)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


def test_is_built_from_a_configuration_of_defaults_but_for_the_sizes() -> None:
    assert Model(FastLongSpeechConfig(**tiny_config())).model.ctc_decoder.linear.out_features == 10_001
