"""How audio enters a prompt: placeholders, the embeddings that replace them, and `generate` on prompts that hold both.

A prompt keeps a recording's place by a run of one token, the placeholder, one for every frame that is left of it.
There is one path from recordings to a prompt, and all take it: `forward` (`hear`, then `insert_audio`), `generate` and
evaluation (`hear`, then `embed_prompts`, which fits the runs to any length).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import logging

from .extractor_fastlongspeech import FastLongSpeechAudioOutput, SpeechExtractor

logger = logging.get_logger(__name__)

TRANSCRIBE = "Transcribe the speech to text without explanation:"  # the paper's instruction
AUDIO_FEATURES = ("input_features", "feature_attention_mask", "windows_per_audio")
AUDIO_INPUTS = (*AUDIO_FEATURES, "recordings", "target_length", "compression", "compression_ratio")


def hear(extractor: SpeechExtractor, placeholders: Tensor, resize: bool, **audio_inputs: Any) -> Any:
    """Returns the recordings that prompts hold as embeddings, those of one run of placeholders after the other.

    Args:
        extractor: the model that hears.
        placeholders: `(B, S)` bool, True where a prompt holds a placeholder.
        resize: whether the caller can fit the placeholders to other lengths.
        audio_inputs: any of `AUDIO_INPUTS`: features of recordings, or `recordings`, what `encode` returned for them.
            One such recording may be shared by several runs. Without `target_length`, a recording is fused to the
            number of its placeholders.

    Raises:
        ValueError: there are more or fewer recordings than runs, or, unless `resize`, their lengths differ from them.
    """
    features: list[Any] = [audio_inputs.get(name) for name in AUDIO_FEATURES]
    recordings = audio_inputs.get("recordings")
    target_length, compression = audio_inputs.get("target_length"), audio_inputs.get("compression")
    runs = placeholder_runs(placeholders)
    if recordings is None:
        heard = len(features[0] if features[2] is None else features[2])
    elif features[0] is not None:
        raise ValueError("give either input_features or recordings that are encoded already, got both.")
    elif hasattr(recordings, "openings"):
        raise ValueError("recordings that are summed up are for generate alone; give here what encode returned.")
    else:
        heard = len(recordings)
    shared = recordings is not None and heard == 1
    if len(runs) != heard and not (shared and len(runs)):
        raise ValueError(
            f"The prompts have {len(runs)} runs of audio placeholders for {heard} recordings; give every recording a "
            "run of its own, and pass windows_per_audio where one has several windows."
        )
    if recordings is None:
        recordings = extractor._encode(features[0], features[1], features[2])
    sized = target_length is None and not (resize and extractor.compression_or_default(compression) == "none")
    lengths = runs if sized else target_length
    if len(runs) == heard:
        audio = extractor.compress(recordings, lengths, compression)
    else:
        audio = _share(extractor, recordings, lengths, compression, len(runs))
    if sized or not resize:
        check_placeholders(runs, audio.audio_lengths)
    return audio


def _share(extractor: SpeechExtractor, recordings: Any, lengths: Any, compression: str | None, runs: int) -> Any:
    """Returns one recording for several runs of placeholders, fused once for every length that they ask for."""
    wanted = [None] * runs if lengths is None else torch.as_tensor(lengths).expand(runs).tolist()
    of_length = {length: extractor.compress(recordings, length, compression) for length in dict.fromkeys(wanted)}
    parts = [of_length[length] for length in wanted]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return FastLongSpeechAudioOutput(**joined)


def embed_prompts(
    embed: Callable[[Tensor], Tensor], audio_token_id: int, input_ids: Tensor, attention_mask: Tensor, audio: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns prompts with their audio: ids and mask `(B, S')`, left padded, and embeddings `(B, S', hidden)`.

    Args:
        embed: the language model's token embeddings.
        audio_token_id: the placeholder.
        input_ids, attention_mask: `(B, S)`; every run of placeholders is fitted to its recording, whatever its length.
        audio: what `hear` or `compress` returned for the runs, in reading order; None for prompts of text alone.
    """
    embeddings = None if audio is None else audio.pooler_output
    placeholders = (input_ids == audio_token_id) & attention_mask.bool()
    lengths = placeholder_runs(placeholders) if audio is None else audio.audio_lengths
    input_ids, attention_mask = resize_placeholders(input_ids, attention_mask, placeholders, lengths)
    if embeddings is None:
        return input_ids, attention_mask, embed(input_ids)
    input_ids, attention_mask = input_ids.to(embeddings.device), attention_mask.to(embeddings.device)
    placeholders = (input_ids == audio_token_id) & attention_mask.bool()
    return input_ids, attention_mask, insert_audio(embed(input_ids), placeholders, embeddings)


