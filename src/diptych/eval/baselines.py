"""What a run must beat: baselines that take seconds, beside its own scores and computed by the same code.

    caption_baselines          the most frequent caption, and the consensus of all pairs and of the nearest images
    neighbour_word_embeddings  images as the words in the captions of the nearest images, for retrieval
    ClassBaselines             chance, the most frequent class, and logistic regression
    Comparison                 a run beside its baselines, and the sentence that a report begins with

Consensus captions are those of Devlin et al., "Exploring Nearest Neighbor Approaches for Image Captioning" (2015).
Departure: captions are compared by the cosine of their TF-IDF vectors of n-grams, which are those of CIDEr.

Shapes: B images, T training images, S pixels a side, F width of the features, N items or texts, V words, Q queries,
C classes.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source
from diptych.data.splits import Subset
from diptych.encoders import ImageEncoder, open_image_encoder
from diptych.errors import UserError, first_line
from diptych.eval.captions import tokenize
from diptych.eval.probe import Linear, select_linear
from diptych.io import write_bytes
from diptych.nn.inference import Device, eval_mode, pick_device
from diptych.report.terminal import better, meaning_of
from diptych.rng import derive_seed
from diptych.run_folder import BASELINES, write_json

NEAREST = 30
"""Number of nearest images whose captions are used. CIDEr-D on Flickr8k's dev images rises up to about here."""
_NGRAMS = 4
"""Longest sequence of tokens that is compared, as in CIDEr."""
_MOST = 3000
"""Largest number of training images that are used, so that baselines take seconds; of more, a random part."""
_SIZE = 64
"""Side in pixels at which histograms are taken."""
_COLOURS, _COLOUR_CELLS = 4, 2
_ANGLES, _GRADIENT_CELLS = 8, 4
_WORDS = 2000
_ROWS = 64
HISTOGRAMS = "colour and gradient histograms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One thing to compare a run with."""

    name: str
    scores: dict[str, float]
    """Scores on the same items, under the names of the run's own."""
    kind: Literal["baseline", "without unpaired data"] = "baseline"
    """A baseline takes seconds to fit; "without unpaired data" is the same run, trained on its pairs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run beside its baselines, all scored on the same items."""

    source: str
    """Name of the source that they were scored on."""
    select: str
    """Name of the score by which they are compared."""
    baselines: list[Baseline]
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of the run; none before it is trained."""
    advice: str
    """What to try when a baseline is better, as the rest of a sentence that begins with "Try"."""
    advice_unpaired: str = ""
    """What to try when unpaired data hurt."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def verdict(self) -> str:
        """Whether a baseline is better than the run, whether unpaired data hurt, and what to try, in whole sentences.

        Empty where nothing was compared.
        """
        if self.select not in self.scores:
            return ""
        told = [self._beside_baselines(), *(self._beside_control(each) for each in self._of("without unpaired data"))]
        return " ".join(sentence for sentence in told if sentence)

    def table(self) -> tuple[list[str], list[list[str | float | None]]]:
        """Names of the scores, ``select`` first, and a row for the run and for each baseline; None where it has no such
        score. Scores of which neither a higher nor a lower value is better are left out."""
        rows = [Baseline(name="this run", scores=self.scores)] if self.scores else []
        rows += self.baselines
        names = list(dict.fromkeys(name for each in rows for name in each.scores if meaning_of(name).better))
        names.sort(key=lambda name: name != self.select)
        return names, [[each.name, *(each.scores.get(name) for name in names)] for each in rows]

    def record(self) -> dict[str, Any]:
        """For a file of scores: the baselines by name, and the verdict."""
        return {"baselines": {each.name: each.scores for each in self.baselines}, "verdict": self.verdict()}

    def write(self, run: Path) -> None:
        """Write ``baselines.json`` into a run folder, where its report finds its table and its first line."""
        head, rows = self.table()
        write_json(run / BASELINES, asdict(self) | {"verdict": self.verdict(), "head": head, "rows": rows})

    def _of(self, kind: str) -> list[Baseline]:
        return [each for each in self.baselines if each.kind == kind and self.select in each.scores]

    def _beside_baselines(self) -> str:
        others = self._of("baseline")
        if not others:
            return ""
        best = others[0]
        for each in others[1:]:
            if better(self.select, each.scores[self.select], best.scores[self.select]):
                best = each
        ours, theirs = (meaning_of(self.select).written(each[self.select]) for each in (self.scores, best.scores))
        if better(self.select, best.scores[self.select], self.scores[self.select]):
            return f"The run loses to a baseline: {self.select} {ours}, {best.name} {theirs}. Try {self.advice}."
        return f"No baseline does better: {self.select} {ours}, the best of them ({best.name}) {theirs}."

    def _beside_control(self, control: Baseline) -> str:
        """What unpaired data did to the scores, as far as their written values differ."""

        def told(names: Sequence[str]) -> str:
            some = [f"{name} {written(control.scores, name)} to {written(self.scores, name)}" for name in names[:4]]
            return ", ".join(some) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

        def written(scores: Mapping[str, float], name: str) -> str:
            return meaning_of(name).written(scores[name])

        both = [name for name in self.scores if name in control.scores and meaning_of(name).better]
        both.sort(key=lambda name: name != self.select)
        changed = [name for name in both if written(self.scores, name) != written(control.scores, name)]
        helped = [name for name in changed if better(name, self.scores[name], control.scores[name])]
        hurt = [name for name in changed if name not in helped]
        if self.select in hurt:
            return f"Unpaired data hurt, against {control.name}: {told(hurt)}. Try {self.advice_unpaired}."
        if hurt:
            return f"Unpaired data helped {told(helped)}, but hurt, against {control.name}: {told(hurt)}."
        return f"Unpaired data helped, against {control.name}: {told(helped)}." if helped else ""


