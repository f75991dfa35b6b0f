"""Summaries in the language model: by intervals and in one pass, against each other and against the stock model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_language_models import SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration
from fastlongspeech.intervals_fastlongspeech import interleave
from fastlongspeech.summary_fastlongspeech import PROJECTIONS
from fastlongspeech.windows_fastlongspeech import count_summaries, summary_intervals

Model = FastLongSpeechForConditionalGeneration
Make = Callable[..., Any]
Ratio = int | list[int]

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2, yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 6},
}
INTERVALS: list[tuple[int, int, Ratio]] = [
    (16, 50, [2, 4, 8, 4]),  # mixed ratios, a last interval of 2
    (20, 50, 5),
    (50, 50, 5),  # one interval
    (12, 50, [1, 2, 3, 4, 6]),
    (16, 33, 100),  # one summary for each interval
    (720, 9, 2),
]


def with_summaries(interval: int = 16, seed: int = 0, **text_config: Any) -> Model:
    """A tiny model whose summary projections are far from copies."""
    torch.manual_seed(seed)
    fields = tiny_config(ctc_vocab_size=12, summary_interval=interval)
    fields["text_config"] = SIZES | ({"model_type": "qwen2"} | text_config)
    model = Model(FastLongSpeechConfig(**fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "summary_" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.generation_config.eos_token_id = None
    return model


def parts(frames: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Text, a recording and text, as embeddings."""
    torch.manual_seed(1)
    return torch.randn(3, 24), torch.randn(frames, 24), torch.randn(4, 24)


def by_intervals(model: Model, pieces: Sequence[Tensor], ratio: Ratio) -> tuple[Tensor, DynamicCache]:
    """Hidden states of text, recording, text, ... without those of summary tokens, and the cache that is left."""
    inner, cache, states = model.model, DynamicCache(config=model.config.get_text_config()), []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            states.append(inner.read_tokens(cache, piece))
            continue
        intervals = summary_intervals(len(piece), model.config.summary_interval, ratio)
        of_intervals = inner.read_recording(cache, piece, ratio)
        for (start, stop, alpha), hidden in zip(intervals, of_intervals, strict=True):
            states.append(hidden[~interleave(stop - start, alpha)[1]])
    return torch.cat(states), cache


def in_one_pass(model: Model, pieces: Sequence[Tensor], ratio: Ratio) -> Tensor:
    placeholders = torch.cat([torch.full((len(piece),), number % 2 == 1) for number, piece in enumerate(pieces)])
    embeds = torch.cat(list(pieces))[None]
    return model.model.read_in_one_pass(embeds, None, placeholders[None], ratio).last_hidden_state[0]


# Oracle 1: both ways are one


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize(("interval", "frames", "ratio"), INTERVALS[:1])
def test_one_pass_is_reading_by_intervals(language_model: str, interval: int, frames: int, ratio: Ratio) -> None:
    model = with_summaries(interval, **LANGUAGE_MODELS[language_model])
    with torch.no_grad():
        step_by_step, _ = by_intervals(model, parts(frames), ratio)
        torch.testing.assert_close(in_one_pass(model, parts(frames), ratio), step_by_step, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("interval", "frames", "ratio"), INTERVALS)
def test_one_pass_is_reading_by_intervals_of_any_size(
    interval: int, frames: int, ratio: Ratio, implementation: str
) -> None:
    model = with_summaries(interval)
    model.model.language_model.set_attn_implementation(implementation)
    with torch.no_grad():
        step_by_step, _ = by_intervals(model, parts(frames), ratio)
        torch.testing.assert_close(in_one_pass(model, parts(frames), ratio), step_by_step, rtol=1e-3, atol=1e-4)


