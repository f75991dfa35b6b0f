"""Positions on three axes: a recording takes as many as it has placeholders, also beside images and videos."""

from itertools import count
from typing import Any

import pytest
import torch
from tiny_omni import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    OMNIS,
    VIDEO,
    VISION_END,
    VISION_START,
    Omni,
    make_audio,
    make_prompts,
    pad_left,
)
from torch import Tensor

PATCH = 3 * 2 * 4 * 4  # values of a patch: colours, frames, height, width
SECONDS_PER_GRID = 2.0
Part = tuple[str, Any]

# Prompts by their parts: how many tokens of text, placeholders of audio, or (time, height, width) of patches.
BESIDE_IMAGES: list[Part] = [("text", 2), ("image", (1, 2, 3)), ("text", 1), ("audio", 20), ("image", (1, 4, 1))]
BESIDE_IMAGES += [("audio", 3), ("text", 2)]
BESIDE_A_VIDEO: list[Part] = [("audio", 5), ("video", (3, 2, 2)), ("text", 4), ("audio", 11), ("text", 1)]


@pytest.fixture(params=OMNIS)
def omni(request: pytest.FixtureRequest) -> Omni:
    return OMNIS[request.param]


@pytest.fixture
def stock(omni: Omni) -> Any:
    return omni.make_stock()


@pytest.fixture
def model(omni: Omni, stock: Any) -> Any:
    return omni.make_model(stock)


def rows(*prompts: list[Part]) -> dict[str, Tensor]:
    """Returns prompts, left padded, with the patches of their images and videos."""
    inputs: dict[str, Any] = {"image_grid_thw": [], "video_grid_thw": []}
    ids = []
    for parts in prompts:
        row: list[int] = []
        text = count(10)
        for kind, size in parts:
            if kind == "text":
                row += [next(text) for _ in range(size)]
            elif kind == "audio":
                row += [AUDIO_START, *[AUDIO] * size, AUDIO_END]
            else:
                placeholder = IMAGE if kind == "image" else VIDEO
                row += [VISION_START, *[placeholder] * (size[0] * size[1] * size[2]), VISION_END]
                inputs[f"{kind}_grid_thw"].append(size)
        ids.append(torch.tensor(row))
    inputs |= pad_left(ids)
    generator = torch.Generator().manual_seed(0)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = torch.tensor(inputs.pop(f"{kind}_grid_thw"))
        if len(grids):
            inputs[f"{kind}_grid_thw"] = grids
            inputs[pixels] = torch.randn(int(grids.prod(1).sum()), PATCH, generator=generator)
            if kind == "video":
                inputs["video_second_per_grid"] = torch.full((len(grids),), SECONDS_PER_GRID)
    return inputs


def positions_by_hand(parts: list[Part]) -> list[list[int]]:
    """Returns time, height and width of every token: all that is not seen is counted on, patches have places."""
    axes: list[list[int]] = []
    after = 0
    for kind, size in parts:
        if kind in ("text", "audio"):
            tokens = size if kind == "text" else size + 2
            axes += [[after + step] * 3 for step in range(tokens)]
        else:
            axes.append([after] * 3)
            step = 25 * (SECONDS_PER_GRID if kind == "video" else 1)
            start = after + 1
            for time in range(size[0]):
                for height in range(size[1]):
                    axes += [[start + int(time * step), start + height, start + width] for width in range(size[2])]
            axes.append([max(map(max, axes)) + 1] * 3)
        after = max(map(max, axes)) + 1
    return axes


def grids_of(inputs: dict[str, Tensor]) -> dict[str, Any]:
    names = {"image_grid_thw": "image_grid_thw", "video_grid_thw": "video_grid_thw"}
    names["second_per_grids"] = "video_second_per_grid"
    return {argument: inputs.get(name) for argument, name in names.items()}