# Captions


def caption_baselines(
    pairs: Subset[Source],
    test: Subset[Source],
    *,
    score: Callable[[Sequence[str]], dict[str, float]],
    encoder: ImageEncoder | None = None,
    encoder_name: str = "",
) -> list[Baseline]:
    """Captions for the images ``test`` that need no training, from the captioned images ``pairs``.

    Of more than 3,000 pairs a random 3,000 are used. Raises UserError where none of them has a caption and an
    image that can be read.

    Args:
        pairs: What the run learned from.
        test: Readable images, in the order in which ``score`` takes their captions.
        score: The scores of captions, one for each image of ``test``.
        encoder: Pretrained encoder whose features also find nearest images.
        encoder_name: What the encoder is called in the tables.
    """
    known = _KnownImages.of(pairs, test, encoder=encoder, encoder_name=encoder_name)
    pool = CaptionPool(known.texts)
    every, rows = range(len(known.texts)), len(test.items)
    found = [
        Baseline(name="most frequent caption", scores=score([most_frequent(known.texts)] * rows)),
        Baseline(name="consensus of all captions", scores=score([pool.consensus(every)] * rows)),
    ]
    for name, near in known.nearest.items():
        found.append(Baseline(name=f"consensus of {name}", scores=score([pool.consensus(rows) for rows in near])))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _KnownImages:
    """The captions of some training images, and which of these are nearest to each test image."""

    texts: list[list[str]]
    """All captions of each training image."""
    nearest: dict[str, list[list[int]]]
    """By the kind of features in words: for each test image the places of the nearest ones in ``texts``."""

    @classmethod
    def of(
        cls, pairs: Subset[Source], test: Subset[Source], *, encoder: ImageEncoder | None, encoder_name: str
    ) -> "_KnownImages":
        captioned = sampled(np.array([item for item in pairs.items if pairs.source.captions(int(item))], np.int64))
        items, known_TF = image_histograms(Subset(pairs.source, captioned))
        if not len(items):
            raise UserError(f"{pairs.source.name}: no image with a caption to compare with")
        features = {HISTOGRAMS: (known_TF, image_histograms(test)[1])}
        if encoder is not None:
            features[encoder_name] = (encoded(encoder, Subset(pairs.source, items))[1], encoded(encoder, test)[1])
        count = min(NEAREST, len(items))
        found = {
            f"the {count} nearest by {name}": nearest(query_BF, known, count=count).tolist()
            for name, (known, query_BF) in features.items()
            # Otherwise an image that could be read before can no longer be read.
            if (len(known), len(query_BF)) == (len(items), len(test.items))
        }
        return cls(texts=[pairs.source.captions(int(item)) for item in items], nearest=found)


