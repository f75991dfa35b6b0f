"""On a device that is not the CPU the model does the same, waiting for nothing inside the fusion."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from second_device import SecondDevice, SecondDeviceTensor, move
from torch import Tensor

from fastlongspeech import FastLongSpeechForConditionalGeneration as Model
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS
from fastlongspeech.fusion_fastlongspeech import FusionSettings

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: SecondDeviceTensor(tensor) for name, tensor in inputs.items()}


def test_the_second_device_takes_care() -> None:
    with SecondDevice() as device:
        far = SecondDeviceTensor(torch.tensor([1.0, 2.0]))
        assert (far * 2 + torch.tensor(1.0)).held.tolist() == [3.0, 5.0]
        assert device.waits == []
        assert far.cpu().tolist() == [1.0, 2.0] and bool((far > 0).all()) and len(far[far > 1]) == 1
        assert len(device.waits) == 3
        with pytest.raises(RuntimeError, match="tensors on both devices"):
            far + torch.ones(2)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "none"])
def test_recordings_are_compressed_alike(
    model: Model, make_audio: Callable[..., dict[str, Tensor]], compression: str
) -> None:
    audio = make_audio([3000, 1700], [900], [30])
    expected = model.get_audio_features(**audio, target_length=40, compression=compression)
    with SecondDevice():
        features = move(copy.deepcopy(model)).get_audio_features(
            **there(audio), target_length=40, compression=compression
        )
        for name, tensor in features.items():
            torch.testing.assert_close(tensor.held, expected[name])


def test_nothing_waits_inside_the_fusion(model: Model) -> None:
    frames, lengths = torch.randn(3, 700, 16), torch.tensor([700, 20, 333])
    for compression, function in COMPRESSIONS.items():
        with SecondDevice() as device:
            settings = FusionSettings(move(copy.deepcopy(model)).model.density)
            function(SecondDeviceTensor(frames), lengths, 12, settings)
            assert device.waits == [], compression


def test_questions_are_answered_and_speech_is_transcribed_alike(
    model: Model, make_audio: Callable[..., dict[str, Tensor]], make_prompts: Callable[..., dict[str, Tensor]]
) -> None:
    audio, prompts = make_audio([3000, 1700], [900]), make_prompts([40], [40])
    answers = model.generate(**prompts, **audio, target_length=20, max_new_tokens=5)
    transcripts = model.ctc_transcribe(**audio)
    with SecondDevice():
        moved = move(copy.deepcopy(model))
        inputs = there(prompts | audio)
        assert moved.generate(**inputs, target_length=20, max_new_tokens=5).held.tolist() == answers.tolist()
        assert moved.ctc_transcribe(**there(audio)) == transcripts
