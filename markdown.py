"""Tables in Markdown, for the pages and reports that scripts write."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """Returns a Markdown table whose first ``words`` columns hold words, the others figures, to the right."""
    lines = [headings, ["---"] * words + ["---:"] * (len(headings) - words), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