def placeholder_runs(placeholders: Tensor) -> Tensor:
    """Returns the length of every run of placeholders, `(A,)`, in reading order.

    Args:
        placeholders: `(B, S)` bool, True where a prompt holds an audio placeholder.
    """
    run = _run_starts(placeholders).flatten().cumsum(0)[placeholders.flatten()] - 1
    return run.bincount()


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
        input_ids, attention_mask: `(B, S)`, padded on any side.
        placeholders: `(B, S)` bool, True where `input_ids` holds an audio placeholder.
        audio_lengths: `(A,)`, the new length of every run in reading order.
    """
    # Padding goes, text stays once, and the first placeholder of a run stands for the whole of it.
    repeats = (attention_mask.bool() & ~placeholders).long()
    repeats = repeats.masked_scatter(_run_starts(placeholders), audio_lengths.to(input_ids.device))
    totals = repeats.sum(1)
    width = int(totals.max())
    valid = torch.arange(width, device=input_ids.device) >= width - totals[:, None]

    def resize(values: Tensor) -> Tensor:
        resized = values.flatten().repeat_interleave(repeats.flatten())
        return values.new_zeros(valid.shape).masked_scatter(valid, resized)

    return resize(input_ids), valid.to(attention_mask.dtype)


def insert_audio(inputs_embeds: Tensor, placeholders: Tensor, embeddings: Tensor) -> Tensor:
    """Returns `inputs_embeds (B, S, hidden)` with the placeholders `(B, S)` replaced by `embeddings (N, hidden)`."""
    mask = placeholders[..., None].to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(mask, embeddings.to(inputs_embeds.device, inputs_embeds.dtype))


def _run_starts(placeholders: Tensor) -> Tensor:
    follows = torch.zeros_like(placeholders)
    follows[:, 1:] = placeholders[:, :-1]
    return placeholders & ~follows


class FastLongSpeechGenerationMixin(GenerationMixin):
    """`generate` on prompts that hold recordings, each fused to any length when it is called."""

    config: Any  # what the class mixed with has
    model: Any
    get_input_embeddings: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]  # all others by name, so that none slips by
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Returns the caller's `input_ids` followed by the answers, as any `generate` of transformers.

        `target_length` (any) and `compression` overrule what the processor prepared: the prompt's placeholders are
        resized inside. Without, every recording is fused to the number of its placeholders. With `recordings`, what
        `encode` returned, nothing is encoded again; one recording may be shared by all prompts. Prompts may be padded
        on any side.

        Raises:
            ValueError: placeholders and recordings do not fit, or a way to generate is asked for in which the
                recordings would not be heard.
        """
        parent: Any = super()
        tokenizer: Any = kwargs.get("tokenizer")
        if hasattr(tokenizer, "tokenizer"):  # stop strings need a processor's own
            kwargs["tokenizer"] = tokenizer.tokenizer
        audio_inputs = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        hears = audio_inputs["input_features"] is not None or audio_inputs["recordings"] is not None
        attention_mask = kwargs.get("attention_mask")
        padded_right = attention_mask is not None and attention_mask.ndim == 2 and not attention_mask[:, -1].all()
        if not hears and not padded_right:
            return parent.generate(inputs, generation_config, **kwargs)

        input_ids = kwargs.pop("input_ids", inputs)
        attention_mask = kwargs.pop("attention_mask", None)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        audio = None
        if hears:
            self._refuse_unheard(generation_config or self.generation_config, kwargs)
            placeholders = (input_ids == self.config.audio_token_id) & attention_mask.bool()
            audio = hear(self.model, placeholders, resize=True, **audio_inputs)
        resized, attention_mask, inputs_embeds = embed_prompts(
            self.get_input_embeddings(), self.config.audio_token_id, input_ids, attention_mask, audio
        )
        positions = self.prompt_positions(resized, attention_mask, kwargs)
        if positions is not None:
            kwargs["position_ids"] = positions
        self._warn_beyond_context(inputs_embeds.shape[1])
        return parent.generate(
            input_ids.to(inputs_embeds.device),
            generation_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **kwargs,
        )

    def prompt_positions(self, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> Tensor | None:
        """Returns positions of a host's own for prompts whose placeholders are fitted; None: those of transformers.

        Args:
            input_ids, attention_mask: `(B, S)`, the prompts as the language model reads them.
            options: what else `generate` was given.
        """
        return None

    @staticmethod
    def _refuse_unheard(generation_config: Any, options: dict[str, Any]) -> None:
        """Raises a ValueError where transformers would read the prompts again, without their recordings."""

        def asked(name: str) -> Any:
            value = options.get(name)
            return getattr(generation_config, name, None) if value is None else value

        if asked("prefill_chunk_size"):
            raise ValueError("prefill_chunk_size cannot split prompts that hold recordings; leave it out.")
        if asked("cache_implementation") == "paged":
            raise ValueError("cache_implementation='paged' would answer without the recordings; leave it out.")
        for name in ("assistant_model", "assistant_early_exit"):
            if asked(name) is not None:
                raise ValueError(
                    f"{name} would draft answers without hearing the recordings; leave it out, or speed answers up by "
                    "prompt_lookup_num_tokens."
                )

    def _warn_beyond_context(self, tokens: int) -> None:
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and tokens > context:
            logger.warning(
                f"The prompt has {tokens} tokens, more than the {context} of the language model's context, where its "
                "answers mean little; fuse the recordings to fewer frames with target_length (config.fit_length says "
                "how many fit)."
            )

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:
        """Lets `max_length` and `min_length` count the caller's ids, with embeddings handed on beside them."""
        if kwargs["input_ids_length"]:
            kwargs["model_input_name"] = "input_ids"
        parent: Any = super()
        return parent._prepare_generated_length(*args, **kwargs)


__all__ = ["TRANSCRIBE", "FastLongSpeechGenerationMixin", "embed_prompts", "hear", "insert_audio"]
