"""Recordings that are encoded once and asked about any number of times: kept, chosen from, saved and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastlongspeech import EncodedRecordings, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from fastlongspeech.compression_fastlongspeech import COMPRESSIONS

Model = FastLongSpeechForConditionalGeneration
Make = Callable[..., Any]


@pytest.fixture
def audio(make_audio: Make) -> dict[str, Tensor]:
    """Two recordings: of two windows, 376 frames, and of one, 40 frames."""
    return make_audio([503, 1001], [160])


@pytest.fixture
def silent_encoder(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from there on the encoder may not be used."""

    def forbid() -> None:
        monkeypatch.setattr(model.model.audio_tower, "forward", lambda *_: pytest.fail("the encoder was asked"))

    return forbid


def test_encoding_gives_every_frame_with_its_seconds(model: Model, audio: dict[str, Tensor]) -> None:
    """Frames last 40 ms; a window that is not the last ends where its audio ends, and the next goes on from there."""
    recordings = model.encode(**audio)
    assert len(recordings) == 2 and recordings.lengths.tolist() == [126 + 250, 40]
    assert recordings.frames.shape == (416, 16)
    first, second = recordings.starts[:376].tolist(), recordings.starts[376:].tolist()
    expected = [4 * frame / 100 for frame in range(126)] + [(503 + 4 * frame) / 100 for frame in range(250)]
    assert first == expected and second == expected[:40]
    torch.testing.assert_close(recordings.ends, recordings.starts + 0.04)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "none"])
def test_an_encoded_recording_is_compressed_as_its_features_are(
    model: Model, audio: dict[str, Tensor], compression: str
) -> None:
    whole = model.get_audio_features(**audio, target_length=30, compression=compression)
    again = model.compress(model.encode(**audio), 30, compression)
    for name in ("last_hidden_state", "pooler_output", "audio_lengths", "spans"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_audio_features_are_what_transformers_expects_of_them(model: Model, audio: dict[str, Tensor]) -> None:
    features = model.get_audio_features(**audio, target_length=30)
    assert isinstance(features, BaseModelOutputWithPooling)
    assert features.last_hidden_state.shape == (60, 16) and features.pooler_output.shape == (60, 24)
    projected = model.model.multi_modal_projector(features.last_hidden_state)
    torch.testing.assert_close(features.pooler_output, projected)
    as_tuple = model.get_audio_features(**audio, target_length=30, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], features.last_hidden_state)


def test_the_density_is_one_less_the_probability_of_the_blank(model: Model, audio: dict[str, Tensor]) -> None:
    frames = model.encode(**audio).frames
    logits = model.model.ctc_decoder(model.model.audio_tower.layer_norm(frames))
    torch.testing.assert_close(model.density(frames), 1 - logits.softmax(-1)[:, -1], rtol=1e-4, atol=1e-6)
    model.config.content_density = "uniform"
    assert torch.equal(model.density(frames), torch.ones(416))


def test_a_second_question_and_another_length_cost_no_encoder(
    model: Model, audio: dict[str, Tensor], make_prompts: Make, silent_encoder: Callable[[], None]
) -> None:
    asked = [(make_prompts([20], [20]), None), (make_prompts([1], [1]), 33), (make_prompts([7], [9]), 12)]
    expected = [
        model.generate(**audio, **prompts, target_length=length, max_new_tokens=5) for prompts, length in asked
    ]
    logits = model(**audio, **asked[0][0]).logits
    recordings = model.encode(**audio)
    silent_encoder()
    for (prompts, length), answers in zip(asked, expected, strict=True):
        again = model.generate(**prompts, recordings=recordings, target_length=length, max_new_tokens=5)
        assert torch.equal(again, answers)
    assert torch.equal(model(**asked[0][0], recordings=recordings).logits, logits)


def test_a_batch_of_questions_shares_one_recording(
    model: Model, make_audio: Make, make_prompts: Make, silent_encoder: Callable[[], None]
) -> None:
    """Fused once for every length that the prompts' placeholders ask for."""
    audio = make_audio([900])
    prompts = [make_prompts([20]), make_prompts([], [20]), make_prompts([], [], [9])]
    prompts = [{name: rows[-1:] for name, rows in prompt.items()} for prompt in prompts]
    one_by_one = [model.generate(**audio, **prompt, max_new_tokens=5)[0, -5:] for prompt in prompts]
    together = make_prompts([20], [20], [9])
    recordings = model.encode(**audio)
    silent_encoder()
    answers = model.generate(**together, recordings=recordings, max_new_tokens=5)
    assert torch.equal(answers[:, -5:], torch.stack(one_by_one))


def test_some_of_the_recordings_and_all_of_them_again(model: Model, make_audio: Make) -> None:
    recordings = model.encode(**make_audio([503, 1001], [160], [3]))
    assert [len(recordings[key]) for key in (0, -1, slice(1, 3), [2, 0, 0])] == [1, 1, 2, 3]
    assert recordings[[2, 0]].lengths.tolist() == [1, 376]
    assert torch.equal(recordings[1].frames, recordings.frames[376:416])
    joined = EncodedRecordings.cat([recordings[0], recordings[1:]])
    assert torch.equal(joined.frames, recordings.frames) and joined.audio == recordings.audio
    with pytest.raises(IndexError):
        recordings[3]