def most_frequent(texts: Iterable[Sequence[str]]) -> str:
    """The caption that occurs most often; of equals the first."""
    return Counter(text for of_image in texts for text in of_image).most_common(1)[0][0]


class CaptionPool:
    """The captions of some images, each as a vector of n-grams."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        """``texts``: the captions of each image, at least one."""
        self.texts = texts
        ngrams = [[_ngrams(text) for text in of_image] for of_image in texts]
        images_with: Counter[tuple[str, ...]] = Counter()
        for of_image in ngrams:
            images_with.update(set().union(*of_image))
        # One more image than there are, so that a single image has vectors too.
        self._rarest = math.log(len(texts) + 1)
        self._weight = {gram: self._rarest - math.log(count) for gram, count in images_with.items()}
        self._vectors = [[self._unit_by_length(grams) for grams in of_image] for of_image in ngrams]

    def consensus(self, images: Iterable[int]) -> str:
        """The caption of one of ``images`` with the largest mean cosine with their other captions."""
        candidates = [(image, number) for image in images for number in range(len(self.texts[image]))]
        total: Counter[tuple[str, ...]] = Counter()
        for image, number in candidates:
            for gram, value in self._vectors[image][number].items():
                total[gram] += value  # type: ignore[assignment]

        def similarity(candidate: tuple[int, int]) -> float:
            image, number = candidate
            return sum(value * (total[gram] - value) for gram, value in self._vectors[image][number].items())

        image, number = max(candidates, key=similarity)
        return self.texts[image][number]

    def similarity(self, texts: Iterable[str], images: Sequence[int]) -> list[float]:
        """Mean cosine of each text with the captions of ``images``, from 0 to 1; each image has the same weight."""
        mean: dict[tuple[str, ...], float] = defaultdict(float)
        for image in images:
            share = 1 / (len(images) * len(self._vectors[image]) * _NGRAMS)
            for vector in self._vectors[image]:
                for gram, value in vector.items():
                    mean[gram] += share * value
        vectors = (self._unit_by_length(_ngrams(text)) for text in texts)
        return [sum(value * mean.get(gram, 0.0) for gram, value in vector.items()) for vector in vectors]

    def _unit_by_length(self, grams: Mapping[tuple[str, ...], int]) -> dict[tuple[str, ...], float]:
        """TF-IDF values, those of the n-grams of each length n scaled to length one, as in CIDEr."""
        values = {gram: count * self._weight.get(gram, self._rarest) for gram, count in grams.items()}
        lengths = range(1, _NGRAMS + 1)
        norms = [math.sqrt(sum(v * v for gram, v in values.items() if len(gram) == n)) for n in lengths]
        return {gram: value / (norms[len(gram) - 1] or 1.0) for gram, value in values.items()}


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    """How often each sequence of one to four tokens occurs."""
    words = tokenize(text).split()
    return Counter(tuple(words[i : i + n]) for n in range(1, _NGRAMS + 1) for i in range(len(words) - n + 1))


class NearCaptions:
    """Captions of some images and unpaired texts, with the features by which those near to another image are found.

    A caption has the features of its image, an unpaired text those that a regression predicts for its image
    (:meth:`diptych.itit.model.ImageFeatures.expected`).
    """

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        features_TF: Float[np.ndarray, "T F"],
        *,
        texts: Sequence[str] = (),
        expected_UF: Float[np.ndarray, "U F"] | None = None,
    ) -> None:
        """``captions``: those of each image, at least one; ``texts``: unpaired ones, with their expected features."""
        self.captions, self.features_TF = captions, features_TF
        self.texts, self.expected_UF = texts, expected_UF

    @cached_property
    def _pools(self) -> list[tuple[CaptionPool, np.ndarray, int]]:
        """The captioned images and, if there are any, the texts: captions, features, and how many of them are near."""
        found = [(CaptionPool(self.captions), self.features_TF.astype(np.float32), NEAREST)]
        if self.expected_UF is not None:
            count = max(NEAREST, len(self.texts) // NEAREST)
            found.append((CaptionPool([[text] for text in self.texts]), self.expected_UF.astype(np.float32), count))
        return found

    def similarity(self, features_BF: Float[np.ndarray, "B F"], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """:meth:`CaptionPool.similarity` of the texts of each image with the captions of its 30 nearest images.

        Where there are unpaired texts, the similarity with the nearest thirtieth of them (at least 30) is added.
        """
        total_BW = [[0.0] * len(of_image) for of_image in texts]
        for pool, known_TF, count in self._pools:
            near_BK = nearest(features_BF, known_TF, count=count).tolist()
            for row, of_image, near in zip(total_BW, texts, near_BK, strict=True):
                row[:] = np.add(row, pool.similarity(of_image, near)).tolist()
        return total_BW

    def save_pretrained(self, folder: Path) -> None:
        """Write ``captions.json`` and ``features.npy``, and ``texts.json`` and ``expected.npy`` if there are texts."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "captions.json", self.captions)
        np.save(folder / "features.npy", self.features_TF.astype(np.float16))
        if self.expected_UF is not None:
            write_json(folder / "texts.json", self.texts)
            np.save(folder / "expected.npy", self.expected_UF.astype(np.float16))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "NearCaptions":
        """Raises UserError where a file is missing or damaged."""
        try:
            captions, features_TF = json.loads((folder / "captions.json").read_text()), np.load(folder / "features.npy")
            if not (folder / "texts.json").exists():
                return cls(captions, features_TF)
            texts, expected_UF = json.loads((folder / "texts.json").read_text()), np.load(folder / "expected.npy")
            return cls(captions, features_TF, texts=texts, expected_UF=expected_UF)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be read ({first_line(error)})") from error


