"""Commands on finished runs: caption and generate images, embed, search, classify, export, and scores.

Heavy imports are inside the functions, so that --help and mistakes answer at once.
"""

import json as json_format  # commands have a parameter `json`
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diptych.errors import UserError

if TYPE_CHECKING:
    from diptych.itit.pipeline import Diptych

Device = Literal["auto", "cpu", "cuda", "mps"]
"""As in nn/inference.py, which would import torch."""
RunArg = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
ImagesArg = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
SourceArg = Annotated[Positional[str], tyro.conf.arg(metavar="SRC")]


# Caption and generate images: ITIT runs


def caption(
    run: RunArg, images: ImagesArg, *, json: bool = False, beams: int | None = None, device: Device = "auto"
) -> None:
    """Caption images: one line for each.

    Args:
        run: Run folder of an itit recipe.
        images: Image files to caption.
        json: Print one JSON object a line, with file, caption and score.
        beams: Number of beams of the search; 1 is greedy. Default: the setting of the run.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not images:
        raise UserError("no image given: diptych caption RUN IMAGE...")

    diptych = _open(run, device)
    pixels = [diptych.read(image) for image in images]
    for image, found in zip(images, diptych.captions(pixels, beams=beams), strict=True):
        record = {"file": str(image), "caption": found.text, "score": found.score}
        print(json_format.dumps(record, ensure_ascii=False) if json else found.text)


def imagine(
    run: RunArg,
    texts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")],
    *,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    device: Device = "auto",
) -> None:
    """Generate an image for each text: PNG files and a contact sheet.

    Args:
        run: Run folder of an itit recipe.
        texts: Texts to generate images for.
        out: Folder for the images and the sheet.
        seed: Seed of the generated images; another seed gives other images.
        steps: Number of steps of parallel decoding. Default: the setting of the run.
        guidance: Strength of classifier-free guidance towards the text; 0 is none. Default: the setting of the run.
        temperature: Noise in the order in which tokens are chosen; 0 is none. Default: the setting of the run.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not texts:
        raise UserError("no text given: diptych imagine RUN TEXT... --out DIR")

    diptych = _open(run, device)
    from diptych.report.sheet import contact_sheet, save_png

    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    config = replace(diptych.image_generation, **{name: value for name, value in given.items() if value is not None})
    images = list(diptych.imagine(texts, seed=seed, config=config))
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        save_png(out / f"{number:03d}.png", image)
    sheet = save_png(out / "sheet.png", contact_sheet(images, captions=list(texts)))
    print(f"written to {out}, all on {sheet}")