def test_one_pass_has_the_gradients_of_reading_by_intervals() -> None:
    model = with_summaries(16)
    weights = {
        name: weight
        for name, weight in model.model.named_parameters()
        if "summary_" in name or "language_model.layers" in name
    }
    direction = torch.randn(4, 24)

    def gradients(states: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((states[-4:] * direction).sum(), list(weights.values()))

    expected = gradients(by_intervals(model, parts(), [2, 4, 8, 4])[0])
    found = gradients(in_one_pass(model, parts(), [2, 4, 8, 4]))
    for name, one, other in zip(weights, found, expected, strict=True):
        nobody_asks = "layers.1.self_attn.summary_q_proj" in name  # what summaries say in the last layer
        assert (other.abs().max() > 0) != nobody_asks, name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_several_recordings_in_one_prompt() -> None:
    model = with_summaries(16)
    torch.manual_seed(3)
    pieces = [torch.randn(n, 24) for n in (3, 40, 2, 17, 5)]
    with torch.no_grad():
        step_by_step, cache = by_intervals(model, pieces, 4)
        torch.testing.assert_close(in_one_pass(model, pieces, 4), step_by_step, rtol=1e-3, atol=1e-4)
    assert cache.get_seq_length() == 3 + (4 + 4 + 2) + 2 + (4 + 1) + 5


# Oracle 2: without a summary token, the parent


def test_a_model_with_summary_projections_reads_all_else_as_before(make_audio: Make, make_prompts: Make) -> None:
    torch.manual_seed(0)
    model = Model(FastLongSpeechConfig(**tiny_config(ctc_vocab_size=12))).eval()
    inputs = make_audio([300], [3000, 80]) | make_prompts([20], [31])
    with torch.no_grad():
        before = model(**inputs).logits
        model.model.add_summary(16)
        assert torch.equal(model(**inputs).logits, before)


def test_the_projections_begin_as_copies_and_the_embedding_as_the_mean_of_all() -> None:
    torch.manual_seed(0)
    model = Model(FastLongSpeechConfig(**tiny_config(ctc_vocab_size=12)))
    model.model.add_summary(16)
    for layer in model.model.language_model.layers:
        for name in PROJECTIONS:
            own, copied = getattr(layer.self_attn, name), getattr(layer.self_attn, f"summary_{name}")
            assert torch.equal(own.weight, copied.weight) and torch.equal(own.bias, copied.bias)
            assert own.weight is not copied.weight
    tokens = model.get_input_embeddings().weight
    torch.testing.assert_close(model.model.summary_embedding.weight[0], tokens.mean(0))


# Oracle 3: copies, and nothing dropped, are plain causal attention


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_one_interval_with_copied_projections_is_the_stock_model_on_the_same_tokens(language_model: str) -> None:
    model = with_summaries(720, **LANGUAGE_MODELS[language_model])
    model.model.add_summary(720)  # copies again
    stock: Any = AutoModelForCausalLM.from_config(model.config.get_text_config()).eval().base_model
    stock.load_state_dict(model.model.language_model.state_dict(), strict=False)
    before, frames, _ = parts(9)
    summary = model.model.summary_embedding.weight
    tokens = torch.cat((before, frames[:4], summary, frames[4:8], summary, frames[8:], summary))
    with torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model.model.read_tokens(cache, before)
        (found,) = model.model.read_recording(cache, frames, 4)
        torch.testing.assert_close(found, stock(inputs_embeds=tokens[None]).last_hidden_state[0, 3:])


# Oracle 5: what passes on of a frame passes through summary tokens


def test_a_frame_reaches_what_follows_its_interval_through_summary_tokens_alone() -> None:
    model = with_summaries(16)
    text, frames, more = parts()
    changed = frames.clone()
    changed[5] += 1
    with torch.no_grad():
        assert not torch.allclose(
            by_intervals(model, (text, frames, more), 4)[0][-4:], by_intervals(model, (text, changed, more), 4)[0][-4:]
        )
        for layer in model.model.language_model.layers:  # summary tokens that say nothing, wherever they stand
            layer.self_attn.summary_v_proj.weight.zero_()
            layer.self_attn.summary_v_proj.bias.zero_()
            layer.self_attn.summary_k_proj.weight.zero_()
        found = by_intervals(model, (text, changed, more), 4)[0]
        expected = by_intervals(model, (text, frames, more), 4)[0]
    outside = [*range(3), *range(3 + 16, len(found))]
    torch.testing.assert_close(found[outside], expected[outside], rtol=0, atol=0)
    assert not torch.allclose(found[3 + 5 : 3 + 16], expected[3 + 5 : 3 + 16])


# Oracle 6: what the cache holds


@pytest.mark.parametrize(("interval", "frames", "ratio"), INTERVALS)
def test_the_cache_holds_the_text_and_a_summary_for_every_ratio_frames(
    interval: int, frames: int, ratio: Ratio
) -> None:
    model = with_summaries(interval)
    with torch.no_grad():
        _, cache = by_intervals(model, parts(frames), ratio)
    kept, place, number = 0, 0, 0
    while place < frames:  # a loop over groups of frames
        end = min(place + interval, frames)
        while place < end:
            place, kept = min(place + (ratio if isinstance(ratio, int) else ratio[number]), end), kept + 1
        number += 1
    assert cache.get_seq_length() == 3 + kept + 4
    assert count_summaries(frames, interval, ratio) == kept


def test_an_hour_takes_an_eighth_of_its_cache_and_never_more_than_an_interval_beside() -> None:
    frames = 90_000
    assert count_summaries(frames, 720, 8) == frames // 8
    most = max(
        count_summaries(start, 720, 8) + (stop - start) + count_summaries(stop - start, 720, 8)
        for start, stop, _ in summary_intervals(frames, 720, 8)
    )
    assert most <= frames // 8 + 720


def test_positions_are_consecutive_over_what_is_kept() -> None:
    """A kept key is what the projection of its token gives at its new place, computed in one rotation."""
    model = with_summaries(16)
    text, frames, _ = parts(32)
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        _, cache = by_intervals(model, (text, frames, text[:0][:0].new_zeros(1, 24)), 4)
        normed = model.model.language_model.layers[0].input_layernorm(model.model.summary_embedding.weight)
        key = attention.summary_k_proj(normed).view(1, 2, 6).transpose(0, 1)  # the same for all in the first layer
        cos, sin = model.model.language_model.rotary_emb(key[None], torch.arange(3, 11)[None])
        turned = torch.cat((-key[..., 3:], key[..., :3]), dim=-1)
        expected = key * cos + turned * sin
    layer: Any = cache.layers[0]
    torch.testing.assert_close(layer.keys[0, :, 3:11], expected, rtol=1e-4, atol=1e-5)


def test_a_cache_in_bfloat16_is_rotated_in_float32() -> None:
    from fastlongspeech.summary_fastlongspeech import angles, rotate

    keys, places = torch.randn(1, 1, 50, 8), -torch.arange(50)[None] * 13
    frequencies = 1 / 10_000 ** (torch.arange(4) / 4)
    exact = rotate(keys.bfloat16().double(), *(part.double() for part in angles(places, frequencies.double())))
    found = rotate(keys.bfloat16(), *angles(places, frequencies))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact.bfloat16().double(), rtol=2**-7, atol=1e-6)


