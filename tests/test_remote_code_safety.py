"""What goes to a Hub is safe to read: no network, no process, no pickle, and nothing done by importing it.

The syntax trees of all shipped files are walked. What a file may do is listed here; whatever else it does fails.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(ROOT.glob("*_fastlongspeech.py"))

# Modules that reach a network, start something, or read code out of data; and those that could load such a module.
FORBIDDEN = {
    *(
        "socket",
        "ssl",
        "http",
        "httpx",
        "requests",
        "urllib3",
        "aiohttp",
        "ftplib",
        "smtplib",
        "asyncio",
        "webbrowser",
    ),
    *("subprocess", "multiprocessing", "threading", "concurrent", "signal", "pty", "ctypes", "cffi", "sys", "site"),
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "importlib", "runpy", "code", "builtins"),
    *("urllib.request", "torch.hub", "torch.package", "torch.utils.cpp_extension", "huggingface_hub.hf_api"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "globals", "breakpoint", "input"}
FORBIDDEN_ATTRIBUTES = {
    *("os.system", "os.popen", "os.fork", "os.kill", "os.putenv", "os.remove", "os.unlink", "os.rmdir", "os.environ"),
    *("torch.load", "torch.save", "np.load", "numpy.load", "np.save", "torch.hub", "torch.ops", "sys.modules"),
}
# From modules with more in them than is used; the one way to a network is that of a recording that is given as a URL.
ALLOWED_NAMES = {
    ("urllib.request", "url2pathname"): {"audio_fastlongspeech.py"},
    ("huggingface_hub", "get_session"): {"audio_fastlongspeech.py"},
}
NETWORK = {"audio_fastlongspeech.py": {"_find_text"}}

# Calls that run when a file is imported. All make a value and nothing else, but for three that enter a class by name
# into the tables of transformers.
AT_IMPORT = {
    *(
        "logging.get_logger",
        "re.compile",
        "frozenset",
        "dataclass",
        "strict",
        "validated_field",
        "cast",
        "torch.no_grad",
    ),
    *("_at_least", "_one_of", "Windows", "_Layout", "RIFF._replace", "can_return_tuple", "property", "classmethod"),
    *("staticmethod", "lru_cache", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault", "logging.getLogger", "vars"),
}
STATEMENTS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields every import of another package as module and name; the name is empty where all of it is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((str(node.module), alias.name) for alias in node.names)


def run_at_import(tree: ast.Module) -> Iterator[str]:
    """Yields what is called while a file is imported: outside functions, in decorators and in default values."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Lambda):
            return
        inner = list(ast.iter_child_nodes(node))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                if not isinstance(decorator, ast.Call):
                    yield ast.unparse(decorator)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        for child in inner:
            yield from visit(child)

    for statement in tree.body:
        yield from visit(statement)


def faults(name: str, source: str) -> list[str]:
    """Returns all that a shipped file must not do, in words."""
    tree, found = ast.parse(source), []
    for module, what in imported(tree):
        forbidden = any(f"{module}.{what}".startswith(f"{no}.") or module == no for no in FORBIDDEN)
        if (forbidden or (module, what) in ALLOWED_NAMES) and name not in ALLOWED_NAMES.get((module, what), set()):
            found.append(f"imports {what or 'all'} of {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(f"calls {ast.unparse(node.func)}")
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in FORBIDDEN_ATTRIBUTES or text.startswith(("os.exec", "os.spawn")):
                found.append(f"uses {text}")
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            found.append(f"sets {node.arg}")
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        uses = any(isinstance(node, ast.Name) and node.id == "get_session" for node in ast.walk(function))
        if uses and function.name not in NETWORK.get(name, set()):
            found.append(f"reaches a network in {function.name}")
    for call in run_at_import(tree):
        if call not in AT_IMPORT and not call.endswith((".register_for_auto_class", ".setter", "Windows")):
            found.append(f"calls {call} when it is imported")
    for statement in tree.body:
        if not isinstance(statement, (*STATEMENTS, ast.Expr)):
            found.append(f"has a {type(statement).__name__} that runs when it is imported")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_file_does_nothing_that_a_reader_would_not_expect(path: Path) -> None:
    assert faults(path.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import subprocess", "imports all of subprocess"),
        ("def f():\n    from pickle import loads", "imports loads of pickle"),
        ("from urllib.request import urlopen", "imports urlopen of urllib.request"),
        ("import http.client", "imports all of http.client"),
        ("from huggingface_hub import get_session", "imports get_session of huggingface_hub"),
        ("def f(path):\n    return torch.load(path)", "uses torch.load"),
        ("def f(path):\n    return np.load(path, allow_pickle=True)", "uses np.load"),
        ("def f(text):\n    return eval(text)", "calls eval"),
        ("def f():\n    os.execv('/bin/sh', [])", "uses os.execv"),
        ("home = os.getcwd()", "calls os.getcwd when it is imported"),
        ("def f(here=os.getcwd()):\n    return here", "calls os.getcwd when it is imported"),
        ("class A:\n    x = fetch()", "calls fetch when it is imported"),
        ("@trace\ndef f():\n    pass", "calls trace when it is imported"),
        ("for name in names:\n    names.pop()", "has a For that runs when it is imported"),
    ],
)
def test_the_walk_finds(source: str, fault: str) -> None:
    assert fault in faults("new_fastlongspeech.py", source)


def test_a_network_is_reached_for_a_recording_alone() -> None:
    source = "from huggingface_hub import get_session\ndef other():\n    return get_session().get('http://x')"
    assert faults("audio_fastlongspeech.py", source) == ["reaches a network in other"]
