"""Log-mel features of a whole recording, for hosts that normalise all of it together."""

from typing import Any

import numpy as np
import torch

BLOCK = 3000  # mel frames whose spectrum is held at a time


def log_mel(samples: np.ndarray, extractor: Any, device: str = "cpu") -> np.ndarray:
    """Returns the log-mel features of a recording, `(mels, T)` float32, T = samples / hop, rounded up.

    They are those of a `WhisperFeatureExtractor` that pads the recording with zeros. That one holds the spectrum of
    all that it is given, 600 MB for an hour; here it is made in blocks.

    Args:
        samples: float32 at the extractor's rate.
        extractor: a `WhisperFeatureExtractor`, for the sizes of its spectrum and its mel filters.
        device: where the spectrum is computed.
    """
    hop, taps = extractor.hop_length, extractor.n_fft
    frames = -(-len(samples) // hop)
    heard = frames + taps // hop  # the last of these still hear the recording, and may be the loudest
    behind = np.zeros(heard * hop + taps - len(samples), dtype=np.float32)
    samples = np.concatenate((samples, behind))
    samples = np.concatenate((samples[taps // 2 : 0 : -1], samples))  # a mirror before the start, as in torch.stft
    window = torch.hann_window(taps, device=device)
    filters = torch.from_numpy(extractor.mel_filters.T).to(device, torch.float32)
    features = np.empty((len(filters), heard), dtype=np.float32)
    for first in range(0, heard, BLOCK):
        last = min(first + BLOCK, heard)
        block = torch.from_numpy(samples[first * hop : (last - 1) * hop + taps]).to(device)
        spectrum = torch.stft(block, taps, hop, window=window, center=False, return_complex=True)
        features[:, first:last] = (filters @ spectrum.abs() ** 2).clamp(min=1e-10).log10().cpu().numpy()
    np.maximum(features, features.max() - 8.0, out=features)
    features += 4.0
    features /= 4.0
    return features[:, :frames]


__all__ = ["log_mel"]
