"""The picture shows the waveform, the density and every token as wide as the time that it stands for."""

from pathlib import Path

import numpy as np
import pytest
from conftest import speech
from PIL import Image

from fastlongspeech.app import cli
from fastlongspeech.app.picture import draw, span_densities
from fastlongspeech.app.session import Session, measure_loudness


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return Session(checkpoint)


@pytest.fixture(scope="module")
def heard(session):
    return session.listen([speech(2.0, seed=1), speech(70.0)])


def blocks(figure) -> list[tuple[float, float]]:
    """The left and right edge, in seconds, of every block that is drawn, each once."""
    paths = [path for ax in figure.axes for path in ax.collections[-1].get_paths()]
    return sorted({(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in paths})


@pytest.mark.parametrize("length", [40, 300, 5000])
def test_blocks_are_as_wide_as_the_time_of_each_token(session, heard, length):
    figure = draw(session, heard, length, recording=1)
    spans = session.model.compress(heard.encoded[1], length).spans.tolist()
    assert len(spans) == min(length, 1750)
    np.testing.assert_allclose(blocks(figure), spans, atol=1e-3)
    assert figure.axes[0].get_yticklabels()[0].get_text() == f"{len(spans)} tokens"


def test_rows_share_the_recording(session, heard):
    limits = [ax.get_xlim() for ax in draw(session, heard, recording=1).axes]
    np.testing.assert_allclose(limits, [(0, 70 / 3), (70 / 3, 140 / 3), (140 / 3, 70)])
    assert len(draw(session, heard).axes) == 1


def test_drawing_does_not_encode(session, heard, monkeypatch):
    monkeypatch.setattr(session.model, "encode", None)
    assert draw(session, heard, 20)


def test_a_block_has_the_mean_density_of_its_frames():
    starts, density = np.arange(6) * 0.04, np.array([0.0, 1.0, 0.5, 0.5, 0.2, 0.4])
    spans = np.array([[0, 0.08], [0.08, 0.16], [0.16, 0.24]], dtype=np.float32)
    np.testing.assert_allclose(span_densities(spans, starts, density), [0.5, 0.5, 0.3])


def test_loudness_is_that_of_the_loudest_sample():
    samples = np.zeros(60_000, dtype=np.float32)
    samples[[5, 25_000]] = -0.5, 0.25
    found = measure_loudness(samples)
    assert len(found) == 6000 and found[0] == 0.5 and found[2500] == 0.25 and found.sum() == 0.75
    assert measure_loudness(samples[:10]).tolist() == np.abs(samples[:10]).tolist()


def test_the_command_draws_a_file(checkpoint, wav, tmp_path, capsys):
    output = tmp_path / "a new folder" / "picture.png"
    command = ["show", str(wav), "--model", str(checkpoint), "--target-length", "12", "-o"]
    assert cli.main([*command, str(output)]) == 0
    assert "1.5 s, 1 window, 37 frames -> 12 tokens" in capsys.readouterr().err
    with Image.open(output) as image:
        assert image.width == 1500 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert cli.main([*command, str(output)]) == 1
    assert "picture.png exists already" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "picture.doc")]) == 1
    assert "must end in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_recording_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastlongspeech.app.session.Session", None)
    (tmp_path / "notes.wav").write_text("no audio")
    for name, message in (("notes.wav", "audio cannot be read"), ("none.wav", "audio file not found")):
        assert cli.main(["show", str(tmp_path / name), "-o", str(tmp_path / "folder" / "picture.png")]) == 1
        assert f"fastlongspeech: {message}" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_dark_pictures_are_light_on_dark(session, heard):
    light, dark = draw(session, heard), draw(session, heard, dark=True)
    assert light.get_facecolor()[:3] == (1, 1, 1) and max(dark.get_facecolor()[:3]) < 0.15
