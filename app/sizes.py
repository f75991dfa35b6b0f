"""The sizes of a model that its work depends on, read from its configuration without loading torch or transformers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .defaults import QWEN2_AUDIO
from .hosts import HOSTS, read_json

# The sizes in config.json of Qwen/Qwen2-Audio-7B-Instruct, on which the paper's models are built; the CTC decoder has
# the 10,000 pieces and the projector of the paper's release, which are the defaults.
QWEN2_AUDIO_7B: dict[str, Any] = {
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "max_source_positions": 1500,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 156_032,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
    },
    "audio_token_index": 151_646,
}
# What a Qwen2-Audio's config.json leaves out. The classes that say so would load torch; a test compares the two.
AUDIO_DEFAULTS: dict[str, Any] = QWEN2_AUDIO_7B["audio_config"]
TEXT_DEFAULTS: dict[str, Any] = QWEN2_AUDIO_7B["text_config"] | {"vocab_size": 151_936, "intermediate_size": 22_016}
# Language models whose layers do what `LanguageModelSizes` counts and nothing else that counts; a test compares each
# with torch's count. Others have experts, MLPs without a gate, or layers of another kind.
PLAIN_DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


def product(*sizes: int) -> int:
    """Returns the operations of a matrix product: a multiplication and an addition for every combination."""
    operations = 2
    for size in sizes:
        operations *= size
    return operations


@dataclass(frozen=True)
class LanguageModelSizes:
    """A decoder of attention and gated MLPs.

    Attributes:
        width: of its hidden states.
        vocabulary: the tokens that its head tells apart.
        heads, key_value_heads, head: how many heads there are of each kind, and the width of one.
        mlp: width of the MLPs.
        layers: how many layers attend to so many positions at most; None: to all.
    """

    width: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head: int
    mlp: int
    layers: Mapping[int | None, int]

    def forward(self, tokens: int, cached: int) -> int:
        """Returns the operations of the layers for new tokens after cached ones."""
        queries, keys = self.heads * self.head, self.key_value_heads * self.head
        linear = 2 * self.width * queries + 2 * self.width * keys + 3 * self.width * self.mlp
        operations = 0
        for window, layers in self.layers.items():
            # Attention takes all pairs of positions, masked or not; a sliding window only limits what is cached.
            kept = cached if window is None else min(cached, window - 1)
            operations += layers * (product(linear, tokens) + 2 * product(tokens, kept + tokens, queries))
        return operations

    def summary_projections(self, tokens: int) -> int:
        """Returns the operations of the projections that summary tokens have beside those of all tokens."""
        outputs = self.heads * self.head + 2 * self.key_value_heads * self.head
        return sum(self.layers.values()) * product(self.width, outputs, tokens)

    def cache_bytes(self, tokens: int) -> int:
        """Returns the bytes of the keys and values of so many tokens, 2 for each number (bfloat16, float16)."""
        of_token = 2 * self.key_value_heads * self.head * 2
        return sum(
            layers * of_token * (tokens if window is None else min(tokens, window))
            for window, layers in self.layers.items()
        )


@dataclass(frozen=True)
class Sizes:
    """A model's sizes and settings; the names are those of `FastLongSpeechConfig` where it has them.

    Attributes:
        mel_bins: of its mel features.
        width, mlp, layers: of the audio encoder.
        text_config: of the language model, as config.json has it.
        ctc_vocab_size: without the blank; 0: the language model's vocabulary.
    """

    mel_bins: int
    width: int
    mlp: int
    layers: int
    text_config: Mapping[str, Any]
    ctc_vocab_size: int = 10_000
    ctc_projector: bool = True
    ctc_trained: bool = True
    content_density: str = "ctc"
    compression: str = "iterative_fusion"
    target_length: int = 750
    fusion_schedule: str = "halving"
    fusion_ladder: tuple[int, ...] = (400, 200, 100, 50, 25, 12)
    summary_interval: int = 0
    compression_ratio: int = 8
    windows_per_batch: int = 8

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes":
        """Returns the sizes in what a config.json holds, Qwen2-Audio's or that of the first release included."""
        settings = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if config.get("model_type") == "long_speech_qwen2audio":
            settings["ctc_vocab_size"] = config["ctc_embed_num"]
            settings["ctc_projector"] = "projector" in config["ctc_decoder"]
        elif config.get("content_density") == "uniform":
            settings.setdefault("ctc_trained", False)
        settings["fusion_ladder"] = tuple(settings.get("fusion_ladder", cls.fusion_ladder))
        audio = AUDIO_DEFAULTS | dict(config.get("audio_config") or {})
        settings |= {
            "mel_bins": audio["num_mel_bins"],
            "width": audio["d_model"],
            "mlp": audio["encoder_ffn_dim"],
            "layers": audio["encoder_layers"],
            "text_config": config.get("text_config") or {},
        }
        return cls(**settings)

    def language_model(self) -> LanguageModelSizes | None:
        """Returns the sizes of the language model; None: they do not say what its layers do, or fields are missing."""
        text = dict(self.text_config)
        if text.setdefault("model_type", "qwen2") == "qwen2":
            text = TEXT_DEFAULTS | text
            text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
        needed = ["hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
        needed += ["intermediate_size", "num_hidden_layers"]
        if text["model_type"] not in PLAIN_DECODERS or any(text.get(name) is None for name in needed):
            return None
        window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
        kinds = text.get("layer_types")
        if kinds is None:
            # Without a list, all layers slide or none does; of a Gemma it is every so many.
            if text["model_type"] in ("gemma2", "gemma3_text"):
                return None
            kinds = ["full_attention" if window is None else "sliding_attention"] * text["num_hidden_layers"]
        layers = Counter(window if kind == "sliding_attention" else None for kind in kinds)
        width, vocabulary, heads, key_value_heads, head, mlp, _ = (text[name] for name in needed)
        return LanguageModelSizes(width, vocabulary, heads, key_value_heads, head, mlp, layers)


def read_config(source: str) -> dict[str, Any]:
    """Returns what config.json holds of the model in a folder or on the Hub; that of `QWEN2_AUDIO` is known.

    Raises:
        ValueError: there is no config.json, or it is that of another kind of model.
    """
    if source == QWEN2_AUDIO:
        return QWEN2_AUDIO_7B
    config = read_json(source)
    known = [name for host in HOSTS for name in (host.model_type, *host.vanilla_types)]
    if config.get("model_type") not in known:
        raise ValueError(f"{source} holds a {config.get('model_type')}; pass a model of {', '.join(known)}.")
    return config


__all__ = ["QWEN2_AUDIO_7B", "LanguageModelSizes", "Sizes", "product", "read_config"]
