"""The Label tab: which images are offered, most useful first, and where the decisions on their captions go. The Audit
tab: pairs that fit worst first, and what users decide on them.

Decisions are rows of a jsonl with one row for each image, which is a source: `file_name`, `caption` (empty for a
rejected one), `decision` and `proposed`. Each is on disk before the next image is shown. A file is replaced whole, so
that a kill at any moment leaves every decision that was confirmed.

Shapes: N images, M images that were offered before, D features.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.data.audit import Finding, Fit, audit, write_keep
from diptych.data.caption_file import path_in_table
from diptych.data.pixels import SkippedItems, read_image
from diptych.data.sources import Source
from diptych.data.sources.open import HasFiles
from diptych.data.sources.text import clean
from diptych.data.suggest import choose_images
from diptych.dual.evaluation import pair_fits as dual_pair_fits
from diptych.dual.model import DualEncoder
from diptych.errors import UserError
from diptych.io import write_bytes
from diptych.itit.confidence import Confidence, made_by
from diptych.itit.evaluation import pair_fits as itit_pair_fits
from diptych.itit.pipeline import Caption, Diptych

_POOL = 64
"""Images that are captioned at once and then put in order."""
_BEAMS = 4


class Labels:
    """The captions that users accept for the images of a source."""

    def __init__(self, source: Source, *, file: Path, sidecars: bool = False) -> None:
        """With ``sidecars`` captions also go beside the images.

        Raises UserError for a source without images, for one whose images are no files where sidecars are wanted, and
        for a damaged ``file``.
        """
        if not source.has_images:
            raise UserError(f"{source.name}: has no images to label")
        self.source, self.file, self.sidecars = source, file, sidecars
        self.names = _names(source)
        if sidecars and not all(Path(name).is_file() for name in self.names):
            raise UserError(f"--sidecars: the images of {source.name} are no files, so no text can lie beside them")
        self._lock = threading.Lock()
        own = self._own(self._rows())
        self.open = [
            item
            for item in range(len(source))
            if self._listed(item) not in own and not source.captions(item) and not self._has_other_row(item)
        ]
        """Items that had neither a caption nor a decision when the source was opened."""

    def decide(self, item: int, caption: str | None, *, proposed: str) -> None:
        """Save a caption of an item; None rejects the image. A later decision replaces an earlier one.

        Raises UserError where a caption is there that the page did not write: it stays as it is.
        """
        text = clean(caption) if caption is not None else ""
        if caption is not None and not text:
            raise UserError("an empty caption: write one, or reject the image")
        decision = "rejected" if caption is None else "accepted" if text == clean(proposed) else "edited"
        row = {"file_name": self._listed(item), "caption": text, "decision": decision, "proposed": proposed}
        with self._lock:  # the file is read again each time: another process may have written to it
            rows = self._rows()
            earlier = self._own(rows).get(row["file_name"])
            if any(r.get("file_name") == row["file_name"] and r is not earlier for r in rows):
                raise UserError(f"{self.file}: has a row of {row['file_name']} that is not of the page; it stays")
            if self.sidecars:
                self._write_sidecar(Path(self.names[item]).with_suffix(".txt"), text, earlier)
            rows = [row if r is earlier else r for r in rows] if earlier else [*rows, row]
            write_bytes(self.file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())

    def caption_of(self, item: int) -> str:
        """The caption that was accepted for an item, empty where there is none."""
        return self._own(self._rows()).get(self._listed(item), {}).get("caption", "")

    def counts(self) -> Counter[str]:
        """Number of images by decision, and of those that are `left`."""
        own = self._own(self._rows())
        counts = Counter(row["decision"] for row in own.values())
        counts["left"] = sum(self._listed(item) not in own for item in self.open)
        return counts

    def decided(self) -> set[int]:
        """Items on which there is a decision."""
        own = self._own(self._rows())
        return {item for item in self.open if self._listed(item) in own}

    def _listed(self, item: int) -> str:
        return path_in_table(self.names[item], self.file)

    def _has_other_row(self, item: int) -> bool:
        return any(row.get("file_name") == self._listed(item) for row in self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self.file.read_text().splitlines() if self.file.is_file() else [], start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{self.file}: line {number} is no JSON object; mend it, or give another --out")
            rows.append(row)
        return rows

    @staticmethod
    def _own(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The rows that the page wrote, by image."""
        return {row["file_name"]: row for row in rows if {"file_name", "decision", "proposed"} <= row.keys()}

    @staticmethod
    def _write_sidecar(text: Path, caption: str, earlier: dict[str, Any] | None) -> None:
        """Before the row: a kill between the two then loses nothing."""
        written = text.read_text() if text.exists() else None
        ours = earlier is not None and written == earlier["caption"] + "\n"
        if written is not None and not ours and written != caption + "\n":
            raise UserError(f"{text}: holds a caption that is not of the page; it stays as it is")
        if caption:
            write_bytes(text, (caption + "\n").encode())
        elif ours:
            text.unlink()


