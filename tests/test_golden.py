"""The released implementation's figures, see data/golden/README.md.

The smallest gap between a similarity that is glued and one that is not is 4.8e-5 there, far above the rounding of
float32 sums: no two similarities tie, and every span has to be the recorded one.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fastlongspeech import FastLongSpeechForConditionalGeneration
from fastlongspeech.fusion_fastlongspeech import FusionSettings, content_density, iterative_fusion
from fastlongspeech.recordings_fastlongspeech import EncodedRecordings

GOLDEN = Path(__file__).parent / "data" / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
LADDER = (400, 200, 100, 50, 25, 12)
AUDIO_TOKEN = 990

LONG = [(s, L) for s in ("5.3", "30", "47") for L in (750, 400, 200, 100, 50, 25, 12)]
SHORT = [(s, L) for s in ("5.3", "30") for L in (750, 400, 200, 100, 50, 25, 12)]
PATHS = [("long", "halving", s, L) for s, L in LONG] + [("short", "ladder", s, L) for s, L in SHORT]


def load(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def close(actual: Tensor, recorded: Tensor) -> None:
    torch.testing.assert_close(actual, recorded, rtol=1e-4, atol=1e-4 * float(recorded.abs().max()))


@pytest.fixture(scope="module")
def model() -> FastLongSpeechForConditionalGeneration:
    return FastLongSpeechForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float32).eval()


def audio_inputs(seconds: str) -> dict[str, Tensor]:
    audio = load(f"audio_{seconds}s")
    return {
        "input_features": audio["mel_q"].float() / 64,
        "feature_attention_mask": audio["mel_mask"],
        "windows_per_audio": torch.tensor([len(audio["mel_q"])]),
    }


def prompt(placeholders: int) -> Tensor:
    ids = INDEX["prompt"]
    return torch.tensor([ids[:3] + [AUDIO_TOKEN] * placeholders + ids[4:]])


def recorded_spans(tensors: dict[str, Tensor], target_length: int, row: int | None = None) -> list[int]:
    """The span of every frame after the last round, from the recorded spans of each round."""
    rounds = [tensors[f"L{target_length}.seg{i}"] for i in range(8) if f"L{target_length}.seg{i}" in tensors]
    if row is not None:
        rounds = [round_spans[row] for round_spans in rounds]
    spans = rounds[0].long() if rounds else torch.zeros(0, dtype=torch.int64)
    for round_spans in rounds[1:]:
        spans = round_spans.long()[spans]
    return spans.tolist()


def spans_of(bounds: Tensor) -> list[int]:
    return [span for span, (start, end) in enumerate(bounds.tolist()) for _ in range(start, end)]


def test_the_released_checkpoint_loads_whole() -> None:
    model, info = FastLongSpeechForConditionalGeneration.from_pretrained(GOLDEN, output_loading_info=True)
    assert not any(info.values())
    assert model.config.model_type == "fastlongspeech"
    assert (model.config.ctc_vocab_size, model.config.ctc_projector) == (50, True)
    assert model.config.content_density == "ctc"


@torch.no_grad()
@pytest.mark.parametrize("seconds", ["5.3", "30", "47"])
def test_frames_and_densities(model: FastLongSpeechForConditionalGeneration, seconds: str) -> None:
    audio, counts = load(f"audio_{seconds}s"), INDEX["audio"][seconds]["frames"]
    recordings = model.encode(**audio_inputs(seconds))
    frames, lengths = recordings.frames, recordings.lengths
    assert lengths.tolist() == [sum(counts)]
    close(frames, torch.cat([window[:n] for window, n in zip(audio["enc_pre"], counts, strict=True)]))
    density = torch.cat([window[:n] for window, n in zip(audio["density"], counts, strict=True)])
    close(model.density(frames), density)


@torch.no_grad()
@pytest.mark.parametrize(("path", "schedule", "seconds", "target_length"), PATHS)
def test_fused_frames_embeddings_and_logits(
    model: FastLongSpeechForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    schedule: str,
    seconds: str,
    target_length: int,
) -> None:
    recorded = load(f"{path}_{seconds}s")
    monkeypatch.setattr(model.config, "fusion_schedule", schedule)
    inputs = audio_inputs(seconds)
    audio = model.get_audio_features(**inputs, target_length=target_length)
    length, total = int(audio.audio_lengths), sum(INDEX["audio"][seconds]["frames"])
    assert length == min(total, target_length)

    if length < total:
        recordings = model.encode(**inputs)
        frames, lengths = recordings.frames, recordings.lengths
        fused = iterative_fusion(frames[None], lengths, target_length, FusionSettings(model.density, schedule, LADDER))
        close(fused.frames[0], recorded[f"L{target_length}.fused"])
        assert spans_of(fused.spans[0]) == recorded_spans(recorded, target_length)
    name = "none" if path == "long" and length == total else f"L{target_length}"
    close(audio.pooler_output, recorded[f"{name}.proj"])
    close(model(input_ids=prompt(length), **inputs).logits[0, -2:], recorded[f"{name}.logits_last2"])


@torch.no_grad()
def test_every_frame_of_two_windows(model: FastLongSpeechForConditionalGeneration) -> None:
    recorded, inputs = load("long_47s"), audio_inputs("47")
    audio = model.get_audio_features(**inputs, compression="none")
    close(audio.pooler_output, recorded["none.proj"])
    logits = model(input_ids=prompt(int(audio.audio_lengths)), **inputs).logits[0, -2:]
    close(logits, recorded["none.logits_last2"])


@torch.no_grad()
@pytest.mark.parametrize("target_length", [750, 400, 200, 100, 50, 25, 12])
def test_padded_training_batch(
    model: FastLongSpeechForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, target_length: int
) -> None:
    batch = load("train_batch3")
    lengths = batch["lengths"]
    frames = torch.cat([row[:n] for row, n in zip(batch["enc_pre"], lengths.tolist(), strict=True)])
    monkeypatch.setattr(model.config, "fusion_schedule", "ladder")
    seconds = torch.arange(len(frames)).double()
    recordings = EncodedRecordings(frames, seconds, seconds + 1, lengths)
    monkeypatch.setattr(model.model, "_encode", lambda *_: recordings)

    fused = iterative_fusion(batch["enc_pre"], lengths, target_length, FusionSettings(model.density, "ladder", LADDER))
    kept = lengths.clamp(max=target_length)
    assert fused.lengths.tolist() == kept.tolist()
    for row, (n, before) in enumerate(zip(kept.tolist(), lengths.tolist(), strict=True)):
        close(fused.frames[row, :n], batch[f"L{target_length}.fused"][row, :n])
        if n < before:
            assert spans_of(fused.spans[row]) == recorded_spans(batch, target_length, row)[:before]

    def expand(values: Tensor, placeholder: int) -> Tensor:
        rows = [torch.cat((v[:3], torch.full((n,), placeholder), v[4:])) for v, n in zip(values, kept, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100 if placeholder < 0 else 0)

    mask = expand(batch["attention_mask"], 1)
    windows = {"input_features": torch.zeros(3, 128, 3000), "feature_attention_mask": torch.ones(3, 3000)}
    embeddings = model.get_audio_features(**windows, target_length=target_length).pooler_output
    recorded = zip(batch[f"L{target_length}.proj"], kept.tolist(), strict=True)
    close(embeddings, torch.cat([row[:n] for row, n in recorded]))
    output = model(
        input_ids=expand(batch["input_ids"], AUDIO_TOKEN),
        attention_mask=mask,
        labels=expand(batch["labels"], -100),
        **windows,
    )
    close(output.loss, torch.tensor(INDEX["train_loss"][str(target_length)]))
    valid = mask[:, -4:] == 1
    assert valid.any()
    close(output.logits[:, -4:][valid], batch[f"L{target_length}.logits_last4"][valid])


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "schedule"), [(case, "ladder" if "short" in case else "halving") for case in INDEX["generate"]]
)
def test_greedy_tokens(
    model: FastLongSpeechForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, case: str, schedule: str
) -> None:
    _, seconds, target_length = case.split("_")
    monkeypatch.setattr(model.config, "fusion_schedule", schedule)
    inputs = audio_inputs(seconds.removesuffix("s"))
    ids = prompt(1)
    out = model.generate(
        input_ids=ids, **inputs, target_length=int(target_length[1:]), max_new_tokens=8, do_sample=False
    )
    assert out[0, ids.shape[1] :].tolist() == INDEX["generate"][case]


@torch.no_grad()
def test_ctc_logits_and_loss(model: FastLongSpeechForConditionalGeneration) -> None:
    recorded = load("ctc")
    for row, seconds in ((1, "5.3"), (2, "30")):
        inputs = audio_inputs(seconds)
        frames = model.encode(**inputs).frames
        logits = recorded[f"{seconds}.ctc_logits"]
        close(model.model.ctc_decoder(model.model._ctc_input(frames)), logits)
        loss = model(**inputs, ctc_labels=recorded["labels"][row : row + 1]).loss
        close(loss, torch.tensor(INDEX["ctc"][f"loss_{seconds}"]))


@pytest.fixture
def small() -> dict[str, Tensor]:
    return load("fusion_small")


def small_density(small: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def density(frames: Tensor) -> Tensor:
        hidden = F.layer_norm(frames, (16,), small["layer_norm.weight"], small["layer_norm.bias"])
        hidden = F.linear(hidden, small["normal.projector.weight"], small["normal.projector.bias"])
        return content_density(F.linear(hidden, small["normal.linear.weight"]))

    return density


@torch.no_grad()
@pytest.mark.parametrize("target_length", [200, 100, 50, 25, 12])
@pytest.mark.parametrize(("path", "schedule"), [("long", "halving"), ("short", "ladder")])
def test_fusion_without_a_model(small: dict[str, Tensor], path: str, schedule: str, target_length: int) -> None:
    whole, lengths = small["normal.features"][None], torch.tensor([257])
    fused = iterative_fusion(whole, lengths, target_length, FusionSettings(small_density(small), schedule, LADDER))
    close(fused.frames[0], small[f"normal.{path}.L{target_length}"])


@torch.no_grad()
def test_fusion_to_a_single_frame(small: dict[str, Tensor]) -> None:
    fused = iterative_fusion(
        small["normal.features"][None], torch.tensor([257]), 1, FusionSettings(small_density(small))
    )
    close(fused.frames[0], small["normal.long.L1"])


@torch.no_grad()
@pytest.mark.parametrize("target_length", [200, 100, 50, 25, 12])
def test_fusion_of_a_batch_without_a_model(small: dict[str, Tensor], target_length: int) -> None:
    lengths = small["normal.batch_lengths"]
    fused = iterative_fusion(
        small["normal.batch"], lengths, target_length, FusionSettings(small_density(small), "ladder", LADDER)
    )
    for row, n in enumerate(lengths.clamp(max=target_length).tolist()):
        close(fused.frames[row, :n], small[f"normal.train.L{target_length}"][row, :n])


@torch.no_grad()
def test_saturated_densities_where_the_recorded_ones_are_positive(small: dict[str, Tensor]) -> None:
    """After one round: spans of zeros are zero frames there, which this package makes plain means instead."""
    recorded = small["saturated.long.L200"]
    density = small["saturated.density"]
    fused = iterative_fusion(
        small["saturated.features"][None], torch.tensor([257]), 200, FusionSettings(lambda _: density[None])
    )
    positive = torch.stack([density[start:end].sum() > 0 for start, end in fused.spans[0]])
    assert 100 < int(positive.sum()) < 200
    close(fused.frames[0][positive], recorded[positive])
    means = torch.stack([small["saturated.features"][start:end].mean(0) for start, end in fused.spans[0]])
    close(fused.frames[0][~positive], means[~positive])
