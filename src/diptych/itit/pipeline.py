"""A finished ITIT run as one object that captions images and generates images from texts.

Also here: its encoder as an image encoder for other learners.

Shapes: B rows, S pixels a side of a square image, H and W pixels, N image tokens, R rows of their grid, L text tokens,
D encoder width.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from diptych.data.batch import ImageTokenExamples
from diptych.data.pixels import ImageLike, channels_first, one_or_more, to_pixels
from diptych.encoders.image import ImageEncoder, resize
from diptych.encoders.text import text_list
from diptych.errors import UserError
from diptych.eval.baselines import NearCaptions
from diptych.hub import OnHub, local_folder
from diptych.io import load_network
from diptych.itit.data import image_encoder_of, image_encoders, note_on_cut_texts, read_size
from diptych.itit.generation import (
    Canvas,
    ImageGenerationConfig,
    TextGenerationConfig,
    generate_image_tokens,
    generate_text,
    image_canvases,
)
from diptych.itit.model import ITIT, Masking
from diptych.nn.inference import Device, InferencePrecision, autocast, pick_device
from diptych.rng import RowRNG, derive_seed
from diptych.run_folder import check_finished, read_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import PAD, TextTokenizer

Advance = Callable[[int, int], None]
"""Called with the number of rows that are done and that of all."""

NEAR_CAPTIONS = "near_captions"
"""Folder of a run with the captions that others are compared with, see :class:`NearCaptions`."""
_ROWS = 64
"""Number of rows generated at once."""
_CUT_TEXTS = "texts that are cut off"
_warned_of: set[str] = set()
"""What this process has warned of, so that it does so once: unknown words and ``_CUT_TEXTS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """A generated caption."""

    text: str
    score: float | None
    """Length-normalized log-probability from the beam search; None with one beam."""
    image_score: float | None = None
    """Mean log-probability of the image's tokens, given the caption; None unless candidates are ranked by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleStep:
    """One step of a cycle: either a text or an image, uint8 [S S 3]."""

    text: str | None = None
    image: np.ndarray | None = None

    @property
    def shown(self) -> str | np.ndarray:
        """The text or the image of this step."""
        found = self.text if self.image is None else self.image
        assert found is not None
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagineRequest:
    """What an image is to be generated from."""

    text: str
    seed: int = 0
    known: tuple[Int[Tensor, "R R"], Bool[Tensor, "R R"]] | None = None
    """The tokens of an image in their grid, and which of them are generated anew; the others stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagineStep:
    """An image before, between or after the rounds of parallel decoding."""

    image: np.ndarray
    """uint8 [S S 3]. Where it is hidden, it shows what was sampled last."""
    tokens: Tensor
    """int64 [R R]: the tokens that the image is decoded from."""
    hidden: Tensor
    """bool [R R]: the tokens that are still hidden."""


