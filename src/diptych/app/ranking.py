"""The Audit tab: pairs that fit worst first, what users say of them, and the file of what is kept."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from diptych.data.audit import Finding, Fit, audit, write_keep
from diptych.data.pixels import SkippedItems
from diptych.data.sources import Source
from diptych.dual.evaluation import pair_fits as dual_pair_fits
from diptych.dual.model import DualEncoder
from diptych.errors import UserError
from diptych.io import write_bytes
from diptych.itit.evaluation import pair_fits as itit_pair_fits
from diptych.itit.pipeline import Diptych

Advance = Callable[[str, int, int], None]
"""Called with what is done, and the number of items that are done and of all."""


class Ranking:
    """The findings on a source, shared by all users, and their decisions: one row of ``audit.jsonl`` each."""

    def __init__(self, source: Source, *, out: Path) -> None:
        """Raises UserError for a source without captioned images."""
        if not (source.has_images and source.has_captions):
            raise UserError(f"{source.name}: an audit needs images with captions")
        self.source, self.out, self.findings = source, out, list[Finding]()
        self.keep_file, self._file = out / "keep.jsonl", out / "audit.jsonl"
        self._lock = threading.Lock()

    @property
    def shown(self) -> list[Finding]:
        """The findings on which a user can decide: captions, and images that are themselves at fault."""
        return [found for found in self.findings if found.caption or not found.kept or found.decided is not None]

    def rank(self, network: Diptych | DualEncoder, *, worst: float, advance: Advance) -> None:
        """Look at all pairs anew. The ``worst`` share of captions is dropped unless a user keeps it."""
        skipped = SkippedItems(max_skipped_share=1.0)
        pair_fits: Callable[..., list[Fit]] = dual_pair_fits if isinstance(network, DualEncoder) else itit_pair_fits
        fits = pair_fits(
            network, self.source, skipped=skipped, advance=lambda done, total: advance("reading captions", done, total)
        )
        findings = audit(
            self.source, fits, worst=worst, advance=lambda done, total: advance("comparing images", done, total)
        )
        with self._lock:
            decided = self._decided()
            for found in findings:
                found.decided = decided.get((found.key, found.caption))
            self.findings = findings
            write_keep(findings, self.keep_file)

    def decide(self, found: Finding, keep: bool) -> None:
        """Keep a caption with its image, or not; on disk when this returns, together with the file of what is kept."""
        with self._lock:
            found.decided = keep
            decided = self._decided() | {(found.key, found.caption): keep}
            rows = [{"key": key, "caption": caption, "keep": kept} for (key, caption), kept in decided.items()]
            write_bytes(self._file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            write_keep(self.findings, self.keep_file)

    def _decided(self) -> dict[tuple[str, str], bool]:
        try:
            rows = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.is_file() else []
            return {(row["key"], row["caption"]): bool(row["keep"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._file}: not what the page wrote ({error}); mend or remove it") from None
