"""The card of a model that is published: what its folder's own records say, in the form that the Hub reads."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import is_adapter

TEMPLATE = Path(__file__).with_name("card.md")
RECORD, SETTINGS, STATE = "conversion.json", "settings.yaml", "trainer_state.json"
TAGS = ["fastlongspeech", "audio", "speech", "long-audio", "custom_code"]


def make_card(
    folder: Path,
    repo: str,
    license: str | None = None,
    language: list[str] | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
) -> str:
    """Returns the text of the card: the folder's own `README.md` if it has one, else one from the template.

    Args:
        folder: of a model or an adapter.
        repo: its name on the Hub, such as `"org/name"`.
        license, language, datasets: as the Hub names them.
        base_model: Hub id of what it was made of; by default what the records of the folder say.
    """
    if (folder / "README.md").exists():
        return (folder / "README.md").read_text(encoding="utf-8")
    adapter = is_adapter(folder)
    config = read(folder / ADAPTER_CONFIG) if adapter else read(folder / "config.json")
    settings, conversion = read(folder / SETTINGS), read(folder / RECORD)
    base_model = base_model or find_base(folder)
    trained = adapter or bool(settings)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="audio-text-to-text",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter" if adapter else "finetune" if trained else None,
        license=license,
        language=language,
        datasets=datasets,
        tags=TAGS,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=repo,
        adapter=adapter,
        base=base_model,
        config=config,
        conversion=conversion,
        settings={name: value for name, value in settings.items() if not _is_path(value)},
        history=last_losses(read(folder / STATE)),
    )
    return str(card)


def find_base(folder: Path) -> str | None:
    """Returns the Hub id that a folder's records, or those of the folders that it was made of, begin with."""
    seen = set()
    while folder not in seen:
        seen.add(folder)
        named = read(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        named = named or read(folder / SETTINGS).get("model") or read(folder / RECORD).get("source")
        if named is None:
            return None
        if not Path(named).exists():
            return named if named.count("/") == 1 and named[0] not in "./~" else None
        folder = Path(named)
    return None


def read(path: Path) -> dict[str, Any]:
    """Returns the fields of a JSON or YAML file, none if it is not there."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def last_losses(state: dict[str, Any]) -> dict[str, float]:
    """Returns the last value of every loss and score that the Trainer wrote down, and the steps it took."""
    found: dict[str, float] = {}
    for line in state.get("log_history", []):
        found |= {name: value for name, value in line.items() if "loss" in name or name.endswith("_wer")}
    return found | ({"steps": state["global_step"]} if "global_step" in state else {})


def _is_path(value: Any) -> bool:
    """Whether a setting names a place on the machine that trained, which says nothing to others."""
    return isinstance(value, str) and ("/" in value or "\\" in value)


__all__ = ["find_base", "make_card"]
