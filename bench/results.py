"""A run's results: one JSON file, whole at every moment, and kept where the run is interrupted."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simcse.errors import UserError
from simcse.files import write_text

Row = dict[str, Any]


class Results:
    """Rows of a job on their way to ``folder/job.json``; the file is replaced after every case."""

    def __init__(self, job: str, folder: Path, **head: Any) -> None:
        self.path = folder / f"{job}.json"
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.document: dict[str, Any] = {"job": job, "started": started, **head, "complete": False, "rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]  # type: ignore[no-any-return]

    def add(self, rows: list[Row]) -> None:
        self.rows.extend(rows)
        self.save()

    def close(self) -> None:
        self.document["complete"] = True
        self.save()

    def save(self) -> None:
        head = {name: value for name, value in self.document.items() if name != "rows"}
        # A row a line: differences between two runs can be read.
        rows = ",\n".join(json.dumps(_short(row), ensure_ascii=False) for row in self.rows)
        text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{rows}\n]\n}}\n'
        write_text(self.path, text)


def _short(value: Any) -> Any:
    """Numbers to five digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {name: _short(x) for name, x in value.items()}
    return [_short(x) for x in value] if isinstance(value, list) else value


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Job → its document, of every result in a folder."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); remove it, or choose another folder") from None
        if isinstance(document, dict) and {"job", "rows"} <= document.keys():
            found[document["job"]] = document
    return found