# Oracle 8, and training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(make_audio: Make, make_prompts: Make, reentrant: bool) -> None:
    inputs = make_audio([300], [120]) | make_prompts([70], [25])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)
    found = []
    for checkpointing in (False, True):
        model = with_summaries(16).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_input_embeddings().weight.requires_grad_(True)
        loss = model(**inputs, compression="summary", compression_ratio=[4, 2, 8, 4, 1]).loss
        loss.backward()
        found.append([loss.detach()] + [w.grad for n, w in model.named_parameters() if "summary_" in n])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_reading_by_intervals_is_refused_under_gradient_checkpointing() -> None:
    model = with_summaries(16).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="can't be summed up by intervals under gradient checkpointing, which drops"):
        by_intervals(model, parts(), 4)


def test_forward_gives_a_batch_the_logits_of_its_rows_alone(make_audio: Make, make_prompts: Make) -> None:
    model = with_summaries(16)
    batch = make_audio([300], [3000, 80], [90]) | make_prompts([60], [40], [5])  # the second is fused to 40
    with torch.no_grad():
        together = model(**batch, compression="summary", compression_ratio=4).logits
        windows = 0
        for row, count in enumerate([1, 2, 1]):
            real = batch["attention_mask"][row].bool()
            alone = {
                "input_ids": batch["input_ids"][row : row + 1, real],
                "input_features": batch["input_features"][windows : windows + count],
                "feature_attention_mask": batch["feature_attention_mask"][windows : windows + count],
                "windows_per_audio": torch.tensor([count]),
            }
            windows += count
            expected = model(**alone, compression="summary", compression_ratio=4).logits[0]
            torch.testing.assert_close(together[row, real], expected, rtol=1e-3, atol=1e-3)