# Retrieval


def neighbour_word_embeddings(
    pairs: Subset[Source],
    test: Subset[Source],
    texts: Sequence[str],
    *,
    encoder: ImageEncoder | None = None,
    encoder_name: str = "",
) -> dict[str, tuple[Float[Tensor, "B V"], Float[Tensor, "N V"]]]:
    """Embeddings of the images ``test`` and of ``texts`` in which words are the dimensions, by the name of a baseline.

    An image has the words in the captions of the nearest of ``pairs``, a text its own. Words are the 2,000 that are in
    most captions of ``pairs``, with TF-IDF weights; rows have length one. Raises UserError as `caption_baselines`.
    """
    known = _KnownImages.of(pairs, test, encoder=encoder, encoder_name=encoder_name)
    words_of = [[set(tokenize(text).split()) for text in of_image] for of_image in known.texts]
    images_with = Counter(word for of_image in words_of for word in set().union(*of_image))
    place = {word: number for number, (word, _) in enumerate(images_with.most_common(_WORDS))}
    weight_V = torch.tensor([math.log((len(words_of) + 1) / images_with[word]) for word in place])

    def embedded(words: Sequence[Iterable[str]]) -> Float[Tensor, "N V"]:
        x_NV = torch.zeros(len(words), len(place))
        for row, each in enumerate(words):
            for word in each:
                if word in place:
                    x_NV[row, place[word]] += 1
        return torch.nn.functional.normalize(x_NV * weight_V, dim=-1)

    texts_NV = embedded([tokenize(text).split() for text in texts])
    known_TV = torch.stack([embedded(of_image).mean(0) for of_image in words_of])
    found = {}
    for name, near in known.nearest.items():
        images_BV = torch.stack([known_TV[rows].mean(0) for rows in near])
        found[f"captions of {name}"] = (torch.nn.functional.normalize(images_BV, dim=-1), texts_NV)
    return found


def chance_of_recall(right_Q: Int[Tensor, "Q"], *, targets: int, k: int) -> float:
    """Mean probability that ``k`` random targets hold one of the ``right_Q`` right ones of a query."""
    miss_Q = torch.ones(len(right_Q), dtype=torch.float64)
    for drawn in range(min(k, targets)):
        miss_Q *= ((targets - right_Q.cpu() - drawn) / (targets - drawn)).clamp_min(0)
    return float(1 - miss_Q.mean())


# Features


