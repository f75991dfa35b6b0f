"""A saved folder is all a user needs: it loads and answers alike where this package is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastlongspeech import FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor

PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>\nWhat?"

ROOT = Path(__file__).parents[1]


def reached(*names: str) -> set[str]:
    """The files that these import, and those that they import, by a search for their relative imports."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        found.add(name := waiting.pop())
        imports = re.findall(r"^\s*from \.(\w+) import", (ROOT / name).read_text(), flags=re.MULTILINE)
        waiting += [f"{module}.py" for module in imports if f"{module}.py" not in found]
    return found


CODE = reached("modeling_fastlongspeech.py", "processing_fastlongspeech.py", "configuration_fastlongspeech.py")
DATA = {
    "chat_template.jinja",
    "config.json",
    "ctc.model",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

# Runs where `import fastlongspeech` fails; writes what it computes beside the folder it loads.
FRESH_PROCESS = """
    import json, sys
    import numpy as np
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    folder = "model"
    audio = np.load("audio.npy")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=sys.argv[1], audio=audio, sampling_rate=16000, target_length=30)
    tensors = {}
    for loader in (AutoModel, AutoModelForMultimodalLM):
        model = loader.from_pretrained(folder, trust_remote_code=True)
        tensors[loader.__name__ + ".logits"] = model(**inputs).logits
        answer = model.generate(**inputs, target_length=9, max_new_tokens=5, do_sample=False)
        tensors[loader.__name__ + ".answer"] = answer
    save_file(tensors, "out.safetensors")
    names = {"config": type(config).__name__, "processor": type(processor).__name__, "model": type(model).__name__}
    names["ctc_vocab_size"] = processor.ctc_vocab_size
    json.dump(names, open("names.json", "w"))
    model.save_pretrained("again")
    processor.save_pretrained("again")
"""


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=0.1, size=31 * 16000).astype(np.float32)


@pytest.fixture(scope="module")
def elsewhere(checkpoint: Path, audio: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository in which a fresh process has loaded a copy of the checkpoint, `model/`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(checkpoint, folder / "model")
    np.save(folder / "audio.npy", audio)
    run_without_the_package(folder, FRESH_PROCESS, PROMPT)
    return folder


def run_without_the_package(folder: Path, code: str, *arguments: str) -> None:
    """Runs code in `folder` by a Python that sees the installed libraries, but not this package."""
    hide = """
        import sys

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "fastlongspeech":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        try:
            import fastlongspeech
        except ModuleNotFoundError:
            pass
        else:
            sys.exit("the package can be imported")
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    program = textwrap.dedent(hide) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def expected(checkpoint: Path, audio: np.ndarray) -> dict[str, Any]:
    processor = FastLongSpeechProcessor.from_pretrained(checkpoint)
    model = FastLongSpeechForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor(text=PROMPT, audio=audio, sampling_rate=16000, target_length=30)
    answer = model.generate(**inputs, target_length=9, max_new_tokens=5, do_sample=False)
    return {"logits": model(**inputs).logits, "answer": answer}


def test_a_saved_folder_is_complete(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == CODE | DATA


def test_every_auto_class_is_named_in_the_saved_configurations(checkpoint):
    model = "modeling_fastlongspeech.FastLongSpeechForConditionalGeneration"
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_fastlongspeech.FastLongSpeechConfig",
        "AutoModel": model,
        "AutoModelForMultimodalLM": model,
        "AutoModelForCausalLM": model,
    }
    assert json.loads((checkpoint / "processor_config.json").read_text())["auto_map"] == {
        "AutoProcessor": "processing_fastlongspeech.FastLongSpeechProcessor"
    }


def test_a_fresh_process_without_the_package_computes_the_same(elsewhere, checkpoint, audio):
    found = load_file(elsewhere / "out.safetensors")
    for name, tensor in expected(checkpoint, audio).items():
        for loader in ("AutoModel", "AutoModelForMultimodalLM"):
            assert torch.equal(found[f"{loader}.{name}"], tensor), (loader, name)


def test_the_auto_classes_load_the_generating_class(elsewhere, checkpoint):
    assert json.loads((elsewhere / "names.json").read_text()) == {
        "config": "FastLongSpeechConfig",
        "processor": "FastLongSpeechProcessor",
        "model": "FastLongSpeechForConditionalGeneration",
        "ctc_vocab_size": FastLongSpeechProcessor.from_pretrained(checkpoint).ctc_vocab_size,
    }


def test_what_the_fresh_process_saves_is_complete_again(elsewhere, checkpoint, audio):
    assert {path.name for path in (elsewhere / "again").iterdir()} >= CODE | DATA
    for name in CODE | {"ctc.model", "chat_template.jinja"}:
        assert (elsewhere / "again" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    before, after = expected(checkpoint, audio), expected(elsewhere / "again", audio)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_the_fresh_process_saves_loads_in_another(elsewhere, tmp_path):
    shutil.copytree(elsewhere / "again", tmp_path / "model")
    shutil.copy(elsewhere / "audio.npy", tmp_path)
    run_without_the_package(tmp_path, FRESH_PROCESS, PROMPT)
    assert (tmp_path / "out.safetensors").read_bytes() == (elsewhere / "out.safetensors").read_bytes()


def test_with_the_package_imported_no_trust_is_needed(checkpoint):
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    assert type(AutoConfig.from_pretrained(checkpoint)).__module__.startswith("fastlongspeech.")
    assert type(AutoProcessor.from_pretrained(checkpoint)) is FastLongSpeechProcessor
    for loader in (AutoModel, AutoModelForMultimodalLM):
        assert type(loader.from_pretrained(checkpoint)) is FastLongSpeechForConditionalGeneration


def test_the_code_imports_nothing_an_inference_user_must_not_have():
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "av",
        "soxr",
        "sentencepiece",
    }
    for name in CODE:
        file = ROOT / name
        assert {module for module in get_imports(file) if module not in sys.stdlib_module_names} <= allowed, name
        assert {f"{module}.py" for module in get_relative_imports(file)} <= CODE, name


def test_the_demo_checkpoint_carries_this_code():
    published = ROOT / "checkpoints" / "fastlongspeech-demo"
    assert {path.name for path in published.glob("*.py")} == CODE
    for name in CODE:
        assert (published / name).read_bytes() == (ROOT / name).read_bytes(), (
            f"cp {name} {published.relative_to(ROOT)}"
        )
