"""Audio placeholders: the runs of one token that keep a recording's place in a prompt, one token for every frame."""

import torch
from torch import Tensor

TRANSCRIBE = "Transcribe the speech to text without explanation:"  # the paper's instruction


def placeholder_runs(placeholders: Tensor, recordings: int) -> Tensor:
    """Returns the length of every run of placeholders, `(A,)`, in reading order.

    Args:
        placeholders: `(B, S)` bool, True where a prompt holds an audio placeholder.
        recordings: A.

    Raises:
        ValueError: there are more or fewer runs than recordings.
    """
    run = _run_starts(placeholders).flatten().cumsum(0)[placeholders.flatten()] - 1
    runs = run.bincount()
    if len(runs) != recordings:
        raise ValueError(
            f"The prompts have {len(runs)} runs of audio placeholders for {recordings} recordings; give every "
            "recording a run of its own, and pass windows_per_audio where one has several windows."
        )
    return runs


def check_placeholders(runs: Tensor, audio_lengths: Tensor) -> None:
    """Raises a ValueError unless every recording has as many embeddings as placeholders, both `(A,)`."""
    runs, audio_lengths = runs.cpu(), audio_lengths.cpu()
    if not torch.equal(runs, audio_lengths):
        wrong = int((runs != audio_lengths).nonzero()[0])
        raise ValueError(
            f"Recording {wrong} has {int(runs[wrong])} audio placeholders for {int(audio_lengths[wrong])} frames; "
            "prepare the prompt with the same target_length and compression as the model is called with."
        )


def resize_placeholders(
    input_ids: Tensor, attention_mask: Tensor, placeholders: Tensor, audio_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns prompts, left padded, and their mask, in which every run of placeholders has the length given.

    Args:
        input_ids, attention_mask: `(B, S)`.
        placeholders: `(B, S)` bool, True where `input_ids` holds an audio placeholder.
        audio_lengths: `(A,)`, the new length of every run in reading order.
    """
    repeats = (~placeholders).long().masked_scatter(_run_starts(placeholders), audio_lengths.to(input_ids.device))
    totals = repeats.sum(1)
    width = int(totals.max())
    valid = torch.arange(width, device=input_ids.device) >= width - totals[:, None]

    def resize(values: Tensor) -> Tensor:
        resized = values.flatten().repeat_interleave(repeats.flatten())
        return values.new_zeros(valid.shape).masked_scatter(valid, resized)

    input_ids, attention_mask = resize(input_ids), resize(attention_mask)
    padding = int(attention_mask.any(0).long().argmax())  # columns that no prompt needs any more
    return input_ids[:, padding:], attention_mask[:, padding:]


def insert_audio(inputs_embeds: Tensor, placeholders: Tensor, embeddings: Tensor) -> Tensor:
    """Returns `inputs_embeds (B, S, hidden)` with the placeholders `(B, S)` replaced by `embeddings (N, hidden)`."""
    mask = placeholders[..., None].to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(mask, embeddings.to(inputs_embeds.device, inputs_embeds.dtype))


def _run_starts(placeholders: Tensor) -> Tensor:
    follows = torch.zeros_like(placeholders)
    follows[:, 1:] = placeholders[:, :-1]
    return placeholders & ~follows


__all__ = ["check_placeholders", "insert_audio", "placeholder_runs", "resize_placeholders"]
