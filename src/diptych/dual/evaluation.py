"""The command `evaluate` on a run of a dual encoder.

Where the source has captions, it measures retrieval and the modality gap; where it has labels, zero-shot accuracy and,
if asked for, a linear probe.

Shapes: I images, T texts, C classes, D width of the space, W width of the image tower.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.audit import Fit, fits_of
from diptych.data.check import note_on_learned, note_on_lengths, open_data_of
from diptych.data.class_texts import are_codes, name_classes, read_names
from diptych.data.engine import LOCAL, Engine, Rows
from diptych.data.pixels import (
    ReadableImages,
    SkippedItems,
    channels_first,
    paired_items,
    read_block,
)
from diptych.data.sources import Source, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.data.suggest import AssessedImages
from diptych.dual.metrics import (
    ENSEMBLE,
    PLAIN,
    RightTargets,
    class_accuracy,
    class_embeddings,
    import_umap,
    modality_gap,
    modality_map,
    retrieval,
)
from diptych.dual.model import DualEncoder, open_dual
from diptych.encoders import open_image_encoder
from diptych.encoders.text import clean_for_clip
from diptych.errors import UserError, first_line
from diptych.eval.baselines import Baseline, Comparison, chance_of_recall, neighbour_word_embeddings
from diptych.eval.probe import linear_probe
from diptych.io import write_bytes
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.report.terminal import ProgressLine, print_comparison, print_metrics
from diptych.run_folder import write_json

_MAPPED = 8192
"""Largest number of pairs on the map, as in ITO's figure."""
_ROWS = 64
"""Number of images read and embedded at once."""


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

    @property
    def unlabelled(self) -> int:
        """Number of images without a label."""
        return sum(self.source.label(int(item)) is None for item in self.items_I)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPairs:
    """L2-normalized embeddings of the images that have captions, and of all these captions."""

    images_ID: Float[Tensor, "I D"]
    texts_TD: Float[Tensor, "T D"]
    image_of_T: Int[Tensor, "T"]
    """Row of each text's image; the texts of an image lie together."""
    wording_T: Int[Tensor, "T"]
    """Number of each text's wording; texts that differ only in case have the same one."""

    @property
    def first_ID(self) -> Float[Tensor, "I D"]:
        """The embedding of each image's first text."""
        counts_I = self.image_of_T.bincount(minlength=len(self.images_ID))
        return self.texts_TD[counts_I.cumsum(0) - counts_I]

    @property
    def shared(self) -> int:
        """Number of texts that are worded as a text of another image."""
        images_of_W = torch.stack([self.wording_T, self.image_of_T]).unique(dim=1)[0].bincount()
        return int((images_of_W[self.wording_T] > 1).sum())


def evaluate_dual_run(
    run: Path,
    data: str,
    *,
    train: str | None,
    umap: bool,
    limit: int | None,
    out: Path,
    device: Device,
    classes: Path | None = None,
    max_skipped_share: float = 0.01,
    baseline_encoder: str | None = None,
) -> None:
    """Score a run on the source ``data``: print a table and write ``metrics.json`` and, with ``umap``, ``umap.png``.

    ``train`` is a labelled source to fit a linear probe to; ``limit`` scores the first so many images of ``data`` only;
    ``classes`` is a file with the names of the classes; ``max_skipped_share`` is the share of images that may be
    unreadable; ``baseline_encoder`` is an image encoder whose features also find nearest images for the baselines.
    Raises UserError for a source that has nothing to score by.
    """
    source = open_finite(data, Columns())
    if umap:
        import_umap()  # before the work, not after it
        if not source.has_captions:
            raise UserError(f"{data}: has no captions, and a map shows images and captions: leave --umap away")
    encoder = open_dual(run, device=device)
    skipped = SkippedItems(max_skipped_share=max_skipped_share)
    images = embed_source(encoder, source, limit=limit, skipped=skipped, advance=ProgressLine("embedding images"))
    metrics: dict[str, float] = {"images": len(images.items_I)}
    notes: list[str] = []
    map_png = comparison = None
    if source.has_captions:
        pairs = embed_pairs(encoder, images)
        metrics |= score_pairs(pairs)
        comparison = replace(
            compare_retrieval(run, images, pairs, encoder=baseline_encoder, device=device), scores=metrics.copy()
        )
        notes += _shared_captions(pairs) + _long_captions(encoder, images)
        if umap:
            map_png = modality_map({run.name: (pairs.images_ID[:_MAPPED], pairs.first_ID[:_MAPPED])})
    found, label_notes = _score_labels(encoder, images, data=data, train=train, classes=classes)
    metrics |= found
    out.mkdir(parents=True, exist_ok=True)
    notes += label_notes + skipped.report(out / "skipped.jsonl")
    print_metrics(metrics, title=f"{run} on {data}", notes=notes)
    beside = {}
    if comparison is not None:
        told_beside = [*comparison.notes, comparison.verdict()]
        print_comparison(*comparison.table(), title="beside its baselines", notes=told_beside)
        notes, beside = notes + comparison.notes, comparison.record()
    write_json(out / "metrics.json", {**metrics, "skipped": len(skipped), "source": data, "notes": notes, **beside})
    if map_png:
        write_bytes(out / "umap.png", map_png)
    print(f"written to {out}")