def test_a_target_length_is_that_of_30_seconds(make_audio: Make) -> None:
    model = with_summaries(16)
    audio = make_audio([3000, 1000])  # 40 s: 1000 frames
    for length, expected in ((750, 1000), (75, 100), (1, 2), (9000, 1000)):
        fused = model.get_audio_features(**audio, target_length=length, compression="summary")
        assert fused.audio_lengths.tolist() == [expected]
    whole = model.get_audio_features(**audio, target_length=100, compression="iterative_fusion")
    fused = model.get_audio_features(**audio, target_length=75, compression="summary")
    assert torch.equal(whole.pooler_output, fused.pooler_output)


# Saved and loaded


def test_summary_projections_are_saved_and_loaded(tmp_path: Any) -> None:
    model = with_summaries(16)
    model.save_pretrained(tmp_path)
    again, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.config.summary_interval == 16
    with torch.no_grad():
        expected = in_one_pass(model, parts(), 4)
        assert torch.equal(in_one_pass(again.eval(), parts(), 4), expected)


def test_projections_that_a_checkpoint_lacks_are_copies(tmp_path: Any) -> None:
    torch.manual_seed(0)
    Model(FastLongSpeechConfig(**tiny_config(ctc_vocab_size=12))).save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, summary_interval=16)
    for layer in model.model.language_model.layers:
        assert torch.equal(layer.self_attn.summary_q_proj.weight, layer.self_attn.q_proj.weight)


# Refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "gemma", "head_dim": 8}, "works with language models of the types llama, .* got 'gemma'"),
        ({"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4}, "works with language models .* got 'gpt2'"),
        ({"model_type": "mistral", "sliding_window": 8}, "attends to all that it has read, .* window of 8"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of the types default, .*, got 'dynamic'",
        ),
    ],
    ids=["gemma", "gpt2", "sliding window", "dynamic positions"],
)
def test_language_models_that_it_does_not_work_with(fields: dict[str, Any], sentence: str) -> None:
    config = FastLongSpeechConfig(**(tiny_config(ctc_vocab_size=12) | {"text_config": SIZES | fields}))
    with pytest.raises(ValueError, match=sentence):
        Model(config).model.add_summary(16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compression_ratio": 0}, "compression_ratio must be a positive integer, got 0"),
        ({"compression_ratio": [4, -1, 4, 4, 4]}, r"compression_ratio must be a positive integer, got \[4, -1"),
        ({"compression_ratio": 1.5}, "compression_ratio must be"),
        ({"compression_ratio": [4]}, r"an integer or one for each of 5 intervals, got \[4\]"),
        ({"compression": "none", "compression_ratio": 4}, "is for compression=\"summary\", got 4 with 'none'"),
        ({"past_key_values": DynamicCache()}, "past_key_values can't be read when recordings are summed up"),
    ],
)
def test_bad_arguments_are_refused(
    make_audio: Make, make_prompts: Make, options: dict[str, Any], sentence: str
) -> None:
    inputs = make_audio([300]) | make_prompts([75])
    with pytest.raises(ValueError, match=sentence):
        with_summaries(16)(**inputs, **({"compression": "summary"} | options))


def test_a_model_without_summary_projections_refuses(make_model: Make, make_audio: Make, make_prompts: Make) -> None:
    inputs = make_audio([300]) | make_prompts([75])
    with pytest.raises(ValueError, match='compression="summary" needs summary projections, which this model has none'):
        make_model()(**inputs, compression="summary")
    with pytest.raises(ValueError, match="interval must be a positive number of frames, got 0; 720 is a good one"):
        make_model().model.add_summary(0)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = with_summaries(16)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation 'flash_attention_2' takes no mask of its own"):
        in_one_pass(model, parts(), 4)
