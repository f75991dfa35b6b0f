"""A JSON-lines file that is written as results come, and read again after its writer was killed.

What the results depend on stands beside them: see `refuse_other`.
"""

import json
from pathlib import Path
from typing import Any


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Returns the objects in a file, without a last line that was cut short; none if there is no file.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().split(b"\n")
    return [_read_line(line, number, path) for number, line in enumerate(lines[:-1], 1) if line.strip()]


def _read_line(line: bytes, number: int, path: str | Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(
            f"line {number} of {path} is no JSON object; rename or remove the file, or name another --output."
        )
    return row


def refuse_other(noted: dict[str, Any], wanted: dict[str, Any], output: str | Path) -> None:
    """Refuses to go on with results that were made otherwise.

    Args:
        noted: what the results depend on, by names.
        wanted: what the new ones would depend on.
        output: where the results are.

    Raises:
        ValueError: they differ; all differences are named.
    """
    changed = [
        f"{name} {noted.get(name)!r}, not {wanted[name]!r}" for name in wanted if noted.get(name) != wanted[name]
    ]
    if changed:
        raise ValueError(f"--output {output} holds results with {'; '.join(changed)}; name another one.")


def begin_journal(path: str | Path, settings: dict[str, Any], output: str | Path) -> list[dict[str, Any]]:
    """Returns the results in a journal whose first line is what they depend on; begins one that is not there.

    Raises:
        ValueError: the results in it depend on something else, see `refuse_other`.
    """
    rows = read_journal(path)
    if rows:
        refuse_other(rows[0], settings, output)
    else:
        with Journal(path) as journal:
            journal.append(settings)
    return rows[1:]


class Journal:
    """Appends objects to a file and flushes each at once. The rest of a line that was cut short is removed first.

    Args:
        path: the file; it and its folder are made where they are missing.
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab+")
        self.file.seek(0)
        complete = self.file.read().rfind(b"\n") + 1
        self.file.truncate(complete)

    def append(self, row: dict[str, Any]) -> None:
        """Writes one object."""
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
