"""A picture of what a model keeps of a recording: its waveform, how much text each moment carries, and its tokens.

    from fastlongspeech.app.picture import draw
    from fastlongspeech.app.session import Session

    session = Session()
    draw(session, session.listen("interview.mp3"), target_length=200).savefig("interview.png")

Every token that the language model reads is a block, as wide as the time that it stands for. Where nothing is said, or
the same goes on, blocks are wide; where much is said they are narrow.
"""

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from .session import Heard, Session
from .subtitles import clock

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_SECONDS = 30.0  # a longer recording takes more rows, up to MOST_ROWS, whose seconds then grow with it
MOST_ROWS = 6
LIGHT = {"paper": "#ffffff", "ink": "#1f2933", "wave": "#7b8794", "density": "#c2410c", "edge": "#ffffff"}
DARK = {"paper": "#0b0f19", "ink": "#e4e7eb", "wave": "#7b8794", "density": "#fb923c", "edge": "#0b0f19"}


def draw(
    session: Session, heard: Heard, target_length: int | None = None, recording: int = 0, dark: bool = False
) -> "Figure":
    """Returns a figure with the waveform, the content density (Eq. 3) and the spans of one recording.

    The encoder has no part in it. Save it with `savefig`, as PNG, SVG or PDF.

    Args:
        session: who listened.
        heard: what `listen` returned.
        target_length: L, frames to fuse the recording to; None: configured.
        recording: number of the recording in `heard`.
        dark: whether it is drawn light on dark.

    Raises:
        ValueError: `target_length` is not a positive integer.
    """
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    colours, known = DARK if dark else LIGHT, heard.recordings[recording]
    encoded = heard.encoded[recording]
    density = session.model.density(encoded.frames).float().cpu().numpy()
    audio = session.model.compress(encoded, target_length)
    spans = audio.spans.cpu().numpy()
    starts, ends = encoded.starts.numpy(), encoded.ends.numpy()
    shades = colormaps["viridis"](0.1 + 0.9 * span_densities(spans, starts, density))
    loudness = heard.loudness[recording]

    rows = min(MOST_ROWS, ceil(known.seconds / ROW_SECONDS)) or 1
    width = known.seconds / rows
    figure = Figure(figsize=(10, 0.75 + 1.15 * rows), facecolor=colours["paper"], layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, ax in enumerate(axes):
        left, right = row * width, (row + 1) * width
        shown = (starts < right) & (ends > left)
        # Three bands, one above the other: waveform 2 to 3, density 1 to 2, blocks 0 to 0.9.
        wave_at = (np.arange(len(loudness)) + 0.5) * known.seconds / len(loudness)
        here = (wave_at >= left) & (wave_at <= right)
        wave = 0.45 * loudness[here] / max(float(loudness.max()), 1e-9)
        ax.fill_between(wave_at[here], 2.5 - wave, 2.5 + wave, color=colours["wave"], linewidth=0)
        ax.fill_between(
            (starts[shown] + ends[shown]) / 2,
            1.05,
            1.05 + 0.85 * density[shown],
            color=colours["density"],
            linewidth=0,
        )
        blocks = (spans[:, 0] < right) & (spans[:, 1] > left)
        boxes = [[(a, 0), (b, 0), (b, 0.9), (a, 0.9)] for a, b in spans[blocks]]
        ax.add_collection(PolyCollection(boxes, facecolors=shades[blocks], edgecolors=colours["edge"], linewidths=0.4))
        ax.set(xlim=(left, right), ylim=(0, 3), yticks=[0.45, 1.45, 2.5])
        ax.set_yticklabels([f"{len(spans)} tokens" if row == 0 else "tokens", "density", "sound"], fontsize=7)
        ax.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
        ax.tick_params(colors=colours["ink"], labelsize=7, length=2)
        ax.set_facecolor(colours["paper"])
        for side in ax.spines.values():
            side.set_visible(False)
    figure.suptitle(
        f"{clock(known.seconds)} min: {known.frames} frames, {len(spans)} tokens for the language model",
        color=colours["ink"],
        fontsize=9,
    )
    return figure


def span_densities(spans: np.ndarray, starts: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Returns the mean density of the frames that each span stands for, `(L,)` in [0, 1].

    Args:
        spans: `(L, 2)`, seconds, without gaps between them.
        starts: `(T,)`, the second that each frame starts at.
        density: `(T,)`.
    """
    first = np.searchsorted(starts, spans[:, 0] - 1e-3)  # spans are float32
    sums = np.add.reduceat(density, first)
    return np.clip(sums / np.diff(np.append(first, len(starts))), 0, 1)


__all__ = ["draw"]
