"""What was left out and why: one unreadable image among thousands must not stop a run, nor vanish in silence."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

from diptych.errors import UserError
from diptych.io import write_bytes


@dataclass(kw_only=True, slots=True)
class SkippedItems:
    """Collects skipped items, from any thread."""

    max_skipped_share: float = 0.01
    """Share of unreadable items that is tolerated, 0 to 1."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Key of each skipped item -> why."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.reasons)

    def record(self, key: str, error: Exception | str) -> None:
        with self._lock:
            self.reasons[key] = str(error)

    def check(self, total: int) -> None:
        """Raises UserError when more than the tolerated share of ``total`` items is skipped, or every one of them.

        With the total known, it may be called at any time: the share only grows.
        """
        count = len(self)
        if count == 0 or (count < total and count <= self.max_skipped_share * total):
            return
        first = "; ".join(sorted(self.reasons.values())[:3])
        more = f"; and {count - 3} more" if count > 3 else ""
        raise UserError(
            f"{count} of {total} items are unreadable, over the tolerated {self.max_skipped_share:.1%}: {first}{more}; "
            "mend or remove them, or raise max_skipped_share"
        )

    def write(self, path: Path) -> None:
        """One JSON object {key, reason} per line, in the order of the keys, atomically."""
        lines = [json.dumps({"key": key, "reason": self.reasons[key]}) + "\n" for key in sorted(self.reasons)]
        write_bytes(path, "".join(lines).encode())
