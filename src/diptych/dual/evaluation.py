"""The command `evaluate` on a run of a dual encoder.

Where the source has captions, it measures retrieval and the modality gap; where it has labels, zero-shot accuracy and,
if asked for, a linear probe.

Shapes: I images, T texts, C classes, D width of the space, W width of the image tower.
"""

from collections.abc import Callable
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
from diptych.dual.model import DualEncoder, open_dual
from diptych.errors import UserError
from diptych.eval.probe import linear_probe
from diptych.io import write_bytes
from diptych.nn.inference import Device, eval_mode
from diptych.report import print_metrics
from diptych.report.progress import ProgressLine
from diptych.run_folder import write_json

_MAPPED = 8192
"""Largest number of pairs on the map, as in ITO's figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedImages:
    """The readable images of a source with their embeddings."""

    source: Source
    items_I: np.ndarray
    """Number of each image's item in the source."""
    embedding_ID: Float[Tensor, "I D"]
    """L2-normalized embeddings, to be compared with those of texts."""
    state_IW: Float[Tensor, "I W"]
    """Output of the image tower before the projection; a linear probe reads it, as in CLIP's paper."""

    @property
    def labels(self) -> list[str] | None:
        """The label of each image. None where an image has none, or where all are the same and so tell nothing."""
        found = [label for item in self.items_I if (label := self.source.label(int(item))) is not None]
        return found if len(found) == len(self.items_I) and len(set(found)) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPairs:
    """L2-normalized embeddings of the images that have captions, and of all these captions."""

    images_ID: Float[Tensor, "I D"]
    texts_TD: Float[Tensor, "T D"]
    image_of_T: Int[Tensor, "T"]
    """Row of each text's image; the texts of an image lie together."""

    @property
    def first_ID(self) -> Float[Tensor, "I D"]:
        """The embedding of each image's first text."""
        counts_I = self.image_of_T.bincount(minlength=len(self.images_ID))
        return self.texts_TD[counts_I.cumsum(0) - counts_I]


def evaluate_dual_run(
    run: Path, data: str, *, train: str | None, umap: bool, limit: int | None, out: Path, device: Device
) -> None:
    """Score a run on the source ``data``: print a table and write ``metrics.json`` and, with ``umap``, ``umap.png``.

    ``train`` is a labelled source to fit a linear probe to; ``limit`` scores the first so many images of ``data`` only.
    Raises UserError for a source that has nothing to score by.
    """
    source = open_finite(data, Columns())
    if umap:
        import_umap()  # before the work, not after it
        if not source.has_captions:
            raise UserError(f"{data}: has no captions, and a map shows images and captions: leave --umap away")
    encoder = open_dual(run, device=device)
    images = embed_source(encoder, source, limit=limit, advance=ProgressLine("embedding images"))
    metrics: dict[str, float] = {"images": len(images.items_I)}
    map_png = None
    if source.has_captions:
        pairs = embed_pairs(encoder, images)
        metrics |= score_pairs(pairs)
        if umap:
            map_png = modality_map({run.name: (pairs.images_ID[:_MAPPED], pairs.first_ID[:_MAPPED])})
    if images.labels is not None:
        train_images = embed_source(encoder, open_finite(train, Columns())) if train else None
        metrics |= score_classes(encoder, images, train=train_images)
    elif train or not source.has_captions:
        raise UserError(f"{data}: has no labels{'' if train else ' and no captions'} to score by")
    print_metrics(metrics, title=f"{run} on {data}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {**metrics, "source": data})
    if map_png:
        write_bytes(out / "umap.png", map_png)
    print(f"written to {out}")


def embed_source(
    encoder: DualEncoder,
    source: Source,
    *,
    limit: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> EmbeddedImages:
    """Embed every readable image of a source, or of its first ``limit`` items.

    ``advance`` is called with the number of items that are done and that of all.
    Raises UserError where the source has no images or too many are unreadable, and for a ``limit`` below 1.
    """
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    chosen = np.arange(min(len(source), limit or len(source)))
    items, embeddings, states = [], [], []
    for pixels_B3HW, found in image_batches(source, chosen, size=encoder.image_size, skipped=SkippedItems(), rows=64):
        with eval_mode(encoder):
            output = encoder.encode_images(pixels_B3HW.to(encoder.scale.device) / 255)
        items.append(found)
        embeddings.append(F.normalize(output.pooled_BD, dim=-1))
        states.append(output.state_BW)
        advance(int(found[-1]) + 1, len(chosen))
    return EmbeddedImages(
        source=source, items_I=np.concatenate(items), embedding_ID=torch.cat(embeddings), state_IW=torch.cat(states)
    )


def embed_pairs(encoder: DualEncoder, images: EmbeddedImages) -> EmbeddedPairs:
    """Embed the captions of ``images``. Raises UserError where no image has one."""
    captions = [images.source.captions(int(item)) for item in images.items_I]
    captioned = [row for row, texts in enumerate(captions) if texts]
    if not captioned:
        raise UserError(f"{images.source.name}: none of its images has a caption")
    counts = torch.tensor([len(captions[row]) for row in captioned])
    device = images.embedding_ID.device
    return EmbeddedPairs(
        images_ID=images.embedding_ID[torch.tensor(captioned, device=device)],
        texts_TD=encoder.embed_texts([text for texts in captions for text in texts]),
        image_of_T=torch.arange(len(captioned)).repeat_interleave(counts).to(device),
    )


def score_pairs(pairs: EmbeddedPairs) -> dict[str, float]:
    """Retrieval with all captions, and the modality gap by the first caption of each image."""
    gap = modality_gap(pairs.images_ID, pairs.first_ID)
    found = retrieval(pairs.images_ID, pairs.texts_TD, image_of_T=pairs.image_of_T)
    return {f"retrieval/{name}": value for name, value in found.table().items()} | {
        f"modality/{name}": value for name, value in asdict(gap).items()
    }


def score_classes(
    encoder: DualEncoder, images: EmbeddedImages, *, train: EmbeddedImages | None = None
) -> dict[str, float]:
    """Zero-shot accuracy with one prompt and with the ensemble, and that of a linear probe fitted to ``train``.

    ``images`` must have labels: the names of the classes, with underscores for spaces. Raises UserError where
    ``train`` has none.
    """
    labels, train_labels = images.labels, train.labels if train else []
    assert labels is not None
    if train_labels is None:
        assert train is not None
        raise UserError(f"{train.source.name}: has no labels to fit a probe to: sort it into a folder for each class")
    classes = sorted({*labels, *train_labels})
    place = {label: number for number, label in enumerate(classes)}
    labels_I, train_N = (
        torch.tensor([place[label] for label in some], device=images.state_IW.device) for some in (labels, train_labels)
    )
    metrics: dict[str, float] = {"classes": len(classes)}
    for title, templates in (("zero_shot", ENSEMBLE), ("zero_shot_one_prompt", PLAIN)):
        classes_CD = class_embeddings(encoder.embed_texts, classes, templates=templates)
        accuracy = class_accuracy(images.embedding_ID @ classes_CD.T, labels_I)
        metrics |= {f"{title}/{name}": value for name, value in asdict(accuracy).items()}
    if train is not None:
        probe = linear_probe(train.state_IW, train_N, images.state_IW, labels_I)
        metrics |= {f"linear_probe/{name}": value for name, value in asdict(probe).items()}
    return metrics
