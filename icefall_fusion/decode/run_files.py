"""What a decoding run leaves as it goes: N-best lists and the cost of each batch; a kill loses one batch.
Knows: JSON lines, N-best lists, options as plain values. Must not know: methods, models, searches.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from icefall_fusion.common.counters import add_counters
from icefall_fusion.common.files import PathLike, atomic_path, name_full_disk
from icefall_fusion.nbest import NBest, NBestLog, write_nbests


class MethodLog:
    """The N-best lists of one method on one test set and, batch by batch, what they cost.

    ``nbest-<test set>-<method>.jsonl`` has a line an utterance; ``work-...jsonl`` first the options, then a
    line a batch, written after the batch's lists. On opening, lists of a batch without its line are dropped:
    such a batch was cut short and is decoded again.

    Args:
        folder: of the run.
        test_set: part of the file names.
        method: part of the file names.
        options: what the method received; a run goes on only under the same.
        restart: drop what is there.

    Raises:
        ValueError: what is there was made with other options (the first that differs is named).
    """

    def __init__(
        self, folder: PathLike, test_set: str, method: str, options: Mapping[str, Any], restart: bool = False
    ) -> None:
        self.nbest_path = Path(folder) / f"nbest-{test_set}-{method}.jsonl"
        self.work_path = Path(folder) / f"work-{test_set}-{method}.jsonl"
        options = json.loads(json.dumps(options))  # as they will be read back
        if restart:
            self.work_path.unlink(missing_ok=True)
        self.work = self._read_work(options, method)
        whole = {utterance for line in self.work for utterance in line["ids"]}
        if restart:
            self.nbest_path.unlink(missing_ok=True)
        log = NBestLog(self.nbest_path)
        kept = [utterance for utterance in log.done if utterance in whole]
        if len(kept) < len(log.done):
            log.close()
            write_nbests(self.nbest_path, map(log.done.__getitem__, kept))
            log = NBestLog(self.nbest_path)
        self._log = log
        self._file = open(self.work_path, "a", encoding="utf-8")

    def _read_work(self, options: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
        lines = _whole_lines(self.work_path)
        if len(lines) <= 1:  # nothing was decoded yet, so other options can do no harm
            self.work_path.parent.mkdir(parents=True, exist_ok=True)
            _write_lines(self.work_path, [{"options": options}])
            return []
        for name in sorted({*options, *lines[0]["options"]}):
            then, now = lines[0]["options"].get(name), options.get(name)
            if then != now:
                raise ValueError(
                    f"out must be a new folder (or --restart true), for {self.work_path.parent} holds a run "
                    f"of {method} with {name} = {then!r}, which is now {now!r}"
                )
        _write_lines(self.work_path, lines)
        return lines[1:]

    @property
    def done(self) -> Mapping[str, NBest]:
        """Finished lists by utterance, which lie in the file."""
        return self._log.done

    def append(self, nbests: Sequence[NBest], work: Mapping[str, Any]) -> None:
        """Write the lists of a batch, then its line of work."""
        self._log.append(nbests)
        line = {"ids": [nbest.utterance for nbest in nbests], **work}
        with name_full_disk(self.work_path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self.work.append(line)

    def totals(self) -> dict[str, float]:
        """Return all numbers in the lines of work, added up as `add_counters` does."""
        totals: dict[str, float] = {}
        for line in self.work:
            add_counters(totals, {name: value for name, value in line.items() if name != "ids"})
        return totals

    def close(self) -> None:
        """Close both files."""
        self._log.close()
        self._file.close()

    def remove(self) -> None:
        """Close both files and delete them, the work first: lists without their work count for nothing."""
        self.close()
        self.work_path.unlink()
        self.nbest_path.unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
