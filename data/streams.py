"""Rows as they arrive, for corpora that do not fit on a disk: a source `stream:DATASET#split`.

    stream:parler-tts/mls_eng#train                      a dataset of the Hub
    stream:openslr/librispeech_asr#all:train.clean.360   of which a configuration is named too
    stream:/corpora/parquet#train                        a folder

`datasets` reads the files of the dataset one after the other. Every data loader worker of every process reads files of
its own, in an order drawn by the seed and shuffled further in a buffer; where there are fewer files than workers, each
takes every so many rows. The columns are those of a manifest; the transcript may be called `transcript` or `sentence`.

A stream has no length, so that a run needs `max_steps`. A resumed run reads again what it has had, without decoding
it, and goes on at the same row, if it has as many processes and workers as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from .manifests import text_fault

PREFIX = "stream:"
SHUFFLE_BUFFER = 1000  # rows that are shuffled together, in every worker
TRANSCRIPTS = ("text", "transcript", "sentence")


class Arrived(NamedTuple):
    """A row of a stream: where it stood, the optimiser step it is for, and what is wrong with it, if anything is."""

    place: str
    step: int
    row: dict[str, Any]
    fault: str | None


class StreamRows:
    """The rows of a stream, over and over.

    Args:
        source: its name in errors.
        columns: the columns every row must have, `"audio"` first.
        stream: a `datasets.IterableDataset`, its audio left encoded.
    """

    def __init__(self, source: str, columns: Sequence[str], stream: Any):
        self.source, self.columns, self.stream = source, tuple(columns), stream

    def arriving(
        self, seed: int, first_step: int, batch_size: int, accumulation: int, process: int, processes: int
    ) -> Iterator[Arrived]:
        """Yields the rows of this data loader worker of one process, from an optimiser step on.

        Args:
            seed: of the order.
            first_step: optimiser steps that were taken before.
            batch_size: rows of a batch of one process.
            accumulation: batches of one process in an optimiser step.
            process, processes: which of how many this is.

        Raises:
            ValueError: there are no rows for this worker.
        """
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # Batch j of a process is worker j % workers's. A loader that begins at another batch than 0 asks its workers
        # from the first on all the same, so that each goes on for the one whose turn it is.
        first = first_step * accumulation + number
        part = first % workers
        rows = self._part(process * workers + part, processes * workers, seed)
        rows = islice(rows, len(range(part, first, workers)) * batch_size, None)
        for batch in count(first, workers):
            for place, row in islice(rows, batch_size):
                yield Arrived(place, batch // accumulation, row, text_fault(row | {"audio": ""}, self.columns))

    def _part(self, number: int, parts: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields what one of so many workers reads, and where it stood."""
        by_files = self.stream.num_shards >= parts
        own = self.stream.shard(parts, number) if by_files else self.stream
        own = own.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in count():
            own.set_epoch(epoch)
            place = 0
            for place, row in enumerate(_rows(own) if by_files else islice(_rows(own), number, None, parts), 1):
                yield f"epoch {epoch}, part {number + 1} of {parts}, row {place}", self._form(row)
            if not place:
                raise ValueError(
                    f"{self.source} has no rows for worker {number + 1} of {parts}; use fewer processes or workers."
                )

    def _form(self, row: dict[str, Any]) -> dict[str, Any]:
        if "text" in self.columns:
            row = row | {"text": next((row[name] for name in TRANSCRIPTS if name in row), None)}
        return {name: row[name] for name in self.columns if name in row}


def _rows(stream: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of all files: iterated plainly, `datasets` shares out the files among workers by itself."""
    for batch in stream.iter(batch_size=16):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def open_stream(source: str, columns: Sequence[str]) -> StreamRows:
    """Returns the rows of a source `stream:...`.

    Raises:
        ValueError: there is no such dataset, or it has no recordings.
    """
    import datasets

    name, _, split = source.removeprefix(PREFIX).partition("#")
    config, colon, named = split.rpartition(":")
    try:
        stream = datasets.load_dataset(name, config if colon else None, split=named or "train", streaming=True)
    except Exception as error:  # whatever the Hub, the network or the dataset's files raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source} can't be streamed: {reason}; check its name and its split.") from error
    names = stream.column_names
    if names is not None and "audio" not in names:
        raise ValueError(f"{source} has the columns {', '.join(names)}; audio must be among them.")
    return StreamRows(source, columns, stream.cast_column("audio", datasets.Audio(decode=False)))