def nearest(
    query_BF: Float[np.ndarray, "B F"], known_TF: Float[np.ndarray, "T F"], *, count: int
) -> Int[np.ndarray, "B K"]:
    """Rows of the ``count`` nearest known features of each query, nearest first, by cosine after centring."""
    centre_F = known_TF.mean(0)
    query_BF, known_TF = (_unit(each - centre_F) for each in (query_BF, known_TF))
    return np.argsort(-(query_BF @ known_TF.T), axis=1, kind="stable")[:, :count]


def _unit(x_BF: np.ndarray) -> np.ndarray:
    return x_BF / np.maximum(np.linalg.norm(x_BF, axis=1, keepdims=True), 1e-12)


def image_histograms(images: Subset[Source]) -> tuple[Int[np.ndarray, "B"], Float[np.ndarray, "B F"]]:
    """The readable ones among the items, and their :func:`histograms`."""
    items, found = [np.empty(0, np.int64)], [np.empty((0, _WIDTH), np.float32)]
    skipped = SkippedItems(max_skipped_share=1.0)
    try:
        for pixels_B3SS, some in image_batches(images.source, images.items, size=_SIZE, skipped=skipped, rows=_ROWS):
            items.append(some)
            found.append(histograms(pixels_B3SS.numpy().transpose(0, 2, 3, 1)))
    except UserError:  # not one can be read
        return items[0], found[0]
    return np.concatenate(items), np.concatenate(found)


_WIDTH = _COLOURS**3 * _COLOUR_CELLS**2 + _ANGLES * _GRADIENT_CELLS**2


def histograms(pixels_BSS3: UInt8[np.ndarray, "B S S 3"]) -> Float[np.ndarray, "B F"]:
    """Square roots of the shares of colours and of directions of edges in the parts of an image.

    The 64 colours of four levels a channel are counted in each quarter of the image, and eight directions of the
    gradient, weighted by its length, in each of 16 cells.
    """
    level = pixels_BSS3.astype(np.int64) * _COLOURS // 256
    colour_BSS = (level[..., 0] * _COLOURS + level[..., 1]) * _COLOURS + level[..., 2]
    grey_BSS = pixels_BSS3.astype(np.float32).mean(-1)
    dy_BSS, dx_BSS = np.gradient(grey_BSS, axis=(1, 2))
    turn_BSS = np.arctan2(dy_BSS, dx_BSS) % np.pi / np.pi
    angle_BSS = (turn_BSS * _ANGLES).astype(np.int64) % _ANGLES
    counts = (
        _count_in_cells(colour_BSS, np.ones(colour_BSS.shape), kinds=_COLOURS**3, cells=_COLOUR_CELLS),
        _count_in_cells(angle_BSS, np.hypot(dy_BSS, dx_BSS), kinds=_ANGLES, cells=_GRADIENT_CELLS),
    )
    shares = [np.sqrt(each / np.maximum(each.sum(1, keepdims=True), 1e-9)) for each in counts]
    return np.concatenate(shares, axis=1).astype(np.float32)


def _count_in_cells(kind_BSS: np.ndarray, weight_BSS: np.ndarray, *, kinds: int, cells: int) -> np.ndarray:
    """Sums of the weights of each kind in each of ``cells`` x ``cells`` parts of the image, [B cells*cells*kinds]."""
    rows, side, _ = kind_BSS.shape
    cell_S = np.arange(side) * cells // side
    place = (np.arange(rows)[:, None, None] * cells + cell_S[:, None]) * cells + cell_S
    flat = (place * kinds + kind_BSS).ravel()
    return np.bincount(flat, weight_BSS.ravel(), minlength=rows * cells * cells * kinds).reshape(rows, -1)


def image_features(
    images: Subset[Source], encoder: str | None, device: Device = "auto"
) -> tuple[Int[np.ndarray, "B"], Float[np.ndarray, "B F"]]:
    """The readable ones among the items, and their features: those of an encoder by name, or their histograms.

    Raises UserError for an encoder that cannot be opened, and where no image can be read.
    """
    if encoder is None:
        items, found = image_histograms(images)
    else:
        items, found = encoded(open_image_encoder(encoder).to(pick_device(device)), images)
    if not len(items):
        raise UserError(f"{images.source.name}: not one image can be read")
    return items, found