class Diptych(OnHub):
    """Captions images and generates images, with an image tokenizer, a frozen text encoder and an ITIT network.

    >>> diptych = Diptych.from_pretrained("runs/demo/itit")
    >>> diptych.caption(["photo.jpg"])
    >>> diptych.imagine(["top left a red ring, top right a blue cross, bottom left a white square"], seed=0)
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        text_encoder: TextEncoder | Callable[[], TextEncoder],
        model: ITIT,
        *,
        text_tokenizer: TextTokenizer | None = None,
        image_encoder: ImageEncoder | None = None,
        near_captions: NearCaptions | None = None,
        image_generation: ImageGenerationConfig | None = None,
        text_generation: TextGenerationConfig | None = None,
        device: str | torch.device = "cpu",
        precision: InferencePrecision = "auto",
    ) -> None:
        """``text_encoder`` may be a function that loads it: captions need only its ``text_tokenizer``, given then.

        ``image_encoder`` is needed by a network that reads captions from its features, and by no other.
        ``near_captions`` are needed where the settings of text generation ask for a consensus with them.
        """
        self.precision: InferencePrecision = precision
        self.device = torch.device(device)
        self.tokenizer = tokenizer.to(self.device).eval()
        model = model.to(self.device).eval()
        self.model = model.in_int8() if precision == "int8" else model
        self.image_encoder = image_encoder if image_encoder is None else image_encoder.to(self.device).eval()
        self.near_captions = near_captions
        self._text_encoder = text_encoder
        self.text_tokenizer = text_tokenizer or self.text_encoder
        self._banned_V = torch.zeros(self.text_tokenizer.vocab_rows, dtype=torch.bool)
        self._banned_V[list(self.text_tokenizer.banned_ids)] = True
        self._banned_V = self._banned_V.to(self.device)
        self.image_generation = image_generation or ImageGenerationConfig()
        self.text_generation = text_generation or TextGenerationConfig()

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path,
        *,
        device: Device = "auto",
        precision: InferencePrecision = "auto",
        visible: float | None = None,
    ) -> "Diptych":
        """Load a run folder, which needs nothing outside it, or what :meth:`push_to_hub` uploaded.

        Args:
            run: folder with ``tokenizer/``, ``text_encoder/``, ``model/`` and, if it has one, ``image_encoder/``; or
                the name of a repository of the hub, such as ``user/name``, where there is no such folder.
            device: ``auto`` takes CUDA, then MPS, then the CPU.
            precision: precision of the ITIT network. ``auto`` is bf16 where the device has instructions for it, else
                fp32, as in training; int8 is the fastest on most CPUs, and changes a few captions and images. The
                tokenizer and the text encoder always compute in fp32.
            visible: share of the image tokens that captions are read from, see :class:`TextGenerationConfig`. None
                takes the run's own.

        Raises:
            UserError: the folder is no finished run, or a file in it is damaged; or its captions are not read from
                image tokens, and ``visible`` was given.
        """
        run = local_folder(run)
        check_finished(run, "itit")
        image_generation, text_generation = generation_of(run)
        image_encoder = image_encoder_of(run)
        if visible is not None:
            if image_encoder is not None:
                raise UserError(f"--visible {visible:g}: {run} reads captions from features of its image encoder")
            text_generation = replace(text_generation, visible=visible)
        loaded = cls(
            ImageTokenizer.from_pretrained(run / "tokenizer"),
            lambda: TextEncoder.from_pretrained(run / "text_encoder"),
            load_network(ITIT, run / "model"),
            text_tokenizer=TextTokenizer.from_pretrained(run / "text_encoder"),
            image_encoder=image_encoder,
            near_captions=NearCaptions.from_pretrained(run / NEAR_CAPTIONS) if text_generation.consensus else None,
            image_generation=image_generation,
            text_generation=text_generation,
            device=pick_device(device),
            precision=precision,
        )
        loaded.run_folder = run
        return loaded

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder. Raises UserError where it is loaded only now, and a file of it is damaged."""
        if not isinstance(self._text_encoder, TextEncoder):
            self._text_encoder = self._text_encoder()
        self._text_encoder.feature_kind = self.model.config.text_input
        return self._text_encoder.to(self.device)

    # Captions

    @property
    def reading(self) -> dict[str, float]:
        """For records of how captions were made: the share of the image that they are read from, unless it is all."""
        visible = self.text_generation.visible
        return {} if visible == 1 else {"visible": visible}

    def caption(self, images: ImageLike | Sequence[ImageLike], *, beams: int | None = None) -> list[str]:
        """One caption for each image; a list of one for a single image. ``beams`` None takes the run's own number."""
        return [caption.text for caption in self.captions(images, beams=beams)]

    def captions(self, images: ImageLike | Sequence[ImageLike], *, beams: int | None = None) -> list[Caption]:
        """As :meth:`caption`, each with its score."""
        return [found for piece in self._encoded(images) for found in self.caption_encoded(piece, beams=beams)]

    def _encoded(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[ImageTokenExamples]:
        """The images, read and encoded some at a time."""
        images = one_or_more(images)
        for start in range(0, len(images), _ROWS):
            yield self.encode(np.stack([self.read(image) for image in images[start : start + _ROWS]]))

    def caption_encoded(
        self, images: ImageTokenExamples, *, beams: int | None = None, advance: Advance | None = None
    ) -> list[Caption]:
        """One caption with its score for each encoded image. ``advance`` is called with the rows done and all."""
        config = self.text_generation if beams is None else replace(self.text_generation, beams=beams)
        if config.reranks:
            several = self.candidates_encoded(images, count=1, beams=config.beams, advance=advance)
            return [each[0] for each in several]
        length = self.model.config.max_text_len
        found: list[Caption] = []
        for start in range(0, len(images), _ROWS):
            piece = images[start : start + _ROWS].to(self.device)
            with autocast(self.device, self.precision):
                made = generate_text(self.model.rounded(), piece, config, banned_V=self._banned_V, length=length)
            scores = [None] * len(piece) if made.score_BW is None else made.score_BW[:, 0].tolist()
            texts = self.text_tokenizer.detokenize(made.ids_BWL[:, 0])
            found += [Caption(text=text, score=score) for text, score in zip(texts, scores, strict=True)]
            if advance:
                advance(len(found), len(images))
        return found

    def candidates(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        count: int | None = None,
        best_of: int | None = None,
        beams: int | None = None,
    ) -> list[list[Caption]]:
        """Up to ``count`` different captions for each image, the best first; None takes as many as there are beams.

        With ``best_of`` they are ranked as by :meth:`candidates_encoded`.
        """
        count = count or beams or self.text_generation.beams
        several = (
            self.candidates_encoded(piece, count=count, best_of=best_of, beams=beams) for piece in self._encoded(images)
        )
        return [captions for piece in several for captions in piece]

    @torch.no_grad()
    def candidates_encoded(
        self,
        images: ImageTokenExamples,
        *,
        count: int,
        best_of: int | None = None,
        beams: int | None = None,
        advance: Advance | None = None,
    ) -> list[list[Caption]]:
        """Up to ``count`` different captions for each encoded image, the best first.

        A beam search with at least ``count`` beams finds them. They are ranked by their score and, if the run's
        settings say so, by agreement and consensus (:meth:`_fit`). With ``best_of``, the first ``best_of`` of them are
        ranked by log p(image | caption) instead: all image tokens are hidden, and each is predicted from the caption
        alone.
        """
        config = replace(self.text_generation, beams=max(2, count, best_of or 0, beams or self.text_generation.beams))
        length = self.model.config.max_text_len
        found: list[list[Caption]] = []
        step = max(1, _ROWS // config.beams)
        for start in range(0, len(images), step):
            piece = images[start : start + step].to(self.device)
            with autocast(self.device, self.precision):
                made = generate_text(
                    self.model.rounded(), piece, config, banned_V=self._banned_V, length=length, count=config.beams
                )
            assert made.score_BW is not None
            texts_BW = [self.text_tokenizer.detokenize(ids_WL) for ids_WL in made.ids_BWL]
            worth_BW = made.score_BW.cpu()
            if config.reranks and not best_of:
                worth_BW = worth_BW + self._fit(piece, made.ids_BWL, texts_BW, config)
            for texts, tokens_N, ids_WL, score_W, worth_W in zip(
                texts_BW, piece.tokens_BN, made.ids_BWL, made.score_BW, worth_BW, strict=True
            ):
                scores = score_W.tolist()
                first = {text: place for place, text in reversed(list(enumerate(texts)))}  # of equal texts the first
                places = [place for place in sorted(first.values()) if scores[place] > -math.inf][:best_of]
                captions = [Caption(text=texts[place], score=scores[place]) for place in places]
                worth = worth_W[places]
                if best_of:
                    worth = -self.image_nats(tokens_N.expand(len(places), -1), ids_WL[places])
                    captions = [replace(c, image_score=w) for c, w in zip(captions, worth.tolist(), strict=True)]
                order = worth.argsort(descending=True, stable=True).tolist()
                found.append([captions[place] for place in order[:count]])
            if advance:
                advance(len(found), len(images))
        return found

    def _fit(
        self,
        images: ImageTokenExamples,
        ids_BWL: Int[Tensor, "B W L"],
        texts_BW: Sequence[Sequence[str]],
        config: TextGenerationConfig,
    ) -> Float[Tensor, "B W"]:
        """What is added to the scores of texts when they are ranked: agreement and consensus, as the settings say.

        Zero where the network reads no features.
        """
        reader, fit_BW = self.model.image_features, torch.zeros(ids_BWL.shape[:2])
        if reader is None:
            return fit_BW
        assert images.image_features_BG is not None
        if config.agreement:
            ids_XL = ids_BWL.flatten(0, 1)
            text_XLF = self.text_encoder.features(ids_XL, ids_XL != PAD).float()
            features_XG = images.image_features_BG.repeat_interleave(ids_BWL.shape[1], 0)
            agreement_X = reader.agreement(features_XG, text_XLF, ids_XL != PAD)
            fit_BW = fit_BW + config.agreement * agreement_X.view_as(fit_BW).cpu()
        if config.consensus and self.near_captions is not None:
            similarity_BW = self.near_captions.similarity(images.image_features_BG.float().cpu().numpy(), texts_BW)
            fit_BW = fit_BW + config.consensus * torch.tensor(similarity_BW)
        return fit_BW

    def image_nats(self, tokens_BN: Int[Tensor, "B N"], ids_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B"]:
        """Nats a token of images, given captions; every image token is hidden, and none enters the encoder."""
        valid_BL = ids_BL != PAD
        hidden_BN = torch.ones_like(tokens_BN, dtype=torch.bool)
        encoded = self.model.encode(
            self.model.embed_image(tokens_BN),
            Masking(hidden_BN, keep_BK=tokens_BN[:, :0]),
            self.text_encoder.features(ids_BL, valid_BL),
            valid_BL,
        )
        logits_BNC = self.model.image_logits(encoded, hidden_BN)
        return cross_entropy(logits_BNC.float().transpose(1, 2), tokens_BN, reduction="none").mean(1)

    def encode(self, pixels_BSS3: UInt8[np.ndarray, "B S S 3"]) -> ImageTokenExamples:
        """What the network sees of square images: their tokens and, if it reads captions from them, their features.

        Images of another size than :attr:`image_size` are resized.
        """
        encode_tokens, encode_features = image_encoders(self.tokenizer, self.image_encoder)
        pieces = channels_first(pixels_BSS3).split(_ROWS)
        tokens_BN = torch.cat([encode_tokens(piece) for piece in pieces])
        if encode_features is None:
            return ImageTokenExamples(tokens_BN=tokens_BN)
        features_BG = torch.cat([encode_features(piece) for piece in pieces])
        return ImageTokenExamples(tokens_BN=tokens_BN, image_features_BG=features_BG)

    @torch.no_grad()
    def vectors(self, images: ImageTokenExamples) -> Float[Tensor, "B D"]:
        """A vector for each encoded image, by which images can be compared: its pretrained features if there are any,
        else the mean of the encoder's output over its tokens."""
        if images.image_features_BG is not None:
            return images.image_features_BG.float()
        with autocast(self.device, self.precision):
            pieces = [self.model.caption_prefix(rows, None).mean(1) for rows in images.tokens_BN.split(_ROWS)]
        return torch.cat(pieces).float()

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that tokenizer and image encoder need; others are resized."""
        return read_size(self.tokenizer, self.image_encoder)

    # Images

    def imagine(
        self, texts: str | Sequence[str], *, seed: int = 0, config: ImageGenerationConfig | None = None
    ) -> list[Image.Image]:
        """One image for each text; a list of one for a single text. The same seed generates the same image for a text,
        whatever texts are beside it; a text that is given several times gets as many different images.

        ``config`` None takes the run's own settings. Raises UserError when no text is given.
        """
        return [Image.fromarray(pixels) for pixels in self.imagine_pixels(texts, seed=seed, config=config)]

    def imagine_pixels(
        self,
        texts: str | Sequence[str],
        *,
        seed: int = 0,
        config: ImageGenerationConfig | None = None,
        advance: Advance | None = None,
    ) -> UInt8[np.ndarray, "B S S 3"]:
        """As :meth:`imagine`, as an array. ``advance`` is called with the number of images done and that of all."""
        tokens_BN = self.imagine_tokens(texts, seed=seed, config=config, advance=advance)
        return self.tokenizer.decode(tokens_BN).permute(0, 2, 3, 1).cpu().numpy()

    def imagine_tokens(
        self,
        texts: str | Sequence[str],
        *,
        seed: int = 0,
        config: ImageGenerationConfig | None = None,
        advance: Advance | None = None,
    ) -> Int[Tensor, "B N"]:
        """The image tokens that :meth:`imagine_pixels` decodes."""
        texts = text_list(texts)
        self._warn_of_texts(texts)
        found = []
        times: Counter[bytes] = Counter()
        for start in range(0, len(texts), _ROWS):
            features_BLF, valid_BL, row_seeds = self._read_texts(texts[start : start + _ROWS], times)
            rng = RowRNG(seed, 0, row_seeds=row_seeds)
            with autocast(self.device, self.precision):
                network, config = self.model.rounded(), config or self.image_generation
                found.append(generate_image_tokens(network, features_BLF, valid_BL, config, rng=rng))
            if advance:
                advance(start + len(found[-1]), len(texts))
        return torch.cat(found)

    def imagine_steps(
        self,
        text: str,
        *,
        seed: int = 0,
        config: ImageGenerationConfig | None = None,
        known: tuple[Int[Tensor, "R R"], Bool[Tensor, "R R"]] | None = None,
    ) -> Iterator[ImagineStep]:
        """The image of a text as it appears: before the first and after each round of parallel decoding.

        The last step is the image of :meth:`imagine`. ``known`` as in :class:`ImagineRequest`. Pixels of what stays may
        change a little, as the decoder looks at all tokens. Raises UserError for an empty text.
        """
        for canvas in self.imagine_together([ImagineRequest(text=text, seed=seed, known=known)], config=config):
            yield self.imagine_step(canvas, 0)

    def imagine_together(
        self, requests: Sequence[ImagineRequest], *, config: ImageGenerationConfig | None = None
    ) -> Iterator[Canvas]:
        """The canvas of several images before the first and after each round, as :meth:`imagine_steps` of each alone.

        That holds where the same number of tokens is hidden in each. Raises UserError for an empty text.
        """
        if not all(request.text.strip() for request in requests):
            raise UserError("no text to imagine")
        texts = [request.text for request in requests]
        self._warn_of_texts(texts)
        features_BLF, valid_BL, row_seeds = self._read_texts(texts)
        blank = torch.zeros(self.token_side, self.token_side, dtype=torch.long)
        known = [request.known or (blank, torch.ones_like(blank, dtype=torch.bool)) for request in requests]
        tokens_BN, hidden_BN = (
            torch.stack([grid.flatten().to(self.device) for grid in grids]) for grids in zip(*known, strict=True)
        )
        with autocast(self.device, self.precision):
            network = self.model.rounded()
        rounds = image_canvases(
            network,
            features_BLF,
            valid_BL,
            config or self.image_generation,
            rng=RowRNG(0, 0, row_seeds=row_seeds, seeds=tuple(request.seed for request in requests)),
            known=(tokens_BN, hidden_BN),
        )
        while True:
            with autocast(self.device, self.precision):  # not around `yield`: the caller would compute in it too
                canvas = next(rounds, None)
            if canvas is None:
                return
            yield canvas

    def imagine_step(self, canvas: Canvas, row: int) -> ImagineStep:
        """One image of a canvas."""
        return ImagineStep(
            image=self.tokenizer.decode(canvas.tokens_BN[row : row + 1])[0].permute(1, 2, 0).cpu().numpy(),
            tokens=canvas.tokens_BN[row].view(self.token_side, -1).cpu(),
            hidden=canvas.hidden_BN[row].view(self.token_side, -1).cpu(),
        )

    @property
    def token_side(self) -> int:
        """Number of rows, and of columns, of the grid of an image's tokens."""
        return math.isqrt(self.tokenizer.tokens)

    def _warn_of_texts(self, texts: Sequence[str]) -> None:
        """Name unknown letters, each word once in a process, and say once that texts are cut off."""
        unknown = [word for word in self.text_tokenizer.unknown_words(texts) if word not in _warned_of]
        _warned_of.update(unknown)
        if unknown:
            some = ", ".join(repr(word) for word in unknown[:5])
            print(f"the tokenizer does not know all letters of {some}: they are lost on the image", file=sys.stderr)
        if _CUT_TEXTS in _warned_of:
            return
        if note := note_on_cut_texts(texts, self.text_tokenizer, length=self.model.config.max_text_len):
            _warned_of.add(_CUT_TEXTS)
            print(note, file=sys.stderr)

    def _read_texts(
        self, texts: Sequence[str], times: Counter[bytes] | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Features [B L F] of texts, which of their tokens are valid [B L], and a seed for each.

        ``times`` counts how often each text has been there, so that each of its images has a seed of its own. Without
        it each text has the seed that it has alone.
        """
        ids_BL, valid_BL = self.text_encoder.tokenize(list(texts), length=self.model.config.max_text_len)
        row_seeds = []
        for row in ids_BL.numpy():
            key = row.tobytes()
            row_seeds.append(derive_seed(key.hex(), 0 if times is None else times[key]))
            if times is not None:
                times[key] += 1
        ids_BL, valid_BL = ids_BL.to(self.device), valid_BL.to(self.device)
        return self.text_encoder.features(ids_BL, valid_BL), valid_BL, tuple(row_seeds)

    # Both in turn

    def cycle(
        self, *, text: str | None = None, image: ImageLike | None = None, rounds: int = 3, seed: int = 0
    ) -> list[CycleStep]:
        """From a text to an image to a text, or from an image to a text to an image, ``rounds`` times.

        Returns the start and two steps for each round. Raises UserError unless either a text or an image is given.
        """
        if (text is None) == (image is None):
            raise UserError("a cycle starts from a text or from an image: give one of them")
        if rounds < 1:
            raise UserError(f"{rounds} rounds: at least one is needed")
        steps = [CycleStep(text=text) if image is None else CycleStep(image=self.read(image))]
        for turn in range(2 * rounds):
            last = steps[-1]
            if last.image is None:
                assert last.text is not None
                steps.append(CycleStep(image=self.imagine_pixels([last.text], seed=seed + turn)[0]))
            else:
                steps.append(CycleStep(text=self.caption([last.image])[0]))
        return steps

    def read(self, image: ImageLike) -> UInt8[np.ndarray, "S S 3"]:
        """The image's centre square at :attr:`image_size`, as :func:`to_pixels`."""
        return to_pixels(image, self.image_size)


def generation_of(run: Path) -> tuple[ImageGenerationConfig, TextGenerationConfig]:
    """The run's own settings for images and texts; the defaults for a folder without ``config.json``."""
    if not (run / "config.json").is_file():
        return ImageGenerationConfig(), TextGenerationConfig()
    config = read_config(run)
    try:
        # Older runs have them at the top.
        found = config["run"]["generation"] if "generation" in config.get("run", ()) else config["generation"]
        image = found["image"]
        if isinstance(drop := image.get("drop"), bool):  # older runs too
            image = image | {"drop": "half" if drop else "none"}
        return ImageGenerationConfig(**image), TextGenerationConfig(**found["text"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{run}/config.json: cannot be used ({error}): copy it again") from error


class ItitImageEncoder(ImageEncoder):
    """The encoder of an ITIT run for images without text: the mean of its output over the image tokens."""

    def __init__(self, tokenizer: ImageTokenizer, network: ITIT) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.network = network
        self.width, self.image_size = network.config.width, tokenizer.image_size
        self.preprocessing: dict[str, Any] = {"size": tokenizer.image_size, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, folder: str) -> Self:
        """Load a run folder, or any folder with `tokenizer` and `model` in it."""
        network = load_network(ITIT, Path(folder) / "model")
        return cls(ImageTokenizer.from_pretrained(Path(folder) / "tokenizer"), network).eval()

    def forward(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """One feature vector for each image; pixels from 0 to 255 of any size."""
        return self.tokens(pixels_B3HW).mean(1)

    def tokens(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """One feature vector for each image token."""
        pixels = resize(pixels_B3HW.to(self.tokenizer.codebook.device).float(), self.image_size).round()
        tokens_BN = self.tokenizer.encode(pixels.to(torch.uint8))
        return self.network.encode(self.network.embed_image(tokens_BN)).image_BKD

    def save_pretrained(self, folder: Path) -> None:
        """Write ``folder/tokenizer`` and ``folder/model``."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.network.save_pretrained(folder / "model")
