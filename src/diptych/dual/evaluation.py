"""How good a dual encoder is on a source: retrieval and modality gap by its captions, classification by its labels.

Shapes: I images, T texts, C classes, D width of the space, W width of the image tower.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source, open_finite
from diptych.data.sources.columns import Columns
from diptych.dual.metrics import (
    ENSEMBLE,
    PLAIN,
    class_accuracy,
    class_embeddings,
    import_umap,
    modality_gap,
    modality_map,
    retrieval,
)
from diptych.dual.model import DualEncoder
from diptych.dual.search import open_dual
from diptych.errors import UserError
from diptych.eval.probe import linear_probe
from diptych.io import write_bytes
from diptych.nn.inference import Device, eval_mode
from diptych.report import print_metrics
from diptych.run_folder import write_json

_MAPPED = 8192
"""Pairs on the map, as many as in ITO's figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The readable images of a source."""

    source: Source
    items_I: np.ndarray
    """Their places in the source."""
    embedding_ID: Float[Tensor, "I D"]
    """L2-normalised: what is compared with texts."""
    state_IW: Float[Tensor, "I W"]
    """Of the image tower before the projection: what a linear probe reads, as in CLIP's paper."""

    @property
    def labels(self) -> list[str] | None:
        """None where an image has none, or all have the same: a folder is not always a class."""
        found = [label for item in self.items_I if (label := self.source.label(int(item))) is not None]
        return found if len(found) == len(self.items_I) and len(set(found)) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The embeddings of the images that have captions, and of all these captions."""

    images_ID: Float[Tensor, "I D"]
    texts_TD: Float[Tensor, "T D"]
    image_of_T: Int[Tensor, "T"]
    """Row of each text's image; the texts of an image lie together."""

    @property
    def first_ID(self) -> Float[Tensor, "I D"]:
        """The first text of each image."""
        counts_I = self.image_of_T.bincount(minlength=len(self.images_ID))
        return self.texts_TD[counts_I.cumsum(0) - counts_I]


def evaluate_dual_run(
    run: Path, data: str, *, train: str | None, umap: bool, limit: int | None, out: Path, device: Device
) -> None:
    """Score a run on the source ``data``: a table, ``metrics.json`` and, if asked for, ``umap.png`` in ``out``."""
    source = open_finite(data, Columns())
    if umap:
        import_umap()  # before the work, not after it
        if not source.has_captions:
            raise UserError(f"{data}: has no captions, and a map shows images and captions: leave --umap away")
    encoder = open_dual(run, device=device)
    seen = look_at(encoder, source, limit=limit)
    metrics: dict[str, float] = {"images": len(seen.items_I)}
    picture = None
    if source.has_captions:
        pairs = embed_pairs(encoder, seen)
        metrics |= score_pairs(pairs)
        if umap:
            picture = modality_map({run.name: (pairs.images_ID[:_MAPPED], pairs.first_ID[:_MAPPED])})
    if seen.labels is not None:
        learnt_from = look_at(encoder, open_finite(train, Columns())) if train else None
        metrics |= score_classes(encoder, seen, train=learnt_from)
    elif train or not source.has_captions:
        raise UserError(f"{data}: has no labels{'' if train else ' and no captions'} to score by")
    print_metrics(metrics, title=f"{run} on {data}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {**metrics, "source": data})
    if picture:
        write_bytes(out / "umap.png", picture)
    print(f"written to {out}")


def look_at(encoder: DualEncoder, source: Source, *, limit: int | None = None) -> Seen:
    """Every image once, or the first ``limit``. Raises UserError where there is none."""
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    chosen = np.arange(min(len(source), limit or len(source)))
    items, embeddings, states = [], [], []
    for pixels_B3HW, found in image_batches(source, chosen, size=encoder.image_size, skipped=SkippedItems(), rows=64):
        with eval_mode(encoder):
            features = encoder.encode_images(pixels_B3HW.to(encoder.scale.device) / 255)
        items.append(found)
        embeddings.append(F.normalize(features.pooled_BD, dim=-1))
        states.append(features.state_BW)
    return Seen(
        source=source, items_I=np.concatenate(items), embedding_ID=torch.cat(embeddings), state_IW=torch.cat(states)
    )


def embed_pairs(encoder: DualEncoder, seen: Seen) -> Pairs:
    """Raises UserError where no image has a caption."""
    captions = [seen.source.captions(int(item)) for item in seen.items_I]
    captioned = [row for row, texts in enumerate(captions) if texts]
    if not captioned:
        raise UserError(f"{seen.source.name}: none of its images has a caption")
    counts = torch.tensor([len(captions[row]) for row in captioned])
    device = seen.embedding_ID.device
    return Pairs(
        images_ID=seen.embedding_ID[torch.tensor(captioned, device=device)],
        texts_TD=encoder.embed_texts([text for texts in captions for text in texts]),
        image_of_T=torch.arange(len(captioned)).repeat_interleave(counts).to(device),
    )


def score_pairs(pairs: Pairs) -> dict[str, float]:
    """Retrieval with all captions, and the modality gap by the first caption of each image."""
    gap = modality_gap(pairs.images_ID, pairs.first_ID)
    found = retrieval(pairs.images_ID, pairs.texts_TD, image_of_T=pairs.image_of_T)
    return {f"retrieval/{name}": value for name, value in found.table().items()} | {
        f"modality/{name}": value for name, value in asdict(gap).items()
    }


def score_classes(encoder: DualEncoder, seen: Seen, *, train: Seen | None = None) -> dict[str, float]:
    """Zero-shot accuracy by one prompt and by the ensemble, and that of a linear probe fitted to ``train``.

    Labels are the names of the classes, with underscores for spaces.
    """
    labels, train_labels = seen.labels, train.labels if train else []
    assert labels is not None
    if train_labels is None:
        assert train is not None
        raise UserError(f"{train.source.name}: has no labels to fit a probe to: sort it into a folder for each class")
    classes = sorted({*labels, *train_labels})
    place = {label: number for number, label in enumerate(classes)}
    labels_I, train_N = (
        torch.tensor([place[label] for label in some], device=seen.state_IW.device) for some in (labels, train_labels)
    )
    metrics: dict[str, float] = {"classes": len(classes)}
    for title, templates in (("zero_shot", ENSEMBLE), ("zero_shot_one_prompt", PLAIN)):
        classes_CD = class_embeddings(encoder.embed_texts, classes, templates=templates)
        accuracy = class_accuracy(seen.embedding_ID @ classes_CD.T, labels_I)
        metrics |= {f"{title}/{name}": value for name, value in asdict(accuracy).items()}
    if train is not None:
        probe = linear_probe(train.state_IW, train_N, seen.state_IW, labels_I)
        metrics |= {f"linear_probe/{name}": value for name, value in asdict(probe).items()}
    return metrics