_ADVICE = "more pairs, more --minutes, or --start with a model that is trained already"


def compare_retrieval(
    run: Path, images: EmbeddedImages, pairs: EmbeddedPairs, *, encoder: str | None = None, device: Device = "auto"
) -> Comparison:
    """Baselines of retrieval among ``pairs``, from what the run learned from, ahead of the run's own scores.

    They are chance, and images embedded as the words in the captions of the nearest training images. Raises UserError
    where ``encoder`` cannot be opened; a note tells where the data of the run is gone.
    """
    notes = []
    baselines = [Baseline(name="chance", scores=_chance(pairs))]
    opened = open_image_encoder(encoder).to(pick_device(device)) if encoder is not None else None
    items = [item for item in map(int, images.items_I) if images.source.captions(item)]
    texts = [text for item in items for text in images.source.captions(item)]
    try:
        known = open_data_of(run, "pairs")
        notes += note_on_learned(known, range(len(known)), images.source)
        found = neighbour_word_embeddings(
            Subset(known, np.arange(len(known))),
            Subset(images.source, np.array(items)),
            texts,
            encoder=opened,
            encoder_name=encoder or "",
        )
        for name, (images_ID, texts_TD) in found.items():
            by_words = replace(pairs, images_ID=images_ID.to(pairs.images_ID), texts_TD=texts_TD.to(pairs.texts_TD))
            baselines.append(Baseline(name=name, scores=_named(score_retrieval(by_words))))
    except UserError as error:
        notes.append(f"No baselines from the pairs: {first_line(error)}")
    return Comparison(
        source=images.source.name, select="retrieval/mean_r1", baselines=baselines, advice=_ADVICE, notes=notes
    )


def compare_finished(run: Path, encoder: DualEncoder, images: ReadableImages) -> None:
    """Print a finished run beside its baselines on its validation images; write them for its report."""
    embedded = embed_readable(encoder, images)
    pairs = embed_pairs(encoder, embedded)
    comparison = compare_retrieval(run, embedded, pairs)
    comparison = replace(comparison, scores=_named(score_retrieval(pairs)))
    comparison.write(run)
    title = f"{run} beside its baselines on {comparison.source}"
    print_comparison(*comparison.table(), title=title, notes=[*comparison.notes, comparison.verdict()])


def _chance(pairs: EmbeddedPairs) -> dict[str, float]:
    """The scores of a random order."""
    images, texts = len(pairs.images_ID), len(pairs.texts_TD)
    right = RightTargets(images, pairs.image_of_T, pairs.wording_T)
    sides = {
        "image_to_text": ([right.texts_of_images(row, row + 1).sum() for row in range(images)], texts),
        "text_to_image": ([right.images_of_texts(row, row + 1).sum() for row in range(texts)], images),
    }
    found = {
        f"{side}/r{k}": chance_of_recall(torch.stack(counts), targets=targets, k=k)
        for side, (counts, targets) in sides.items()
        for k in (1, 5, 10)
    }
    return _named(found | {"mean_r1": (found["image_to_text/r1"] + found["text_to_image/r1"]) / 2})


