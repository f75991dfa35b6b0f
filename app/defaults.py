"""Which model a command takes and how long its answers may get, where nothing is said. Imports nothing heavy."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parents[1] / "checkpoints" / "fastlongspeech-demo"
MAX_NEW_TOKENS = 512
QWEN2_AUDIO = "Qwen/Qwen2-Audio-7B-Instruct"


def find_model(source: str | None) -> str:
    """Returns the folder or Hub id of the model that `--model` names, the demo model's where it is None."""
    if source is None:
        if not (DEMO_MODEL / "config.json").exists():
            raise ValueError(
                f"no --model was given, and there is no demo model in {DEMO_MODEL}: an installed package carries "
                "no weights, a checkout has them once `make recipe` is done; pass --model with a folder or Hub id."
            )
        return str(DEMO_MODEL)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"--model {source} is no folder; pass the folder of a model or a Hub id.")
    return source