def encoded(
    encoder: ImageEncoder,
    images: Subset[Source],
    *,
    skipped: SkippedItems | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Int[np.ndarray, "B"], Float[np.ndarray, "B F"]]:
    """The readable ones among the items, and their features. Raises UserError where ``skipped`` allows for no more."""
    items, found = [], []
    skipped = SkippedItems(max_skipped_share=1.0) if skipped is None else skipped
    device = next(encoder.parameters()).device
    for pixels_B3SS, some in image_batches(
        images.source, images.items, size=encoder.image_size, skipped=skipped, rows=_ROWS
    ):
        with eval_mode(encoder):
            found.append(encoder(pixels_B3SS.to(device)).float().cpu().numpy())
        items.append(some)
        advance(sum(map(len, items)), len(images.items))
    return np.concatenate(items), np.concatenate(found)


def sampled(items_N: Int[np.ndarray, "N"]) -> Int[np.ndarray, "M"]:
    """All items, or 3,000 random ones in their order."""
    if len(items_N) <= _MOST:
        return items_N
    generator = np.random.Generator(np.random.PCG64(derive_seed("baselines")))
    return np.sort(generator.choice(items_N, _MOST, replace=False))


# Classes


class ClassBaselines:
    """Chance, the most frequent class, and logistic regression on each of several kinds of features.

    They are fitted once and kept in the run folder, so that they score any images without the training data.
    """

    def __init__(self, prior_C: Float[Tensor, "C"], linear: Mapping[str, Linear]) -> None:
        """``prior_C``: shares of the classes; ``linear``: a classifier for each kind of features, by its name."""
        self.prior_C, self.linear = prior_C, dict(linear)

    @classmethod
    def fit(
        cls,
        features: Mapping[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
        *,
        classes: int,
    ) -> "ClassBaselines":
        """Fit them to ``features``: each kind has features [N F] and labels [N] to learn from, then those to select on.

        The strength of the l2 penalty is chosen on the latter, which are not learned from.
        """
        (labels_N, *_), *_ = [train[1:] for train, _ in features.values()]
        counts_C = torch.bincount(labels_N.cpu(), minlength=classes).float() + 1
        linear = {
            name: select_linear(*train, validation=valid, classes=classes).linear
            for name, (train, valid) in features.items()
        }
        return cls(counts_C / counts_C.sum(), linear)

    def scored(
        self,
        features: Mapping[str, tuple[Tensor, Tensor]],
        score: Callable[[Tensor, Tensor], dict[str, float]],
    ) -> list[Baseline]:
        """The scores of each on features [N F] and labels [N]. ``score`` takes logits [N C] and labels."""
        classes, labels_N = len(self.prior_C), next(iter(features.values()))[1]
        values = (1 / classes, 1 / classes, math.log(classes))
        found = [Baseline(name="chance", scores=dict(zip(_OF_CLASSES, values, strict=True)))]
        if self.prior_C.min() < self.prior_C.max():
            logits_NC = self.prior_C.log().to(labels_N.device).expand(len(labels_N), -1)
            found.append(Baseline(name="most frequent class", scores=score(logits_NC, labels_N)))
        for name, (x_NF, labels_N) in features.items():
            scores = score(self.linear[name](x_NF), labels_N)
            found.append(Baseline(name=f"logistic regression on {name}", scores=scores))
        return found

    def save(self, file: Path) -> None:
        """Write them to a safetensors file."""
        tensors = {"prior_C": self.prior_C}
        for name, linear in self.linear.items():
            tensors |= {f"{name}/{part}": getattr(linear, part).cpu().contiguous() for part in _PARTS}
        write_bytes(file, safetensors.torch.save(tensors))

    @classmethod
    def load(cls, file: Path, *, device: str) -> "ClassBaselines":
        """Read what :meth:`save` wrote. Raises UserError where it cannot be read."""
        try:
            tensors = safetensors.torch.load_file(file, device=device)
            names = dict.fromkeys(name.rpartition("/")[0] for name in tensors if "/" in name)
            linear = {name: Linear(**{part: tensors[f"{name}/{part}"] for part in _PARTS}) for name in names}
            return cls(tensors["prior_C"].cpu(), linear)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: the fitted baselines cannot be read ({first_line(error)})") from error


_OF_CLASSES = ("accuracy", "mean_class_accuracy", "loss")
_PARTS = ("mean_D", "std_D", "weight_DC", "bias_C")