def _names(source: Source) -> list[str]:
    """The paths of the images where they are files, else the keys of the items."""
    items = range(len(source))
    # To ask inside a tar would read every image of it.
    if isinstance(source, HasFiles) and len(source) and isinstance(source.file(0), Path):
        return [str(source.file(item)) for item in items]
    return [source.key(item) for item in items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An image to label."""

    item: int
    name: str
    candidates: Sequence[Caption]
    """Best first; at least one."""
    confidence: float | None = None
    """Expected quality of the first candidate, from 0 to 1, where the run is calibrated."""


class Offers:
    """The images of :class:`Labels` for all users of the page, each image to one of them."""

    def __init__(self, labels: Labels, diptych: Diptych, *, confidence: Confidence | None = None) -> None:
        """``confidence``: that of the captions of :func:`label_confidence`."""
        self.labels, self.diptych, self.confidence = labels, diptych, confidence
        order = torch.randperm(len(labels.open), generator=torch.Generator().manual_seed(0)).tolist()
        self._waiting = [labels.open[place] for place in order]
        self._ready: list[Offer] = []
        self._held: dict[str, int] = {}
        self._seen_MD: np.ndarray | None = None
        self._lock = threading.Lock()

    def take(self, user: str) -> Offer | None:
        """The next image for a user, who holds it until the next call; None where no other is left."""
        with self._lock:
            self._held.pop(user, None)
            decided = self.labels.decided()
            self._ready = [offer for offer in self._ready if offer.item not in decided]
            while True:
                for offer in self._ready:
                    if offer.item not in self._held.values():
                        self._held[user] = offer.item
                        return offer
                if not self._waiting:
                    return None
                self._prepare()

    def put_back(self, offer: Offer) -> None:
        """Leave an image undecided: it comes again after those that are ready."""
        with self._lock:
            self._ready = [*(each for each in self._ready if each.item != offer.item), offer]

    def release(self, user: str) -> None:
        """Offer the image of a user who has closed the page to others."""
        with self._lock:
            self._held.pop(user, None)

    @torch.no_grad()
    def _prepare(self) -> None:
        some, self._waiting = self._waiting[:_POOL], self._waiting[_POOL:]
        items, images, skipped = [], [], SkippedItems(max_skipped_share=1.0)
        for item in some:
            image = read_image(self.labels.source, item, size=self.diptych.image_size, skipped=skipped)
            if image is not None:
                items.append(item)
                images.append(image)
        if not items:
            return
        encoded = self.diptych.encode(np.stack(images))
        found = self.diptych.candidates_encoded(encoded, count=_BEAMS)
        features_ND = self.diptych.vectors(encoded).cpu().numpy()
        uncertainty_N = np.array([-(each[0].score or 0.0) if each else np.inf for each in found])
        seen_MD = features_ND[:0] if self._seen_MD is None else self._seen_MD
        order = choose_images(features_ND, seen_MD, uncertainty_N=uncertainty_N, count=len(items)).rows
        self._seen_MD = np.concatenate([seen_MD, features_ND])
        nothing = [Caption(text="", score=None)]
        self._ready += [
            Offer(
                item=items[n],
                name=self.labels.names[items[n]],
                candidates=found[n] or nothing,
                confidence=self._confidence_of(found[n]),
            )
            for n in order
        ]

    def _confidence_of(self, candidates: Sequence[Caption]) -> float | None:
        if self.confidence is None or not candidates or candidates[0].score is None:
            return None
        return self.confidence(candidates[0].score)


def label_confidence(run: Path, diptych: Diptych) -> Confidence | None:
    """The confidence of the captions that :class:`Offers` proposes, if the run was calibrated for their beams."""
    return Confidence.of(run, made_by(diptych, beams=None, candidates=_BEAMS))


# The Audit tab

TellProgress = Callable[[str, int, int], None]
"""Called with a description of the work, the number of finished items and the number of all items."""


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

    def rank(self, network: Diptych | DualEncoder, *, worst: float, advance: TellProgress) -> None:
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
