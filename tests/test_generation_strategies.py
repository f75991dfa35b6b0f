"""Every way to generate that transformers offers: a batch answers as its rows alone, or the way is refused.

This file stands for transformers' own `GenerationTesterMixin`, which its source distribution does not carry; see
`transformers_suites/run.py`.
"""

from collections.abc import Callable, Sequence
from itertools import dropwhile
from typing import Any

import pytest
import torch
from conftest import AUDIO_TOKEN, tiny_config
from test_generation import answer, by_hand
from torch import Tensor
from transformers import GenerationConfig, Qwen2ForCausalLM, StoppingCriteria, WatermarkingConfig

from fastlongspeech import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, prompts_fastlongspeech

Model = FastLongSpeechForConditionalGeneration
Inputs = dict[str, Any]
Make = Callable[..., Any]

NEW = 6
# For every row the windows of its recordings in mel frames, and its placeholders: two recordings, one of two windows,
# text alone, one of a few frames.
ROWS: list[tuple[list[list[int]], list[int]]] = [
    ([[400], [130]], [20, 30]),
    ([[3000, 500]], [60]),
    ([], []),
    ([[9]], [2]),
]


@pytest.fixture
def model() -> Model:
    """A tiny model whose greedy answers seldom repeat a token, so that other ways to generate give others."""
    torch.manual_seed(2)
    fields = tiny_config(ctc_vocab_size=12)
    fields["text_config"]["initializer_range"] = 0.6
    model = Model(FastLongSpeechConfig(**fields)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def batch(make_audio: Make, make_prompts: Make) -> Inputs:
    recordings = [windows for of_row, _ in ROWS for windows in of_row]
    return make_audio(*recordings) | make_prompts(*(lengths for _, lengths in ROWS))


def one_by_one(batch: Inputs) -> list[Inputs]:
    """The rows of a batch, each with its own recordings and without padding."""
    rows: list[Inputs] = []
    recording = window = 0
    for number, (recordings, _) in enumerate(ROWS):
        count = sum(len(windows) for windows in recordings)
        real = batch["attention_mask"][number].bool()
        row = {name: batch[name][number : number + 1, real] for name in ("input_ids", "attention_mask")}
        if recordings:
            for name in ("input_features", "feature_attention_mask"):
                row[name] = batch[name][window : window + count]
            row["windows_per_audio"] = batch["windows_per_audio"][recording : recording + len(recordings)]
        rows.append(row)
        recording, window = recording + len(recordings), window + count
    return rows


def encoded(model: Model, inputs: Inputs) -> Inputs:
    """The same inputs, with recordings that are encoded already."""
    audio = {name: inputs[name] for name in ("input_features", "feature_attention_mask", "windows_per_audio")}
    return {name: value for name, value in inputs.items() if name not in audio} | {"recordings": model.encode(**audio)}


def without_padding(rows: list[list[int]], fill: int) -> list[list[int]]:
    """Answers that ended early are filled up when others go on, by beam search with the first token that ends one."""
    return [row[:1] + [*dropwhile(lambda token: token in (0, fill), row[:0:-1])][::-1] for row in rows]


class AfterToken(StoppingCriteria):
    """Stops a row after one of these tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


EVEN = list(range(2, 90, 2))
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "fixed length": {"target_length": 7},
    "every frame": {"compression": "none"},
    "another compression": {"compression": "average_pooling", "target_length": 11},
    "beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "beams, fixed length": {"num_beams": 3, "num_return_sequences": 2, "target_length": 7},
    "beams that prefer long answers": {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": EVEN, "pad_token_id": 0},
    "beams that stop early": {"num_beams": 3, "early_stopping": True, "eos_token_id": EVEN, "pad_token_id": 0},
    "sampling among one": {"do_sample": True, "top_k": 1},
    "sampling among the likeliest": {"do_sample": True, "top_p": 1e-6},
    "sampling with the highest floor": {"do_sample": True, "min_p": 1.0},
    "sampling when cold": {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2},
    "no n-gram twice": {"no_repeat_ngram_size": 1, "suppress_tokens": [0]},
    "repetition penalty": {"repetition_penalty": 5.0},
    "forbidden words": {"bad_words_ids": [[token] for token in range(2, 90, 3)]},
    "suppressed tokens": {"suppress_tokens": list(range(2, 90, 3))},
    "bias": {"sequence_bias": [[[33], 40.0]]},
    "forced end": {"forced_eos_token_id": 44},
    "ends": {"eos_token_id": EVEN, "pad_token_id": 0},
    "ends, not at once": {"eos_token_id": EVEN, "pad_token_id": 0, "min_new_tokens": 3},
    "ends sooner and sooner": {"eos_token_id": 17, "pad_token_id": 0, "exponential_decay_length_penalty": (2, 9.0)},
    "own stopping criterion": {"stopping_criteria": [AfterToken(EVEN)], "eos_token_id": 1, "pad_token_id": 0},
    "own allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [t for t in EVEN if t != int(ids[-1])]},
    "guidance": {"guidance_scale": 1.7},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_answers_as_its_rows_alone(model: Model, batch: Inputs, strategy: str) -> None:
    options = STRATEGIES[strategy]
    together = answer(model, batch, **options)
    alone = [row for inputs in one_by_one(batch) for row in answer(model, inputs, **options)]
    fill = options.get("eos_token_id", 0)
    fill = fill if isinstance(fill, int) else fill[0]
    assert without_padding(alone, fill) == without_padding(together, fill)
    assert answer(model, encoded(model, batch), **options) == together


@pytest.mark.parametrize("strategy", ["beams", "no n-gram twice", "bias", "ends", "guidance", "watermark"])
def test_the_strategies_above_are_no_greedy_search_in_disguise(model: Model, batch: Inputs, strategy: str) -> None:
    assert answer(model, batch, **STRATEGIES[strategy]) != answer(model, batch)


def test_greedy_search_is_forward_again_and_again(model: Model, batch: Inputs) -> None:
    assert answer(model, batch) == by_hand(model, batch)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"top_k": 5}], ids=["sampling", "beams", "top k"])
def test_a_batch_samples_from_what_its_rows_alone_would(model: Model, batch: Inputs, options: dict[str, Any]) -> None:
    """Which token is drawn depends on the batch, so that the logits before every drawn token are compared."""
    torch.manual_seed(0)
    out = model.generate(
        **batch,
        **options,
        do_sample=True,
        max_new_tokens=NEW,
        num_return_sequences=2,
        suppress_tokens=[AUDIO_TOKEN],
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)
    for number, alone in enumerate(one_by_one(batch)):
        for sample in (2 * number, 2 * number + 1):
            new = out.sequences[sample : sample + 1, -NEW:]
            ids = torch.cat((alone["input_ids"], new), dim=1)
            mask = torch.ones_like(ids)
            with torch.no_grad():
                expected = model(**(alone | {"input_ids": ids, "attention_mask": mask})).logits[0, -NEW - 1 : -1]
            if "num_beams" in options:  # of every step the beam that led to this answer
                beams = out.beam_indices[sample, :NEW]
                found = torch.stack([out.logits[step][beam] for step, beam in enumerate(beams)])
            else:
                found = logits[sample]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_same_seed_draws_the_same_from_recordings_and_from_their_features(model: Model, batch: Inputs) -> None:
    drawn = []
    for inputs in (batch, encoded(model, batch)):
        torch.manual_seed(5)
        drawn.append(answer(model, inputs, do_sample=True, num_return_sequences=2, target_length=9))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("strategy", ["greedy", "beams, fixed length", "sampling among one", "static cache"])
def test_one_recording_for_several_questions(
    model: Model, make_audio: Make, make_prompts: Make, strategy: str
) -> None:
    audio, prompts = make_audio([3000, 400]), make_prompts([12], [30], [12])
    options = STRATEGIES[strategy]
    together = answer(model, prompts | {"recordings": model.encode(**audio)}, **options)
    alone = []
    for number in range(3):
        real = prompts["attention_mask"][number].bool()
        alone += answer(model, audio | {"input_ids": prompts["input_ids"][number : number + 1, real]}, **options)
    assert alone == together


def test_prompt_lookup_equals_greedy_search_and_saves_steps(make_model: Make, model: Model, batch: Inputs) -> None:
    repeats = make_model()  # says a token again and again, which is looked up
    steps: list[int] = []
    repeats.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    for one in (model, repeats):
        greedy = [answer(one, row, max_new_tokens=12) for row in one_by_one(batch)]
        steps.clear()
        assert [answer(one, r, max_new_tokens=12, prompt_lookup_num_tokens=3) for r in one_by_one(batch)] == greedy
    assert 0 < len(steps) < 12 * len(ROWS)


# Padding


@pytest.mark.parametrize("strategy", ["greedy", "fixed length", "beams, fixed length", "ends", "static cache"])
def test_prompts_may_be_padded_on_the_right(model: Model, batch: Inputs, strategy: str) -> None:
    padded: Inputs = dict(batch)
    for name in ("input_ids", "attention_mask"):
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        padded[name] = torch.stack([row.roll(-shift) for row, shift in zip(batch[name], shifts, strict=True)])
    assert not torch.equal(padded["input_ids"], batch["input_ids"])
    options = STRATEGIES[strategy]
    assert answer(model, padded, **options) == answer(model, batch, **options)


def test_text_may_be_padded_on_the_right(model: Model, make_prompts: Make) -> None:
    left = make_prompts([], [])
    ids = torch.cat((left["input_ids"], torch.tensor([[8, 9], [0, 0]])), dim=1)
    mask = torch.cat((left["attention_mask"], torch.tensor([[1, 1], [0, 0]])), dim=1)
    together = answer(model, {"input_ids": ids, "attention_mask": mask})
    assert together == [
        answer(model, {"input_ids": row[real.bool()][None]})[0] for row, real in zip(ids, mask, strict=True)
    ]


def test_a_prompt_beyond_the_context_is_answered_with_a_warning(
    model: Model, make_audio: Make, make_prompts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(prompts_fastlongspeech.logger, "warning", warnings.append)
    model.config.get_text_config().max_position_embeddings = 50
    inputs = make_audio([400]) | make_prompts([44])  # and 6 tokens of text
    assert inputs["input_ids"].shape[1] == 50
    answer(model, inputs)
    assert not warnings
    answer(model, inputs, target_length=45)
    assert len(warnings) == 1 and "The prompt has 51 tokens, more than the 50" in warnings[0]


# Refused: our own sentences, and where transformers has handed a strategy over to code outside of it, its own


def refuse(model: Model, inputs: Inputs, sentence: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        answer(model, inputs, **options)


@pytest.fixture
def assistant() -> Qwen2ForCausalLM:
    config: Any = FastLongSpeechConfig(**tiny_config()).get_text_config()
    return Qwen2ForCausalLM(config).eval()


def test_refuses_an_assistant_which_would_not_hear(model: Model, batch: Inputs, assistant: Qwen2ForCausalLM) -> None:
    row = one_by_one(batch)[0]
    for helper in (assistant, model):
        refuse(model, row, "assistant_model would draft answers without hearing the rec", assistant_model=helper)
    refuse(model, row, "assistant_early_exit would draft answers without hearing", assistant_early_exit=1)
    refuse(model, encoded(model, row), "assistant_model would draft answers without", assistant_model=assistant)


def test_an_assistant_may_help_with_text(model: Model, batch: Inputs, assistant: Qwen2ForCausalLM) -> None:
    text = one_by_one(batch)[2]
    assert answer(model, text, assistant_model=assistant) == answer(model, text)


@pytest.mark.parametrize("where", ["argument", "generation_config"])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("prefill_chunk_size", 8, "prefill_chunk_size cannot split prompts that hold recordings; leave it out"),
        ("cache_implementation", "paged", "cache_implementation='paged' would answer without the recordings"),
        ("assistant_early_exit", 1, "assistant_early_exit would draft answers without hearing the recordings"),
    ],
)
def test_refuses_what_would_read_a_prompt_again(
    model: Model, batch: Inputs, name: str, value: Any, sentence: str, where: str
) -> None:
    if where == "argument":
        refuse(model, batch, sentence, **{name: value})
    else:
        config = GenerationConfig()
        setattr(config, name, value)
        refuse(model, batch, sentence, generation_config=config)
        setattr(model.generation_config, name, value)
        refuse(model, batch, sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code=True`"),
        ({"dola_layers": "low"}, "Dola Generation requires `trust_remote_code=True`"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "Group Beam Search requires"),
        ({"num_beams": 3, "force_words_ids": [[5]]}, "Constrained Beam Search requires `trust_remote_code=True`"),
        ({"use_mtp": True}, "num_mtp_layers"),
        ({"prompt_lookup_num_tokens": 2}, "only supported for batch_size = 1"),
        ({"low_memory": True, "num_beams": 2}, "low_memory=True` is not supported"),
    ],
    ids=["contrastive", "dola", "groups of beams", "constraints", "mtp", "prompt lookup in a batch", "low memory"],
)
def test_transformers_itself_refuses(model: Model, batch: Inputs, options: dict[str, Any], sentence: str) -> None:
    refuse(model, batch, sentence, **options)


def test_a_placeholder_may_be_an_answer(model: Model, batch: Inputs) -> None:
    """Where the language model says the placeholder itself, it stands for no recording."""
    said = answer(model, batch, sequence_bias=[[[AUDIO_TOKEN], 1e4]], max_new_tokens=3)
    assert said == [[AUDIO_TOKEN] * 3] * len(ROWS)
