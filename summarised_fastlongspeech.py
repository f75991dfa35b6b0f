"""Recordings that the language model has summed up: kept, saved, asked again, and `generate` from them.

    kept = model.summarise(**inputs, compression_ratio=8)      # reads the prompt up to the end of its last recording
    model.generate(**inputs, recordings=kept)                  # and now no more than the question

Keys and values depend on all that was read before them, so what is kept is the prompt's opening: its text and its
recordings in their order. A prompt that begins alike goes on from there.
"""

import copy
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from .prompts_fastlongspeech import AUDIO_INPUTS, hear, resize_placeholders
from .recordings_fastlongspeech import fingerprint_weights, save_whole
from .windows_fastlongspeech import count_summaries

FORMAT = "fastlongspeech summaries 1"
TENSORS = ("tokens", "openings", "lengths")


@dataclass(frozen=True)
class SummarisedRecordings:
    """The openings of prompts, one after the other: text as it was read, and A recordings as their summary tokens.

    `len` is A.

    Attributes:
        tokens: `(N,)` int64 on the CPU, the openings' tokens, with a placeholder for each summary token.
        openings: `(B,)` int64 on the CPU, the tokens of each opening; 0 of a prompt without a recording.
        lengths: `(A,)` int64 on the CPU, the summary tokens of each recording.
        keys: for each layer `(heads, N, d)`, rotated to the tokens' positions in their openings.
        values: for each layer `(heads, N, d)`.
        model: a fingerprint of the language model that read them; None where nobody asked for it.
    """

    tokens: Tensor
    openings: Tensor
    lengths: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    model: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def cat(cls, summaries: Iterable["SummarisedRecordings"]) -> "SummarisedRecordings":
        """Returns the openings of several in one, for a batch of prompts.

        Raises:
            ValueError: there are none, or they were read by different models.
        """
        summaries = list(summaries)
        models = {part.model for part in summaries}
        if len(models) != 1:
            raise ValueError(f"summaries must be of one model to be joined, got those of {len(models)}.")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in summaries]) for name in TENSORS}
        for name in ("keys", "values"):
            layers = zip(*(getattr(part, name) for part in summaries), strict=True)
            joined[name] = tuple(torch.cat(layer, dim=1) for layer in layers)
        return cls(**joined, model=models.pop())

    def to(self, *args: Any, **kwargs: Any) -> "SummarisedRecordings":
        """Returns the same with keys and values moved or cast, as by `Tensor.to`."""
        keys, values = (tuple(layer.to(*args, **kwargs) for layer in kind) for kind in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def caches(self, config: Any) -> list[DynamicCache]:
        """Returns a cache for each opening, `config` being the language model's."""
        sizes = self.openings.tolist()
        caches = [DynamicCache(config=config) for _ in sizes]
        for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for cache, key, value in zip(caches, keys.split(sizes, dim=1), values.split(sizes, dim=1), strict=True):
                cache.update(key[None], value[None], number)
        return caches

    def save(self, path: str | os.PathLike) -> None:
        """Writes the summaries into a safetensors file; see `save_whole`."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        for name in ("keys", "values"):
            tensors |= {f"{name}.{n}": part.cpu().contiguous() for n, part in enumerate(getattr(self, name))}
        save_whole(tensors, path, {"format": FORMAT, "model": json.dumps(self.model)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SummarisedRecordings":
        """Returns the summaries that `save` wrote into a file, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"summaries were not found: {os.fspath(path)} is no file.")
        try:
            with safe_open(path, framework="pt") as file:
                made_by = file.metadata() or {}
                if made_by.get("format") != FORMAT:
                    raise ValueError(f"{os.fspath(path)} holds no summaries of recordings; write them with save().")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} can't be read as summaries of recordings: {error}.") from error
        layers = range((len(tensors) - len(TENSORS)) // 2)
        return cls(
            **{name: tensors[name] for name in TENSORS},
            keys=tuple(tensors[f"keys.{number}"] for number in layers),
            values=tuple(tensors[f"values.{number}"] for number in layers),
            model=json.loads(made_by["model"]),
        )


class SummaryGenerationMixin(GenerationMixin):
    """`summarise`, and `generate` with `compression="summary"`; for all else the next class's own `generate`."""

    config: Any  # what the class mixed with has
    model: Any
    get_input_embeddings: Any
    _refuse_unheard: Any
    _warn_beyond_context: Any

    @torch.no_grad()
    def summarise(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        compression_ratio: int | Sequence[int] | None = None,
        target_length: int | None = None,
        **audio_inputs: Any,
    ) -> SummarisedRecordings:
        """Returns prompts up to the end of their last recording, read and summed up, to be asked any number of times.

        The arguments are those of `generate`; what follows the last recording of a prompt is left for it to read.

        Args:
            input_ids, attention_mask: `(B, S)`; placeholders may be any number for each recording.
            compression_ratio: frames for each summary token, 1 or more: one for all intervals, or one for each;
                absent: configured.
            target_length: the frames that 30 s are fused to before, 1 or more; absent: configured (all, by default).
            audio_inputs: `input_features`, `feature_attention_mask`, `windows_per_audio`, or `recordings`, as
                `encode` returns them.

        Raises:
            ValueError: the model has no summary projections, an argument is out of range, or placeholders and
                recordings do not fit.
        """
        audio_inputs["compression"] = "summary"
        audio_inputs |= {"compression_ratio": compression_ratio, "target_length": target_length}
        summaries = self._summarise(input_ids, attention_mask, audio_inputs)
        return replace(summaries, model=fingerprint_weights(self.model.language_model))

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Returns the caller's `input_ids` followed by the answers; see `FastLongSpeechGenerationMixin.generate`.

        With `compression="summary"` the language model sums every recording up, `compression_ratio` frames (of those
        that `target_length` leaves of every 30 s) in each summary token. `recordings` may be what `summarise`
        returned, with an opening for every prompt or one for all: then they go on from there.

        Raises:
            ValueError: see there and `summarise`; summaries are of another model or of a prompt that begins otherwise;
                or a way to generate is asked for that needs another cache.
        """
        parent: Any = super()
        recordings, compression = kwargs.get("recordings"), kwargs.get("compression")
        hears = kwargs.get("input_features") is not None or recordings is not None
        summed_up = hasattr(recordings, "openings")  # whether the class is ours or its copy beside a checkpoint
        if not summed_up:
            ratio = kwargs.pop("compression_ratio", None)
            if not hears or self.model.summary_ratio(compression, ratio) is None:
                return parent.generate(inputs, generation_config, **kwargs)
            kwargs["compression_ratio"] = ratio
        self._refuse_unheard(generation_config or self.generation_config, kwargs)
        self._refuse_other_caches(generation_config or self.generation_config, kwargs)
        audio_inputs = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        input_ids = kwargs.pop("input_ids", inputs)
        attention_mask = kwargs.pop("attention_mask", None)
        if summed_up:
            given = [name for name, value in audio_inputs.items() if value is not None and name != "recordings"]
            given = [name for name in given if (name, compression) != ("compression", "summary")]
            if given:
                raise ValueError(f"recordings that are summed up already leave no choice of {given[0]}; leave it out.")
            summaries = self._received_summaries(recordings)  # type: ignore[arg-type]
        else:
            summaries = self._summarise(input_ids, attention_mask, audio_inputs)
        ids, mask, cache = self._go_on(summaries, input_ids, attention_mask)
        self._warn_beyond_context(ids.shape[1])
        self._count_new_tokens(input_ids.shape[1], generation_config or self.generation_config, kwargs)
        answers = parent.generate(
            ids, generation_config, attention_mask=mask, past_key_values=cache, has_begun=True, **kwargs
        )
        sequences = answers if isinstance(answers, Tensor) else answers.sequences
        asked = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat((asked, sequences[:, ids.shape[1] :]), dim=1)
        if isinstance(answers, Tensor):
            return sequences
        answers.sequences = sequences
        return answers

    def _summarise(
        self, input_ids: Tensor, attention_mask: Tensor | None, audio_inputs: dict[str, Any]
    ) -> SummarisedRecordings:
        """As `summarise`, without a fingerprint: it costs a look at the weights."""
        config = self.config
        ratio = self.model.summary_ratio("summary", audio_inputs["compression_ratio"])
        if audio_inputs.get("input_features") is None and audio_inputs.get("recordings") is None:
            raise ValueError(
                "there is no recording to sum up; give input_features, or recordings as encode returns them."
            )
        if audio_inputs["target_length"] is None:
            audio_inputs["target_length"] = config.target_length
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        placeholders = (input_ids == config.audio_token_id) & real
        audio = hear(self.model, placeholders, resize=True, **(audio_inputs | {"compression": "summary"}))
        frames = audio.audio_lengths.tolist()
        embeddings = iter(audio.pooler_output.split(frames))
        lengths = torch.tensor([count_summaries(n, config.summary_interval, ratio) for n in frames])
        recording = audio_inputs.get("recordings")
        shared = recording is not None and len(recording) == 1
        summaries: list[SummarisedRecordings] = []
        read: dict[Any, SummarisedRecordings] = {}
        counts = iter(lengths)
        for row, own, is_audio in zip(input_ids, real, placeholders, strict=True):
            row, is_audio = row[own], is_audio[own]
            kinds, sizes = is_audio.unique_consecutive(return_counts=True)
            parts = list(zip(kinds.tolist(), row.split(sizes.tolist()), strict=True))
            while parts and not parts[-1][0]:
                parts.pop()  # what follows the last recording
            heard = [next(embeddings) for audible, _ in parts if audible]
            kept = torch.stack([next(counts) for _ in heard]) if heard else lengths[:0]
            # One recording for several prompts is read once by those that begin alike.
            opening = (
                tuple(None if audible else tuple(run.tolist()) for audible, run in parts) if shared else len(read)
            )
            if opening not in read:
                read[opening] = self._read_opening(parts, heard, kept, ratio)
            summaries.append(read[opening])
        return summaries[0] if len(summaries) == 1 else SummarisedRecordings.cat(summaries)

    def _read_opening(
        self, parts: list[tuple[bool, Tensor]], heard: list[Tensor], kept: Tensor, ratio: int | Sequence[int]
    ) -> SummarisedRecordings:
        """Returns an opening, read.

        Args:
            parts: runs of ids, and whether they are a recording's placeholders.
            heard: the embeddings of the recordings.
            kept: summary tokens of each.
            ratio: as in `summarise`.
        """
        text_config, embed = self.config.get_text_config(), self.get_input_embeddings()
        cache, waiting, tokens = DynamicCache(config=text_config), iter(heard), []
        counts = iter(kept.tolist())
        for audible, run in parts:
            if audible:
                for _ in self.model.read_recording(cache, next(waiting), ratio):
                    pass  # the cache is all that is kept
                run = run[:1].expand(next(counts))
            else:
                self.model.read_tokens(cache, embed(run.to(embed.weight.device)))
            tokens.append(run.cpu())
        if not parts:
            empty = self._empty_layer()
            layers = text_config.num_hidden_layers
            return SummarisedRecordings(kept, torch.tensor([0]), kept, (empty,) * layers, (empty,) * layers)
        keys, values = (tuple(getattr(layer, kind)[0] for layer in cache.layers) for kind in ("keys", "values"))
        opening = torch.cat(tokens)
        return SummarisedRecordings(opening, torch.tensor([len(opening)]), kept, keys, values)

    def _empty_layer(self) -> Tensor:
        attention = self.model.language_model.layers[0].self_attn
        heads = self.config.get_text_config().num_key_value_heads
        return self.get_input_embeddings().weight.new_empty(heads, 0, attention.head_dim)

    def _received_summaries(self, summaries: SummarisedRecordings) -> SummarisedRecordings:
        """Returns summaries that a user hands in where this model can go on from them; another model's are refused."""
        text, empty = self.config.get_text_config(), self._empty_layer()
        fits = [(layer.shape[0], *layer.shape[2:]) == (empty.shape[0], *empty.shape[2:]) for layer in summaries.keys]
        known = summaries.model in (None, fingerprint_weights(self.model.language_model))
        if not known or fits != [True] * text.num_hidden_layers:
            raise ValueError(
                "recordings were summed up by another model, whose keys and values mean nothing to this one; sum them "
                "up again."
            )
        weight = self.get_input_embeddings().weight
        return summaries.to(weight.device, weight.dtype)

    def _go_on(
        self, summaries: SummarisedRecordings, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Returns prompts with a placeholder for each summary token, left padded, their mask, and a cache of all of
        each but its last token."""
        rows, device = len(input_ids), summaries.keys[0].device
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        placeholders = (input_ids == self.config.audio_token_id) & attention_mask.bool()
        shared = len(summaries.openings) == 1
        if not shared and len(summaries.openings) != rows:
            raise ValueError(
                f"recordings are the openings of {len(summaries.openings)} prompts, got {rows}; give as many, or one."
            )
        lengths = summaries.lengths.repeat(rows if shared else 1)
        runs = int((placeholders & ~placeholders.roll(1, 1)).sum())
        if runs != len(lengths):
            raise ValueError(
                f"The prompts have {runs} runs of audio placeholders for {len(lengths)} summed up recordings; write "
                "them as they were when they were summed up."
            )
        ids, mask = resize_placeholders(input_ids, attention_mask, placeholders, lengths)
        ids, mask = ids.to(device), mask.to(device)
        openings = summaries.tokens.split(summaries.openings.tolist()) * (rows if shared else 1)
        caches = summaries.caches(self.config.get_text_config()) * (rows if shared else 1)
        embed = self.get_input_embeddings()
        filled = []
        for number, (row, own, opening, cache) in enumerate(zip(ids, mask.bool(), openings, caches, strict=True)):
            row = row[own]
            if len(row) <= len(opening) or not torch.equal(row[: len(opening)].cpu(), opening):
                raise ValueError(
                    f"prompt {number} must begin as the one whose recordings were summed up and go on after them; "
                    "write the same text before and between the recordings, or sum them up again."
                )
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]  # tensors are replaced, never changed
            if len(row) - 1 > len(opening):
                self.model.read_tokens(cache, embed(row[len(opening) : -1]))
            filled.append(cache)
        return ids, mask, self._merge(filled, ids.shape[1] - 1)

    def _merge(self, caches: list[Any], width: int) -> DynamicCache:
        """Returns caches of one prompt each in one, padded on the left to so many tokens."""
        if len(caches) == 1:  # an hour's should not be there twice
            return caches[0]
        merged: Any = DynamicCache(config=self.config.get_text_config())
        if not width:
            return merged
        empty = self._empty_layer()[None]
        for number in range(len(merged.layers) or len(caches[0].layers)):
            padded = []
            for kind in ("keys", "values"):
                states = [getattr(cache.layers[number], kind) if cache.get_seq_length() else empty for cache in caches]
                padded.append(
                    torch.cat([torch.nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in states])
                )
            merged.update(*padded, number)
        return merged

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,  # this and the next are named, for transformers looks for the names
        inputs_embeds: Tensor | None = None,
        has_begun: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers; of a prompt that `has_begun`, what its cache lacks.

        Before the first draft of a prompt lookup, transformers reads the whole prompt once more.
        """
        if has_begun and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        parent: Any = super()
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        return parent.prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    @staticmethod
    def _refuse_other_caches(generation_config: Any, options: dict[str, Any]) -> None:
        """Raises a ValueError where another cache is asked for than the one that holds the summaries."""
        for name, plain in (("cache_implementation", (None, "dynamic")), ("use_cache", (None, True))):
            value = options.get(name)
            value = getattr(generation_config, name, None) if value is None else value
            if value not in plain:
                raise ValueError(
                    f"{name}={value!r} has no place for summaries, which lie in a cache that grows; leave it out."
                )
        if options.get("past_key_values") is not None:
            raise ValueError("past_key_values can't be read before recordings that are summed up; leave it out.")

    @staticmethod
    def _count_new_tokens(length: int, generation_config: Any, options: dict[str, Any]) -> None:
        """Lets `max_length` and `min_length` count the caller's ids, of which summaries are fewer."""
        for old, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = options.pop(old, None)
            if value is not None and options.get(new) is None and getattr(generation_config, new, None) is None:
                options[new] = value - length

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:  # type: ignore[override]
        """Repeats a cache that is there already for every beam or answer, which transformers leaves to its caller."""
        parent: Any = super()
        input_ids, options = parent._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        cache: Any = options.get("past_key_values")
        if expand_size > 1 and isinstance(cache, DynamicCache) and cache.get_seq_length():
            layer: Any = cache.layers[0]
            if len(layer.keys) * expand_size == len(input_ids):
                cache.batch_repeat_interleave(expand_size)
        return input_ids, options


__all__ = ["SummarisedRecordings", "SummaryGenerationMixin"]