def test_positions_beside_images_and_videos(model: Any) -> None:
    """Of a batch with padding; the mel frames of the recordings, were they read, would give others."""
    prompts = [BESIDE_IMAGES, BESIDE_A_VIDEO, [("text", 3), ("audio", 7)]]
    inputs = rows(*prompts)
    for mel_frames in (None, torch.tensor([9999] * 5)):
        positions, deltas = model.get_rope_index(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            audio_seqlens=mel_frames,
            **grids_of(inputs),
        )
        for row, parts in enumerate(prompts):
            expected = torch.tensor(positions_by_hand(parts)).T
            assert torch.equal(positions[:, row, inputs["attention_mask"][row].bool()].long(), expected)
            assert int(deltas[row]) == int(expected.max()) + 1 - expected.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("parts", [BESIDE_IMAGES, BESIDE_A_VIDEO], ids=["images", "video"])
def test_every_frame_gives_the_logits_of_the_stock_model(
    omni: Omni, stock: Any, model: Any, parts: list[Part]
) -> None:
    mels = (730, 333)
    frames = iter(map(omni.frames_of, mels))
    whole = [(kind, next(frames) if kind == "audio" else size) for kind, size in parts]
    inputs = rows(whole) | make_audio(*mels)
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs, compression="none").logits, expected, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, compression="none", **options), stock.generate(**inputs, **options))


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_length_in_generate_equals_the_length_prepared(model: Any, beams: int) -> None:
    """Two prompts with images and a video; what is not prepared is resized inside."""

    def answers(lengths: list[int], **options: Any) -> list[list[int]]:
        sizes = iter(lengths)
        prompts = [
            [(kind, next(sizes) if kind == "audio" else size) for kind, size in parts]
            for parts in (BESIDE_IMAGES, BESIDE_A_VIDEO)
        ]
        inputs = rows(*prompts) | make_audio(730, 400, 190, 1200)
        options |= {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers([1, 1, 1, 1], target_length=[30, 9, 20, 44]) == answers([30, 9, 20, 44])


@torch.no_grad()
def test_generation_is_a_search_over_forward_beside_an_image(model: Any) -> None:
    inputs = rows(BESIDE_IMAGES) | make_audio(730, 400)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(4):
        more = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat((ids, model(**more).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)


@torch.no_grad()
def test_caches_that_take_turns_keep_their_own_positions(model: Any) -> None:
    """A prompt with a picture and one without, each read on by hand after the other."""
    prompts = [rows(BESIDE_IMAGES) | make_audio(730, 400), make_audio(190) | make_prompts([20])]
    following = torch.tensor([[12, 13]])
    masks = [torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long) for inputs in prompts]
    caches = [model(**inputs).past_key_values for inputs in prompts]
    for inputs, mask, cache in zip(prompts, masks, caches, strict=True):
        whole = inputs | {"input_ids": torch.cat((inputs["input_ids"], following), dim=1), "attention_mask": mask}
        expected = model(**whole).logits[:, -2:]
        for attention_mask in (mask, None):
            continued = model(input_ids=following, attention_mask=attention_mask, past_key_values=cache)
            torch.testing.assert_close(continued.logits, expected, rtol=1e-4, atol=1e-4)
            cache.crop(-2)


@torch.no_grad()
def test_a_prompt_of_embeddings_does_not_take_the_positions_of_the_one_before(model: Any) -> None:
    plain = make_prompts([])
    embeddings = model.get_input_embeddings()(plain["input_ids"])
    expected = model(**plain).logits
    model(**rows(BESIDE_IMAGES), **make_audio(730, 400))
    found = model(inputs_embeds=embeddings, attention_mask=plain["attention_mask"]).logits
    torch.testing.assert_close(found, expected)


def test_sound_between_a_video_s_frames_is_refused(model: Any) -> None:
    inputs = rows(BESIDE_A_VIDEO) | make_audio(730, 400)
    with pytest.raises(ValueError, match="use_audio_in_video=True asks for sound between a video's frames"):
        model(**inputs, use_audio_in_video=True)
    with pytest.raises(ValueError, match="give the sound as a recording of its own"):
        model.generate(**inputs, use_audio_in_video=True, max_new_tokens=1)