def _named(table: dict[str, float]) -> dict[str, float]:
    """The scores of retrieval under their names in `metrics.json`."""
    return {f"retrieval/{name}": value for name, value in table.items()}


def _shared_captions(pairs: EmbeddedPairs) -> list[str]:
    if not pairs.shared:
        return []
    shared = f"{pairs.shared} of {len(pairs.texts_TD)} captions are those of another image too"
    return [f"{shared}: a hit on an equal text, or on an image that has it, is right."]


def _long_captions(encoder: DualEncoder, images: EmbeddedImages) -> list[str]:
    texts = [text for item in images.items_I for text in images.source.captions(int(item))]
    note = note_on_lengths([len(row) for row in encoder.ids(texts)], encoder.max_text_len)
    return [f"{note}."] if note else []


def _score_labels(
    encoder: DualEncoder, images: EmbeddedImages, *, data: str, train: str | None, classes: Path | None
) -> tuple[dict[str, float], list[str]]:
    """Scores by labels, and notes. Raises UserError where there are none, if they are wanted or nothing else is there
    to score."""
    needed = bool(train or classes) or not images.source.has_captions
    if images.labels is not None:
        train_images = embed_source(encoder, open_finite(train, Columns())) if train else None
        found, notes = score_classes(encoder, images, train=train_images, classes=classes)
        if needed and not found:
            raise UserError(f"{data}: {notes[0]}")
        return found, notes
    if needed:
        raise UserError(f"{data}: {_no_labels(images, captions=bool(train or classes))}")
    some = 0 < images.unlabelled < len(images.items_I)
    return {}, [f"{_no_labels(images, captions=True)}: no zero-shot accuracy."] if some else []


def _no_labels(images: EmbeddedImages, *, captions: bool) -> str:
    if 0 < images.unlabelled < len(images.items_I):
        return f"{images.unlabelled} of {len(images.items_I)} images have no label to score by"
    if images.unlabelled:
        return f"has no labels{'' if captions else ' and no captions'} to score by"
    return "all images have the same label, which tells nothing"


