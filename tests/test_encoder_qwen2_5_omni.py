"""Qwen2.5-Omni's chunks to frames as the stock encoder makes them, in batches."""

import pytest
import torch
from qwen2_5_omni import CHUNK, MEL_BINS, tiny_fields
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from fastlongspeech.encoder_qwen2_5_omni_fastlongspeech import FastLongSpeechQwen2_5OmniEncoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_batch_of_chunks_gives_the_frames_that_the_stock_encoder_makes_of_each(attention: str) -> None:
    """Whole chunks, short ones and odd ones; what lies in the padding does not matter."""
    config = Qwen2_5OmniThinkerConfig(**tiny_fields()).audio_config
    torch.manual_seed(0)
    stock = Qwen2_5OmniAudioEncoder._from_config(config, attn_implementation=attention).eval()
    ours = FastLongSpeechQwen2_5OmniEncoder._from_config(config, attn_implementation=attention).eval()
    ours.load_state_dict(stock.state_dict())
    before_norm: list[torch.Tensor] = []
    stock.ln_post.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))

    lengths = torch.tensor([CHUNK, 3, CHUNK - 1, CHUNK - 2, 51, 4, CHUNK])
    features = torch.randn(len(lengths), MEL_BINS, CHUNK)
    for batch in (features, features.masked_fill(torch.arange(CHUNK) >= lengths[:, None, None], 7.0)):
        frames = ours(batch, lengths).last_hidden_state
        for row, length in enumerate(lengths.tolist()):
            stock(features[row, :, :length], feature_lens=lengths[row : row + 1])
            expected = before_norm.pop()
            torch.testing.assert_close(frames[row, : len(expected)], expected, rtol=0, atol=1e-5)
            assert len(expected) == ours.windows.count_frames(length)


def test_chunks_whose_frames_would_be_pooled_with_their_neighbours_are_refused() -> None:
    fields = tiny_fields()
    fields["audio_config"]["n_window"] = 25
    with pytest.raises(ValueError, match="n_window must be even, got 25"):
        FastLongSpeechQwen2_5OmniEncoder(Qwen2_5OmniThinkerConfig(**fields).audio_config)
