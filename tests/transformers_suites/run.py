"""Runs transformers' own `ModelTesterMixin` and `ProcessorTesterMixin` on the classes of this package.

    python tests/transformers_suites/run.py [arguments for pytest]          # Qwen2-Audio and ours on it
    python tests/transformers_suites/run.py hosts [arguments for pytest]    # the other hosts; takes ten minutes

The mixins come from the source distribution of the *installed* transformers, downloaded by pip once and kept in
`.cache/` of the repository. It holds the test files of the top level only; `STAND_INS` replaces the helper modules
they import and it lacks. One of these is `GenerationTesterMixin`: it is empty here, so that no generation is tested by
these suites; `tests/test_generation_strategies.py` does that instead. The suites run on stock Qwen2-Audio too, because
what may be skipped on ours depends on what is skipped there: see `conftest.py`.
"""

import importlib.metadata
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy
import pytest
import soundfile

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "transformers_suites"

STAND_INS = {
    "transformers_tests/__init__.py": "",
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return __file__.replace('.py', '.wav')\n",
}


def unpack_suites() -> Path:
    """Returns the folder to put on `sys.path` so that `transformers_tests` can be imported; makes it when absent."""
    version = importlib.metadata.version("transformers")
    folder = CACHE / version
    if (folder / "complete").exists():
        return folder

    requirement = f"transformers=={version}"
    command = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(CACHE), requirement]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)

    (folder / "transformers_tests").mkdir(parents=True, exist_ok=True)
    with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
        for member in archive:
            path = Path(member.name)
            source = archive.extractfile(member) if path.match("transformers-*/tests/*.py") else None
            if source is not None:
                (folder / "transformers_tests" / path.name).write_bytes(source.read())
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    tone = 0.1 * numpy.sin(2 * math.pi * 440 / 16_000 * numpy.arange(16_000))
    soundfile.write(folder / "utils" / "fetch_hub_objects_for_ci.wav", tone, 16_000)
    (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    options = ["--rootdir", str(HERE), "-c", str(HERE / "pytest.ini"), "-o", f"pythonpath={unpack_suites()}"]
    arguments = [argument for argument in sys.argv[1:] if argument != "hosts"]
    names = ["hosts"] if len(arguments) < len(sys.argv) - 1 else ["modeling", "processing"]
    sys.exit(pytest.main([*options, *arguments, *(str(HERE / f"suite_{name}.py") for name in names)]))