def embed_source(
    encoder: DualEncoder,
    source: Source,
    *,
    limit: int | None = None,
    skipped: SkippedItems | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> EmbeddedImages:
    """Embed every readable image of a source, or of its first ``limit`` items.

    ``advance`` is called with the number of items that are done and that of all.
    Raises UserError where the source has no images or too many are unreadable, and for a ``limit`` below 1.
    """
    skipped = SkippedItems() if skipped is None else skipped
    images = readable_images(source, limit=limit, size=encoder.image_size, skipped=skipped)
    return embed_readable(encoder, images, advance=advance)


def readable_images(
    source: Source, *, limit: int | None, size: int, skipped: SkippedItems, cache_mb: int = 0
) -> ReadableImages:
    """The images that retrieval is measured on, in training and afterwards. Raises as :func:`embed_source`."""
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    items = np.arange(min(len(source), limit or len(source)))
    return ReadableImages(source, items, size=size, skipped=skipped, rows=_ROWS, cache_mb=cache_mb)


def embed_readable(
    encoder: DualEncoder, images: ReadableImages, *, advance: Callable[[int, int], None] = lambda done, total: None
) -> EmbeddedImages:
    """Embed images in the batches in which they are read. Raises UserError when too many are unreadable."""
    items, embeddings, states = [], [], []
    for pixels_B3HW, found in images:
        with eval_mode(encoder):
            output = encoder.encode_images(pixels_B3HW.to(encoder.scale.device) / 255)
        items.append(found)
        embeddings.append(F.normalize(output.pooled_BD, dim=-1))
        states.append(output.state_BW)
        advance(sum(map(len, items)), len(images.items))
    return EmbeddedImages(
        source=images.source,
        items_I=np.concatenate(items),
        embedding_ID=torch.cat(embeddings),
        state_IW=torch.cat(states),
    )


def embed_pairs(encoder: DualEncoder, images: EmbeddedImages) -> EmbeddedPairs:
    """Embed the captions of ``images``. Raises UserError where no image has one."""
    captions = [images.source.captions(int(item)) for item in images.items_I]
    captioned = [row for row, texts in enumerate(captions) if texts]
    if not captioned:
        raise UserError(f"{images.source.name}: none of its images has a caption")
    counts = torch.tensor([len(captions[row]) for row in captioned])
    device = images.embedding_ID.device
    texts = [text for texts in captions for text in texts]
    number: dict[str, int] = {}
    wording = [number.setdefault(clean_for_clip(text).casefold(), len(number)) for text in texts]
    return EmbeddedPairs(
        images_ID=images.embedding_ID[torch.tensor(captioned, device=device)],
        texts_TD=encoder.embed_texts(texts),
        image_of_T=torch.arange(len(captioned)).repeat_interleave(counts).to(device),
        wording_T=torch.tensor(wording, device=device),
    )


def pair_fits(
    encoder: DualEncoder,
    source: Source,
    *,
    skipped: SkippedItems,
    engine: Engine = LOCAL,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Fit]:
    """How well each caption fits its image: the cosine of the pair in standard deviations above the cosines of the
    image with all captions, plus the same above the cosines of the caption with all images.

    Captions of the source's readable images; raises UserError for a source without images or captions. The ``reopen``
    of another engine than the local gives the encoder and the source.
    """
    if not source.has_captions:
        raise UserError(f"{source.name}: has no captions that could fit")
    found = engine.gather(
        "fits",
        _pair_vectors,
        (encoder, source),
        paired_items(source),
        source=source,
        network=encoder,
        rows=_ROWS,
        skipped=skipped,
        advance=advance,
    )
    images_ID, texts_TD = torch.from_numpy(found["images"]), torch.from_numpy(found["texts"])
    own_T = torch.from_numpy(np.repeat(np.arange(len(images_ID)), found["counts"]))
    means, sds = [], []
    for rows, others in ((images_ID, texts_TD), (texts_TD, images_ID)):
        # Mean and variance of the products of a row with all others, from the others' mean and second moments.
        mean_D, second_DD = others.mean(0), others.T @ others / len(others)
        mean_R = rows @ mean_D
        means.append(mean_R)
        sds.append(((rows @ second_DD * rows).sum(1) - mean_R**2).clamp_min(1e-12).sqrt())
    cosine_T = (images_ID[own_T] * texts_TD).sum(1)
    fit_T = (cosine_T - means[0][own_T]) / sds[0][own_T] + (cosine_T - means[1]) / sds[1]
    return fits_of(found["items"], found["counts"], fit_T.numpy())


def _pair_vectors(tools: tuple[DualEncoder, Source], items: np.ndarray) -> Rows:
    """Embeddings of images and of all their captions."""
    encoder, source = tools
    pixels, items, skipped = read_block(source, items, size=encoder.image_size)
    if not len(items):
        return Rows(skipped=skipped)
    captions = [source.captions(int(item)) for item in items]
    images_BD = encoder.embed_images(channels_first(pixels)).float()
    texts_BD = encoder.embed_texts([text for texts in captions for text in texts])
    counts = np.array([len(texts) for texts in captions], np.int64)
    arrays = {"items": items, "counts": counts, "images": images_BD.cpu().numpy(), "texts": texts_BD.cpu().numpy()}
    return Rows(arrays=arrays, skipped=skipped)


def assess_images(
    encoder: DualEncoder,
    images: Subset[Source],
    texts: Sequence[str],
    *,
    skipped: SkippedItems,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> AssessedImages:
    """The image tower's features of the readable ones of ``images``, and as their uncertainty the entropy in nats of
    the softmax over ``texts`` (the cosines times the encoder's scale). Without texts there is none.
    """
    rows = ReadableImages(images.source, images.items, size=encoder.image_size, skipped=skipped, rows=_ROWS)
    found = embed_readable(encoder, rows, advance=advance)
    entropy_N = None
    if texts:
        texts_TD = encoder.embed_texts(list(dict.fromkeys(texts)))
        logs = [(encoder.scale * some_BD @ texts_TD.T).log_softmax(1) for some_BD in found.embedding_ID.split(_ROWS)]
        entropy_N = torch.cat([-(each.exp() * each).sum(1) for each in logs]).detach().cpu().numpy()
    return AssessedImages(
        items_N=found.items_I, features_NF=found.state_IW.float().cpu().numpy(), uncertainty_N=entropy_N
    )


def score_retrieval(pairs: EmbeddedPairs) -> dict[str, float]:
    """Retrieval with all captions, by the names of :meth:`Retrieval.table`."""
    found = retrieval(pairs.images_ID, pairs.texts_TD, image_of_T=pairs.image_of_T, wording_T=pairs.wording_T)
    return found.table()


def score_pairs(pairs: EmbeddedPairs) -> dict[str, float]:
    """Retrieval with all captions, and the modality gap by the first caption of each image."""
    gap = modality_gap(pairs.images_ID, pairs.first_ID)
    return _named(score_retrieval(pairs)) | {f"modality/{name}": value for name, value in asdict(gap).items()}


def score_classes(
    encoder: DualEncoder, images: EmbeddedImages, *, train: EmbeddedImages | None = None, classes: Path | None = None
) -> tuple[dict[str, float], list[str]]:
    """Zero-shot accuracy with one prompt and with the ensemble, and that of a linear probe fitted to ``train``.

    ``images`` must have labels. These are the names of the classes, with underscores for spaces, unless the file
    ``classes`` names them (see :func:`name_classes`). Labels that are codes have no zero-shot accuracy without it: a
    note says so. Raises UserError where ``train`` has no labels, and where ``classes`` lacks one.
    """
    labels, train_labels = images.labels, train.labels if train else []
    assert labels is not None
    if train_labels is None:
        assert train is not None
        raise UserError(f"{train.source.name}: has no labels to fit a probe to: sort it into a folder for each class")
    known = sorted({*labels, *train_labels})
    metrics, notes = _zero_shot(encoder, images, labels, known=known, classes=classes)
    if train is not None:
        number = {label: number for number, label in enumerate(known)}
        labels_I, train_N = (
            torch.tensor([number[label] for label in some], device=images.state_IW.device)
            for some in (labels, train_labels)
        )
        probe = linear_probe(train.state_IW, train_N, images.state_IW, labels_I)
        metrics |= {f"linear_probe/{name}": value for name, value in asdict(probe).items()}
    return metrics, notes


def _zero_shot(
    encoder: DualEncoder, images: EmbeddedImages, labels: list[str], *, known: list[str], classes: Path | None
) -> tuple[dict[str, float], list[str]]:
    """Accuracy among the classes of the file ``classes``, else among the labels ``known``; and notes about it."""
    notes: list[str] = []
    if classes is not None:
        found = name_classes(classes, sorted(set(labels)))
        names, place = found.names, found.place
        doubled = [name for name, count in Counter(read_names(classes)).items() if count > 1]
        if doubled:
            notes.append(f"{classes} names {', '.join(doubled[:3])} more than once: classes of one name count as one.")
    elif are_codes(known):
        return {}, [
            f"the labels are codes ({', '.join(known[:3])}), not names, so there is no zero-shot accuracy: "
            "give --classes FILE with the name of a class a line."
        ]
    else:
        names, place = tuple(known), {label: number for number, label in enumerate(known)}
    metrics: dict[str, float] = {"classes": len(names)}
    notes.append(f"Chance is {1 / len(names):.1%} with {len(names)} classes.")
    labels_I = torch.tensor([place[label] for label in labels], device=images.state_IW.device)
    for title, templates in (("zero_shot", ENSEMBLE), ("zero_shot_one_prompt", PLAIN)):
        classes_CD = class_embeddings(encoder.embed_texts, names, templates=templates)
        accuracy = class_accuracy(images.embedding_ID @ classes_CD.T, labels_I)
        metrics[f"{title}/top1"] = accuracy.top1
        if len(names) > 5:  # else it is always 1
            metrics[f"{title}/top5"] = accuracy.top5
    return metrics, notes
