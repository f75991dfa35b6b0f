"""What every host's configuration gets: the CTC decoder's fields and those of the compression, saved with a model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import validated_field
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .compression_fastlongspeech import check_compression
from .windows_fastlongspeech import WINDOWS, Windows


def _one_of(*choices: str) -> Callable[[str], None]:
    def validate(value: str) -> None:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}; got {value!r}.")

    return validate


def _at_least(least: int) -> Callable[[int], None]:
    def validate(value: int) -> None:
        if value < least:
            raise ValueError(f"expected an integer of {least} or more, got {value}.")

    return validate


def _lengths(values: Sequence[int]) -> None:
    if not values or min(values) < 1:
        raise ValueError(f"expected one or more positive integers, got {list(values)}.")


@dataclass(kw_only=True, repr=False)
class FastLongSpeechSettings:
    """The fields that FastLongSpeech adds to the configuration of a host. Mix it in before the host's own class.

    Args:
        tie_word_embeddings: whether the head is the token embeddings; absent: as `text_config` says.
        ctc_vocab_size: pieces the CTC decoder tells apart, without the blank, which is one more and comes last;
            0 means the language model's own vocabulary.
        ctc_projector: whether the CTC decoder has a projector of its own to the width of the language model;
            without, it reads the output of the multimodal projector.
        ctc_trained: whether the CTC decoder is trained. As long as it is not, every frame weighs 1. Also false for a
            host that has none of ours; there its own CTC head weighs frames.
        content_density: `"ctc"` (Eq. 3) or `"uniform"` (every frame weighs 1).
        compression: what shortens a recording when a call names nothing, see `compression_fastlongspeech.py`:
            `"iterative_fusion"`, a rival (`"random"`, `"average_pooling"`, `"most_similar"`, `"adjacent_merging"`), an
            ablation (`"single_step_fusion"`, `"uniform_density"`), `"summary"`, see `summary_fastlongspeech.py`, or
            `"none"` to keep every frame.
        target_length: L, the frames (40 ms each before fusion) a recording is fused to when a call names no other;
            with `"summary"` those that 30 s of it are fused to.
        target_lengths: the values L is drawn from in training.
        fusion_schedule: `"halving"` (Eq. 5) or `"ladder"` (the rungs of `fusion_ladder` below the current length,
            then L); the same in training and inference.
        fusion_ladder: the lengths the ladder schedule passes through, in any order.
        summary_interval: frames of a recording that the language model sums up together; 0: it has no projections for
            that, see `add_summary`.
        compression_ratio: with `"summary"`, frames for each summary token when a call names no other ratio.
        windows_per_batch: how many times 30 s of audio the encoder reads at a time, at most; a CPU reads no more than
            a minute.

    Raises:
        StrictDataclassError: a value has the wrong type or is out of range, here or when it is assigned later.

    Attributes:
        vanilla_types: the `model_type`s of the host's own checkpoints, which load as ours.
        model_class: the file and the name of the model's class, for the Auto classes.
        windows: how the host cuts recordings.
    """

    vanilla_types: ClassVar[tuple[str, ...]] = ()
    model_class: ClassVar[str]
    windows: ClassVar[Windows] = WINDOWS

    tie_word_embeddings: bool | None = None
    ctc_vocab_size: int = validated_field(_at_least(0), default=10_000)
    ctc_projector: bool = True
    ctc_trained: bool = True
    content_density: str = validated_field(_one_of("ctc", "uniform"), default="ctc")
    compression: str = validated_field(check_compression, default="iterative_fusion")
    target_length: int = validated_field(_at_least(1), default=750)
    target_lengths: list[int] | tuple[int, ...] = validated_field(_lengths, default=(750, 400, 200, 100, 50, 25, 12))
    fusion_schedule: str = validated_field(_one_of("halving", "ladder"), default="halving")
    fusion_ladder: list[int] | tuple[int, ...] = validated_field(_lengths, default=(400, 200, 100, 50, 25, 12))
    summary_interval: int = validated_field(_at_least(0), default=0)
    compression_ratio: int = validated_field(_at_least(1), default=8)
    windows_per_batch: int = validated_field(_at_least(1), default=8)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "model_class"):
            # The server and the pipelines of transformers look classes up in this table of names.
            name = cls.model_class.rpartition(".")[2]
            MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(cls.model_type, name)  # type: ignore[attr-defined]

    def __post_init__(self: Any, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # the host's own, when built from one of its configurations
        self.target_lengths = list(self.target_lengths)
        self.fusion_ladder = list(self.fusion_ladder)
        parent: Any = super()
        parent.__post_init__(**kwargs)
        # transformers ties by the outer configuration, and language models say it in their own.
        text = self.get_text_config()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
        text.tie_word_embeddings = self.tie_word_embeddings

    @classmethod
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the dict of a `config.json`, as ours where it is that of the host's own checkpoint."""
        parent: Any = super()
        config_dict, kwargs = parent.get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in cls.vanilla_types:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes `config.json`, in which every auto class finds the code saved beside it."""
        here = type(self).__module__.rpartition(".")[2]
        self.auto_map = {
            "AutoConfig": f"{here}.{type(self).__name__}",
            "AutoModel": self.model_class,
            "AutoModelForMultimodalLM": self.model_class,
            "AutoModelForCausalLM": self.model_class,  # PEFT asks it
        }
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)

    def with_ntk_rope(self, window: int = 750) -> Any:
        """Returns a copy whose rotary positions are stretched from a window to the language model's whole context.

        The paper's NTK-RoPE, a rival that does not compress: the base becomes theta' = theta (context / window)^(d /
        (d - 2)) for recordings of all lengths, where context is `max_position_embeddings` and d the size of a head.
        Load the model with the copy and call it with `compression="iterative_fusion"` and
        `target_length=config.fit_length(...)`: recordings that fit keep every frame, others are fused to fit.

        Args:
            window: the positions to stretch, as many as the model has learnt; 750 are the frames of 30 s.

        Raises:
            ValueError: `window` is no positive number up to the context, or the positions are scaled in another way.
        """
        config: Any = copy.deepcopy(self)
        text = config.get_text_config()
        rope, context = text.rope_parameters, text.max_position_embeddings
        if not 1 <= window <= context:
            raise ValueError(f"window must lie between 1 and the language model's context of {context}, got {window}.")
        if rope["rope_type"] != "default":
            raise ValueError(
                f"text_config.rope_parameters have the type {rope['rope_type']!r}; NTK-RoPE needs those of a model "
                'whose positions are not scaled yet, "default".'
            )
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        theta = rope["rope_theta"] * (context / window) ** (dim / (dim - 2))
        text.rope_parameters = {**rope, "rope_theta": theta}
        return config

    def fit_length(self: Any, other_tokens: int) -> int:
        """Returns the `target_length` of a prompt's recording that fills the language model's context.

        Args:
            other_tokens: tokens of the prompt without its placeholders, and of the answer (`max_new_tokens`).

        Raises:
            ValueError: not one frame fits.
        """
        context = self.get_text_config().max_position_embeddings
        if other_tokens >= context:
            raise ValueError(
                f"other_tokens must leave a frame of the language model's context of {context}, got {other_tokens}; "
                "shorten the prompt or the answer."
            )
        return context - other_tokens

    @property
    def frame_width(self: Any) -> int:
        """Width of the frames that the encoder makes and the fusion joins."""
        return self.audio_config.d_model

    @property
    def ctc_blank(self: Any) -> int:
        """Index of the CTC blank, the last output of the CTC decoder."""
        return self.ctc_vocab_size or self.get_text_config().vocab_size


__all__ = ["FastLongSpeechSettings"]