def cycle(
    run: RunArg,
    *,
    text: str | None = None,
    image: Path | None = None,
    rounds: int = 3,
    out: Path,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Repeat text to image to text, or image to text to image: PNG files and a strip of all steps.

    Args:
        run: Run folder of an itit recipe.
        text: Text to start from.
        image: Image file to start from instead.
        rounds: Number of rounds; each adds an image and a text.
        out: Folder for the images and the strip.
        seed: Seed of the generated images.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    diptych = _open(run, device)
    from diptych.report.sheet import cycle_strip, save_png

    steps = [step.shown for step in diptych.cycle(text=text, image=image, rounds=rounds, seed=seed)]
    out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        shown = step if isinstance(step, str) else save_png(out / f"{number:03d}.png", step)
        print(f"{number}: {shown}")
    print(f"all steps on {save_png(out / 'strip.png', cycle_strip(steps))}")


def _open(run: Path, device: Device) -> "Diptych":
    from diptych.run_folder import kind_of

    if (kind := kind_of(run)) != "itit":
        raise UserError(
            f"{run}: a run of kind {kind!r} neither captions nor generates images: give a run of an itit recipe"
        )
    from diptych.itit.pipeline import Diptych

    return Diptych.from_pretrained(run, device=device)


# Embed, search, classify, export: dual encoders, and the encoders and classifiers of UML


def embed(
    run: RunArg,
    source: SourceArg,
    *,
    out: Path,
    texts: bool = False,
    workers: int = 2,
    device: Device = "auto",
) -> None:
    """Embed all images of a source, for `diptych search`; a uml-ssl run embeds the features in a store.

    Args:
        run: Run folder of a dual encoder or of uml-ssl.
        source: Source of images or texts; for uml-ssl the folder of a store of features.
        out: Folder for the embeddings, the index of `diptych search`. An earlier one is replaced.
        texts: Embed the texts of the source instead of its images.
        workers: Number of threads that decode images.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    from diptych.run_folder import kind_of

    if kind_of(run) == "feature encoder":
        from diptych.uml.ssl_training import embed_store

        print(f"{len(embed_store(run, Path(source), out=out, device=device)):,} embeddings in {out}")
        return

    from diptych.dual.search import embed_run

    side: Literal["images", "texts"] = "texts" if texts else "images"
    store, skipped = embed_run(run, source, side=side, out=out, workers=workers, device=device)
    print(f"{len(store):,} {side} in {out}" + (f"; {skipped:,} skipped, see {out}/skipped.jsonl" if skipped else ""))


def search(
    run: RunArg,
    text: Annotated[Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None,
    *,
    index: Path,
    image: Path | None = None,
    top: int = 10,
    method: Literal["exact", "approximate"] = "exact",
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Search for what is nearest to a text or an image: a line for each hit, with its cosine similarity.

    Args:
        run: Run folder of the dual encoder that made the index.
        text: Text to search for.
        index: Folder that `diptych embed` wrote.
        image: Image file to search for instead.
        top: Number of hits.
        method: Method of search. exact compares with every embedding, about half a second a million. approximate is
            for more than that; it builds an index of cells on first use and needs the extra `ann`.
        out: PNG file for a sheet of the images that were found. Default: none is written.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    query = text if image is None else image
    if query is None or (text is not None and image is not None):
        raise UserError('search for a text or for an image: diptych search RUN --index STORE "TEXT", or --image IMAGE')

    from diptych.dual.search import Index
    from diptych.report.sheet import save_png

    found = Index(run, index, device=device)
    hits = found.search(query, top=top, method=method)
    if out is not None:
        save_png(out, found.sheet(hits, title=str(query)))
    for hit in hits:
        print(f"{hit.score:.3f}  {hit.key}")


def classify(
    run: RunArg,
    images: ImagesArg,
    *,
    classes: Path | None = None,
    templates: Path | None = None,
    top: int = 3,
    json: bool = False,
    device: Device = "auto",
) -> None:
    """Classify images: the most probable classes of each. A dual encoder needs the names of the classes alone.

    Args:
        run: Run folder of a classifier or a dual encoder.
        images: Image files to classify.
        classes: Dual encoder: file with the name of a class a line.
        templates: Dual encoder: file with a template a line, such as `a photo of a {}.` Default: a dozen of them.
        top: Number of classes to print for each image.
        json: Print one JSON object a line, with file and guesses.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not images:
        raise UserError("no image given: diptych classify RUN IMAGE...")
    if top < 1:
        raise UserError(f"the best {top} classes: ask for one at least")

    from diptych.run_folder import kind_of

    if kind_of(run) == "classifier":
        if classes or templates:
            raise UserError(f"{run}: a classifier has learnt its classes: leave --classes and --templates away")
        from diptych.uml import classifier as uml

        found = uml.classify_run(run, images, top=top, device=device)
    else:
        from diptych.dual import search as dual

        found = dual.classify_run(run, images, classes=classes, templates=templates, top=top, device=device)
    for image, predictions in zip(images, found, strict=True):
        if json:
            record = {"file": str(image), "guesses": [asdict(guess) for guess in predictions]}
            print(json_format.dumps(record, ensure_ascii=False))
        else:
            print(f"{image}: " + ", ".join(f"{guess.name} {guess.probability:.1%}" for guess in predictions))


def export(run: RunArg, *, out: Path) -> None:
    """Export a dual encoder as a folder that open_clip reads. (RUN/model is one that transformers reads.)

    Args:
        run: Run folder of a dual encoder.
        out: Folder for the exported model. Files of the same names are replaced.
    """
    from diptych.dual.export import save_open_clip
    from diptych.dual.model import open_dual

    save_open_clip(open_dual(run, device="cpu"), out)
    print(f'open_clip.create_model_and_transforms("local-dir:{out}")')


# Scores: runs of any kind


def evaluate(
    run: RunArg,
    *,
    data: str,
    limit: int | None = None,
    beams: int | None = None,
    seed: int = 0,
    features: str | None = None,
    train: str | None = None,
    classes: Path | None = None,
    umap: bool = False,
    max_skipped_share: float = 0.01,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Score a run on data it has not seen: a table, metrics.json and a sheet.

    An ITIT run is scored on captioned images by its captions and the images it generates, an image tokenizer by what it
    keeps of images, a classifier by its accuracy on labelled images. A dual encoder is scored by retrieval and modality
    gap on captioned images and by zero-shot classification on labelled ones.

    Args:
        run: Run folder of any recipe but text-encoder and uml-ssl.
        data: Source of images with captions or labels that the run has not seen.
        limit: Number of images to score, the first of the source. Scores of different subsets are not comparable.
        beams: ITIT: number of beams of the search for captions; 1 is greedy. Default: the setting of the run.
        seed: ITIT: seed of the generated images.
        features: ITIT, image tokenizer: features of the Frechet distance, as folder or hub name of a vision model of
            transformers, or as TorchScript file (an Inception network gives FID). Default: a random network, which
            needs no download.
        train: Dual encoder: source of labelled images to fit a linear probe to.
        classes: Dual encoder: file with the name of a class a line, for labels that are numbers (they count the lines
            from 0) or codes (`n01440764 tench`, or the names in the order of the sorted codes).
        umap: Dual encoder: also write umap.png, a map of the embeddings; needs the extra `umap`.
        max_skipped_share: Largest share of unreadable images that is left out without stopping, 0 to 1.
        out: Folder for metrics.json and the sheet. Default: RUN/evaluation.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    from diptych.run_folder import kind_of

    kind, out = kind_of(run), out or run / "evaluation"
    if classes is not None and kind != "dual":
        raise UserError(f"{run}: --classes names classes for a dual encoder, and this is a run of kind {kind!r}")
    if kind == "dual":
        from diptych.dual.evaluation import evaluate_dual_run

        evaluate_dual_run(
            run,
            data,
            train=train,
            classes=classes,
            umap=umap,
            limit=limit,
            max_skipped_share=max_skipped_share,
            out=out,
            device=device,
        )
    elif kind == "classifier":
        from diptych.data.sources import open_source
        from diptych.uml.classifier import evaluate_classifier_run

        share = max_skipped_share
        evaluate_classifier_run(run, open_source(data), max_skipped_share=share, out=out, device=device)
    elif kind == "tokenizer":
        from diptych.data.pixels import SkippedItems
        from diptych.data.sources import open_source
        from diptych.tokenizers.evaluation import evaluate_tokenizer_run

        skipped = SkippedItems(max_skipped_share=max_skipped_share)
        evaluate_tokenizer_run(
            run, open_source(data), limit=limit, features=features, skipped=skipped, out=out, device=device
        )
    elif kind == "itit":
        from diptych.data.sources import open_source
        from diptych.itit.evaluation import EvaluateConfig, evaluate_run

        config = EvaluateConfig(limit=limit, beams=beams, seed=seed, max_skipped_share=max_skipped_share)
        evaluate_run(run, open_source(data), config, features=features, out=out, device=device)
    else:
        raise UserError(f"{run}: a {kind} has no scores of its own: evaluate the run that uses it")
