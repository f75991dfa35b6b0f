"""Speech-XL's summaries: what the language model's cache keeps of a recording is a few tokens of its own making.

A recording's embeddings are cut into intervals. In each, one summary token follows every `ratio` embeddings. Summary
tokens share one embedding, and in every layer they have query, key and value projections of their own. When the
language model has read an interval, only the keys and values of its summary tokens stay; their keys are rotated to
consecutive positions. Text stays whole.

The same is computed in two ways. `SpeechSummary.read_recording` goes interval by interval and keeps the cache small:
it answers. `SpeechSummary.read_in_one_pass` reads whole prompts at once, in which every summary token has two keys,
one for its own interval and one for what comes later: it trains. After Sun et al., "Speech-XL" (2026), of which little
is published, and its relatives Activation Beacon and Video-XL; see docs/speech-xl.md.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .intervals_fastlongspeech import interleave, lay_out, see, summary_columns
from .windows_fastlongspeech import summary_intervals

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# What trains and is saved beside adapters: the last parts of the parameters' names.
SUMMARY_MODULES = ("summary_embedding", *(f"summary_{name}" for name in PROJECTIONS))
# Positions that are scaled by the length of the prompt would differ between an interval and the whole.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class SummaryPass:
    """What attention has to know of the summary tokens among its input.

    Attributes:
        mask: `(B, N)` bool, True where a summary token stands.
        columns: `(B, S)` int64, in one pass: where they stand, padded with any place.
        rotation: in one pass: cosine and sine `(B, S, d)`, float32, of the angle from each one's position in its
            interval to its position in the memory.
    """

    mask: Tensor
    columns: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


class SummaryAttention:
    """Attention of a language model in which summary tokens have their own projections."""

    config: Any
    layer_idx: int
    head_dim: int

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        summary: SummaryPass | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what the parent class does; with `summary`, the same with the projections of summary tokens."""
        if summary is None:
            parent: Any = super()
            return parent.forward(
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (self._project(name, hidden_states, summary.mask).view(heads) for name in PROJECTIONS)
        if hasattr(self, "q_norm"):  # Qwen3
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if summary.columns is not None and summary.rotation is not None:
            columns = summary.columns[:, None, :, None].expand(-1, key.shape[1], -1, self.head_dim)
            key = torch.cat((key, rotate(key.gather(2, columns), *summary.rotation)), dim=2)
            value = torch.cat((value, value.gather(2, columns)), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        heard, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(heard.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _project(self: Any, name: str, hidden_states: Tensor, mask: Tensor) -> Tensor:
        projected = getattr(self, name)(hidden_states)
        of_summaries = getattr(self, f"summary_{name}")(hidden_states[mask])
        return projected.masked_scatter(mask[..., None], of_summaries.to(projected.dtype))


class LlamaSummaryAttention(SummaryAttention, LlamaAttention):  # type: ignore[misc]
    pass


class MistralSummaryAttention(SummaryAttention, MistralAttention):
    pass


class Qwen2SummaryAttention(SummaryAttention, Qwen2Attention):
    pass


class Qwen3SummaryAttention(SummaryAttention, Qwen3Attention):
    pass


ATTENTIONS: dict[type, type] = {
    LlamaAttention: LlamaSummaryAttention,
    MistralAttention: MistralSummaryAttention,
    Qwen2Attention: Qwen2SummaryAttention,
    Qwen3Attention: Qwen3SummaryAttention,
}


class SpeechSummary:
    """What a host's inner model gets: `add_summary`, and the two ways to read recordings and sum them up."""

    config: Any
    language_model: Any
    summary_embedding: nn.Embedding

    def add_summary(self, interval: int) -> None:
        """Gives every layer projections for summary tokens, copies of its own, and one embedding: the tokens' mean.

        What was trained of these before is lost.

        Args:
            interval: embeddings of a recording that are summed up together, 1 or more.

        Raises:
            ValueError: the language model is of a kind that this can't be done with, or `interval` is below 1.
        """
        if interval < 1:
            raise ValueError(f"interval must be a positive number of frames, got {interval}; 720 is a good one.")
        check_language_model(self.language_model)
        for layer in self.language_model.layers:
            own = layer.self_attn
            if not isinstance(own, SummaryAttention):
                with torch.device("meta"):  # its modules are replaced at once
                    layer.self_attn = ATTENTIONS[type(own)](own.config, own.layer_idx).train(own.training)
                for name, module in own.named_children():
                    setattr(layer.self_attn, name, module)
            for name in PROJECTIONS:
                setattr(layer.self_attn, f"summary_{name}", copy.deepcopy(getattr(layer.self_attn, name)))
        tokens = self.language_model.get_input_embeddings().weight
        self.summary_embedding = nn.Embedding(1, tokens.shape[1], device=tokens.device, dtype=tokens.dtype)
        with torch.no_grad():
            self.summary_embedding.weight.copy_(tokens.float().mean(0, keepdim=True))
        self.config.summary_interval = interval

    def summary_ratio(self, compression: str | None, compression_ratio: Any) -> Any:
        """Returns the ratio that recordings are summed up with, None where they are not.

        Args:
            compression, compression_ratio: as in a call; absent: configured.

        Raises:
            ValueError: the model has no summary projections, or a ratio is given to another compression.
        """
        compression = self.config.compression if compression is None else compression
        if compression != "summary":
            if compression_ratio is not None:
                raise ValueError(
                    f'compression_ratio is for compression="summary", got {compression_ratio} with {compression!r}; '
                    "leave it out."
                )
            return None
        if not self.config.summary_interval:
            raise ValueError(
                'compression="summary" needs summary projections, which this model has none of; train them '
                "(fastlongspeech.train.summary), or take another compression."
            )
        if isinstance(compression_ratio, Tensor):  # one for each interval, from a data loader
            return compression_ratio.tolist()
        return self.config.compression_ratio if compression_ratio is None else compression_ratio

    # By intervals, with a cache

    def read_tokens(self, cache: Any, embeddings: Tensor, summary_mask: Tensor | None = None) -> Tensor:
        """Returns the hidden states of more tokens of a prompt `(n, hidden)`, which its cache then holds as well.

        Raises:
            ValueError: gradient checkpointing is on, under which transformers drops the cache.
        """
        language_model = self.language_model
        if language_model.training and language_model.layers[0].gradient_checkpointing:
            raise ValueError(
                "recordings can't be summed up by intervals under gradient checkpointing, which drops the cache; call "
                "model.eval() to answer, or the model itself with labels to train."
            )
        read = cache.get_seq_length()
        options = {} if summary_mask is None else {"summary": SummaryPass(summary_mask[None])}
        return language_model(
            inputs_embeds=embeddings[None],
            position_ids=torch.arange(read, read + len(embeddings), device=embeddings.device)[None],
            past_key_values=cache,
            use_cache=True,
            **options,
        ).last_hidden_state[0]

    def read_recording(self, cache: Any, embeddings: Tensor, ratio: int | Sequence[int]) -> Iterator[Tensor]:
        """Reads a recording, and yields the hidden states of each interval; the cache keeps their summaries alone.

        Args:
            cache: a `DynamicCache` of one prompt.
            embeddings: the recording's, `(n, hidden)`.
            ratio: embeddings for each summary token, one for all intervals or one for each.
        """
        for start, stop, of_interval in summary_intervals(len(embeddings), self.config.summary_interval, ratio):
            source, mask = interleave(stop - start, of_interval, embeddings.device)
            tokens = self._with_summaries(embeddings[start:stop], source)
            kept = cache.get_seq_length()
            states = self.read_tokens(cache, tokens, mask)
            compact(cache, kept, mask, self.language_model.rotary_emb.inv_freq)
            yield states

    # In one pass, without one

    def read_in_one_pass(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, placeholders: Tensor, ratio: Any, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Returns the hidden states of prompts as if each recording had been read by intervals, `(B, S, hidden)`.

        A mask of `(N, N + S)` for every prompt, N its tokens with its S summary tokens, makes this a thing for
        training on minutes; answers about hours come by intervals.

        Args:
            inputs_embeds: `(B, S, hidden)`, the recordings' embeddings in their places.
            attention_mask: `(B, S)`, 1 where a prompt has a token; None: everywhere.
            placeholders: `(B, S)` bool, True where a recording's embeddings stand.
            ratio: an integer, or one for every interval of a recording, the same in all recordings.
            kwargs: for the language model.
        """
        language_model = self.language_model
        implementation = language_model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f'attn_implementation {implementation!r} takes no mask of its own; load the model with "sdpa" or '
                '"eager" to train on summaries.'
            )
        real = torch.ones_like(placeholders) if attention_mask is None else attention_mask.bool()
        layouts = [
            lay_out(*row, self.config.summary_interval, ratio)
            for row in zip(real.cpu(), placeholders.cpu(), strict=True)
        ]
        device, width = inputs_embeds.device, max(len(layout.source) for layout in layouts)
        # Padding on the right, in an interval of its own, -2, that nothing else sees.
        source, interval, position, rank = (
            torch.stack([nn.functional.pad(part, (0, width - len(part)), value=fill) for part in parts])
            for parts, fill in zip(zip(*layouts, strict=True), (0, -2, 0, 0), strict=True)
        )
        summaries = source < 0
        columns, valid = summary_columns(summaries)
        seen, remembered = see(interval, columns, valid)
        mask = torch.cat((seen, remembered), dim=2)[:, None].to(device)
        if implementation == "eager":
            lowest = torch.finfo(inputs_embeds.dtype).min
            mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(~mask, lowest)
        moved = (rank - position).gather(1, columns).to(device)
        rotation = angles(moved, language_model.rotary_emb.inv_freq)
        source = source.to(device)
        tokens = torch.stack(
            [self._with_summaries(row, places) for row, places in zip(inputs_embeds, source, strict=True)]
        )
        outputs = language_model(
            inputs_embeds=tokens,
            position_ids=position.to(device),
            attention_mask=mask,
            use_cache=False,
            summary=SummaryPass(summaries.to(device), columns.to(device), rotation),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        # Back to the prompts' own places; what padding was stays zero.
        there = (interval != -2) & ~summaries
        row, column = there.nonzero(as_tuple=True)
        own = source.cpu()[row, column]
        states = torch.zeros_like(inputs_embeds, dtype=hidden.dtype)
        states = states.index_put((row.to(device), own.to(device)), hidden[row.to(device), column.to(device)])
        return BaseModelOutputWithPast(last_hidden_state=states)

    def _with_summaries(self, embeddings: Tensor, source: Tensor) -> Tensor:
        """Returns the embeddings `(n, hidden)` in new places `(N,)`, that of summary tokens where it is -1."""
        summary = self.summary_embedding(torch.zeros(1, dtype=torch.int64, device=embeddings.device))
        return torch.where((source < 0)[:, None], summary.to(embeddings.dtype), embeddings[source.clamp(min=0)])


def check_language_model(language_model: Any) -> None:
    """Raises a ValueError unless summaries work with this language model."""
    config = language_model.config
    layers = getattr(language_model, "layers", None)
    known = (*ATTENTIONS, *ATTENTIONS.values())
    if not layers or not all(type(getattr(layer, "self_attn", None)) in known for layer in layers):
        raise ValueError(
            'compression="summary" works with language models of the types llama, mistral, qwen2 and qwen3, got '
            f"{config.model_type!r}; take another compression."
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        raise ValueError(
            'compression="summary" needs a language model that attends to all that it has read, and this one has '
            f"a sliding window of {config.sliding_window}; take another compression."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ValueError(
            f'compression="summary" needs rotary positions of the types {", ".join(ROPE_TYPES)}, got {rope!r}, whose '
            "angles depend on the prompt's length; take another compression."
        )


def compact(cache: Any, first: int, mask: Tensor, inverse_frequencies: Tensor) -> None:
    """Keeps of the tokens that a cache has got since its length was `first` those of a mask, at consecutive positions.

    Rotations compose, R(new - old) R(old) = R(new): the keys are rotated on, in float32.

    Args:
        cache: a `DynamicCache` of one prompt; its keys are rotated.
        first: what it held before.
        mask: `(n,)` bool, which of the n tokens since then stay.
        inverse_frequencies: `(d / 2,)`, of the rotary positions.
    """
    stay = mask.nonzero()[:, 0]
    moved = torch.arange(len(stay), device=stay.device) - stay
    cos, sin = angles(moved[None], inverse_frequencies)
    for layer in cache.layers:
        keys = rotate(layer.keys[:, :, first + stay], cos, sin)
        layer.keys = torch.cat((layer.keys[:, :, :first], keys), dim=2)
        layer.values = torch.cat((layer.values[:, :, :first], layer.values[:, :, first + stay]), dim=2)


def angles(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine `(..., d)`, float32, of rotary positions `(...)`, which may be negative."""
    angle = positions[..., None].float() * inverse_frequencies.float()
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns keys `(B, heads, S, d)` rotated by angles `(B, S, d)`, computed in float32."""
    exact = keys.float()
    return (exact * cos[:, None] + rotate_half(exact) * sin[:, None]).to(keys.dtype)


__all__ = ["SUMMARY_MODULES", "SpeechSummary", "SummaryAttention", "compact"]