def test_pieces_are_cut_by_seconds(model: Model, make_audio: Make) -> None:
    recordings = model.encode(**make_audio([3000, 3000, 300], [500]))
    pieces = recordings.pieces(30)
    assert pieces.lengths.tolist() == [750, 750, 75, 125]
    assert [float(part.starts[0]) for part in (pieces[0], pieces[1], pieces[2], pieces[3])] == [0, 30, 60, 0]


def test_saved_recordings_answer_alike(
    model: Model, audio: dict[str, Tensor], make_prompts: Make, tmp_path: Path, silent_encoder: Callable[[], None]
) -> None:
    recordings = model.encode(**audio)
    recordings.save(tmp_path / "interview.safetensors")
    with pytest.raises(FileNotFoundError, match="is in a folder that does not exist; make .*absent first"):
        recordings.save(tmp_path / "absent" / "interview.safetensors")
    silent_encoder()
    loaded = EncodedRecordings.load(tmp_path / "interview.safetensors")
    for name in ("frames", "starts", "ends", "lengths"):
        assert torch.equal(getattr(loaded, name), getattr(recordings, name))
    assert (loaded.encoder, loaded.audio) == (recordings.encoder, recordings.audio)
    answers = [model.generate(**make_prompts([9], [9]), recordings=r, max_new_tokens=4) for r in (recordings, loaded)]
    assert torch.equal(*answers)
    assert [path.name for path in tmp_path.iterdir()] == ["interview.safetensors"]


def test_what_was_heard_and_what_heard_it_have_fingerprints(model: Model, make_audio: Make, make_model: Make) -> None:
    """The same audio has the same in any batch; the same weights have the same in bfloat16."""
    both = model.encode(**make_audio([503, 1001], [160]))
    assert len(set(both.audio)) == 2
    again = model.encode(**make_audio([503, 1001], [160]))
    assert again.audio == both.audio and again.encoder == both.encoder
    assert model.encode(**make_audio([503, 1001], [161])).audio[1] != both.audio[1]
    assert make_model().bfloat16().fingerprint() == both.encoder
    with torch.no_grad():
        model.model.audio_tower.layers[1].fc1.weight.mul_(1.02)
    assert model.fingerprint() != both.encoder


def test_recordings_of_another_model_are_refused(model: Model, audio: dict[str, Tensor], make_prompts: Make) -> None:
    recordings = model.encode(**audio)
    torch.nn.init.normal_(model.model.audio_tower.conv1.weight)
    for use in (
        lambda: model.compress(recordings),
        lambda: model.generate(**make_prompts([9], [9]), recordings=recordings),
        lambda: model.ctc_transcribe(recordings=recordings),
    ):
        with pytest.raises(ValueError, match="encoded by another model, .* encode them again"):
            use()
    with pytest.raises(ValueError, match="of one encoder to be joined, got those of 2"):
        EncodedRecordings.cat([recordings, model.encode(**audio)])


def test_a_model_in_half_precision_reads_what_one_in_float32_has_encoded(
    model: Model, audio: dict[str, Tensor], make_model: Make
) -> None:
    recordings = model.encode(**audio)
    half = make_model().bfloat16()
    expected = model.compress(recordings, compression="none").pooler_output
    found = half.compress(recordings, compression="none").pooler_output
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def test_transcripts_come_from_encoded_recordings_too(model: Model, audio: dict[str, Tensor]) -> None:
    assert model.ctc_transcribe(recordings=model.encode(**audio)) == model.ctc_transcribe(**audio)
    with pytest.raises(ValueError, match="input_features are missing"):
        model.ctc_transcribe()


def test_files_that_hold_no_recordings_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recordings were not found: .*none.safetensors is no file"):
        EncodedRecordings.load(tmp_path / "none.safetensors")
    save_file({"frames": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no encoded recordings; write them with save\(\)"):
        EncodedRecordings.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:30])
    with pytest.raises(ValueError, match="cut.safetensors can't be read as encoded recordings"):
        EncodedRecordings.load(tmp_path / "cut.safetensors")


def test_features_and_recordings_together_are_refused(
    model: Model, audio: dict[str, Tensor], make_prompts: Make, processor: FastLongSpeechProcessor
) -> None:
    recordings = model.encode(**audio)
    with pytest.raises(ValueError, match="either input_features or recordings .*, got both"):
        model(**audio, **make_prompts([9], [9]), recordings=recordings)
    with pytest.raises(ValueError, match="pass either audio or recordings .*, got both"):
        processor(text="<|AUDIO|>?", audio="a.wav", recordings=recordings)
    with pytest.raises(ValueError, match="The prompts have 3 runs of audio placeholders for 2 recordings"):
        model.generate(**make_prompts([9], [9], [9]), recordings=recordings)


def test_the_processor_sizes_prompts_for_encoded_recordings(
    checkpoint: Path, make_audio: Make, processor: FastLongSpeechProcessor
) -> None:
    """A chat names a recording by an audio part without a source."""
    model = Model.from_pretrained(checkpoint)
    speech = torch.randn(1, 80, 3000), (torch.arange(3000) < 1000)[None].long()
    recordings = model.encode(*speech)
    chats = [
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}]
        for question in ("Who?", "Where?")
    ]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chats, **options, recordings=recordings, target_length=40)
    assert (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist() == [40, 40]
    assert "input_features" not in inputs
    answers = model.generate(**inputs, recordings=recordings, max_new_tokens=3)
    assert answers.shape == (2, inputs["input_ids"].shape[1] + 3)
    every = processor.apply_chat_template(chats[:1], **options, recordings=recordings, compression="none")
    assert (every["input_ids"] == processor.audio_token_id).sum() == 250
