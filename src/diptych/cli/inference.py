"""Arguments that several commands have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diptych.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
"""As in nn/inference.py, which would import torch."""
Run = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
Images = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]


# JOINED cli.generation
#| Commands on ITIT runs.


if TYPE_CHECKING:
    from diptych.itit.pipeline import Diptych


def caption(
    run: Run,
    images: Images,
    *,
    json: bool = False,
    beams: int | None = None,
    device: Device = "auto",
) -> None:
    """Write one line about each image.

    Args:
        run: Run folder.
        images: Image files.
        json: One JSON object a line, with file, caption and score.
        beams: Beams of the search; 1 is greedy. Default: the run's own.
        device: Where to compute.
    """
    import json as json_format

    if not images:
        raise UserError("no image given: diptych caption RUN IMAGE...")

    diptych = _open(run, device)
    pictures = [diptych.read(image) for image in images]
    for image, found in zip(images, diptych.captions(pictures, beams=beams), strict=True):
        record = {"file": str(image), "caption": found.text, "score": found.score}
        print(json_format.dumps(record, ensure_ascii=False) if json else found.text)


def imagine(
    run: Run,
    texts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")],
    *,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    device: Device = "auto",
) -> None:
    """Draw a picture for each text: PNG files and a contact sheet.

    Args:
        run: Run folder.
        texts: Texts to draw.
        out: Folder to write.
        seed: Another seed draws other pictures.
        steps: Rounds of parallel decoding. Default: the run's own, as for the next two.
        guidance: How far to move away from drawing without text; 0 is off.
        temperature: Noise in the order in which tokens are revealed.
        device: Where to compute.
    """
    from dataclasses import replace

    if not texts:
        raise UserError("no text given: diptych imagine RUN TEXT... --out DIR")

    from diptych.report.sheet import contact_sheet, save_png

    diptych = _open(run, device)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    config = replace(diptych.image_generation, **{name: value for name, value in given.items() if value is not None})
    pictures = list(diptych.imagine(texts, seed=seed, config=config))
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        save_png(out / f"{number:03d}.png", picture)
    sheet = save_png(out / "sheet.png", contact_sheet(pictures, captions=list(texts)))
    print(f"written to {out}, all on {sheet}")


def cycle(
    run: Run,
    *,
    text: str | None = None,
    image: Path | None = None,
    rounds: int = 3,
    out: Path,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """From a text to a picture to a text, or from a picture to a text to a picture, and round again.

    Args:
        run: Run folder.
        text: Text to start from.
        image: Image to start from instead.
        rounds: How often to go round.
        out: Folder for the pictures and a strip of all steps.
        seed: Of the drawn pictures.
        device: Where to compute.
    """
    from diptych.report.sheet import cycle_strip, save_png

    steps = _open(run, device).cycle(text=text, image=image, rounds=rounds, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        if step.picture is None:
            print(f"{number}: {step.text}")
        else:
            print(f"{number}: {save_png(out / f'{number:03d}.png', step.picture)}")
    print(f"all steps on {save_png(out / 'strip.png', cycle_strip([step.shown for step in steps]))}")


def _open(run: Path, device: Device) -> "Diptych":
    from diptych.itit.pipeline import Diptych
    from diptych.run_folder import kind_of

    if (kind := kind_of(run)) != "itit":
        raise UserError(f"{run}: a run of kind {kind!r} neither captions nor draws: give a run of an itit recipe")
    return Diptych.from_pretrained(run, device=device)


# JOINED cli.scores
#| The command that scores a run of any kind.


def evaluate(
    run: Run,
    *,
    data: str,
    limit: int | None = None,
    beams: int | None = None,
    seed: int = 0,
    features: str | None = None,
    train: str | None = None,
    umap: bool = False,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Score a run on data it has not seen: a table, metrics.json and a sheet.

    ITIT: captions and pictures, on captioned images. An image tokenizer: what it keeps of images. A classifier: its
    accuracy. A dual encoder: retrieval and modality gap on captioned images, zero-shot classes on labelled ones.

    Args:
        run: Run folder.
        data: Images that the run has not seen, with captions or labels: any source.
        limit: Score the first so many only. Scores of different subsets are not comparable.
        beams: ITIT: beams for the captions. Default: the run's own.
        seed: ITIT: of the drawn pictures.
        features: For the Frechet distance: folder or hub name of a vision model of transformers, or a TorchScript file
            (an Inception network gives FID). Default: a random network, which needs no download.
        train: Dual encoder: labelled images to fit a linear probe to.
        umap: Dual encoder: also draw a map of the embeddings, umap.png; needs the extra `umap`.
        out: Folder for metrics.json and pictures. Default: RUN/evaluation.
        device: Where to compute.
    """
    from diptych.run_folder import kind_of

    out, kind = out or run / "evaluation", kind_of(run)
    if kind == "dual":
        from diptych.dual.evaluation import evaluate_dual_run

        evaluate_dual_run(run, data, train=train, umap=umap, limit=limit, out=out, device=device)
        return
    from diptych.data.sources import open_source

    source = open_source(data)
    if kind == "classifier":
        from diptych.uml.classifier import evaluate_classifier_run

        evaluate_classifier_run(run, source, out=out, device=device)
        return
    if kind == "tokenizer":
        from diptych.tokenizers.evaluation import evaluate_tokenizer_run

        evaluate_tokenizer_run(run, source, limit=limit, features=features, out=out, device=device)
        return
    if kind != "itit":
        raise UserError(f"{run}: a {kind} has no scores of its own: evaluate the run that uses it")
    from diptych.itit.evaluation import EvaluateConfig, evaluate_run

    config = EvaluateConfig(limit=limit, beams=beams, seed=seed)
    evaluate_run(run, source, config, features=features, out=out, device=device)


# JOINED cli.searching
#| Commands that compare images with texts.


def embed(
    run: Run,
    source: Annotated[Positional[str], tyro.conf.arg(metavar="SRC")],
    *,
    out: Path,
    texts: bool = False,
    workers: int = 2,
    device: Device = "auto",
) -> None:
    """Embeddings of all images of a source, to be searched; by a uml-ssl run, of the features in a store.

    Args:
        run: Run folder of a dual encoder or of uml-ssl.
        source: Any source; for uml-ssl the folder of a store of features.
        out: Folder to write: `diptych search` takes it as its index. An earlier one is replaced.
        texts: Embed its texts instead.
        workers: Threads that decode images.
        device: Where to compute.
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
    run: Run,
    text: Annotated[Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None,
    *,
    index: Path,
    image: Path | None = None,
    top: int = 10,
    method: Literal["exact", "approximate"] = "exact",
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """What lies nearest to a text or an image: a line for each hit, with its cosine.

    Args:
        run: Run folder of the dual encoder that made the index.
        text: What to look for.
        index: Folder that `diptych embed` wrote.
        image: Look for this image instead.
        top: How many hits.
        method: exact compares with everything, about half a second a million. approximate is for more than that; it
            builds an index of cells on first use and needs the extra `ann`.
        out: Also write the pictures of the hits on a sheet, a PNG file.
        device: Where to compute.
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
    run: Run,
    images: Images,
    *,
    classes: Path | None = None,
    templates: Path | None = None,
    top: int = 3,
    json: bool = False,
    device: Device = "auto",
) -> None:
    """The most probable classes of each image. A dual encoder needs nothing but their names.

    Args:
        run: Run folder of a classifier or a dual encoder.
        images: Image files.
        classes: Dual encoder: file with a class name a line.
        templates: Dual encoder: file with a template a line, such as `a photo of a {}.` Default: a dozen of them.
        top: How many classes.
        json: One JSON object a line, with file and guesses.
        device: Where to compute.
    """
    import json as json_format
    from dataclasses import asdict

    if not images:
        raise UserError("no image given: diptych classify RUN IMAGE...")
    if top < 1:
        raise UserError(f"the best {top} classes: ask for one at least")

    from diptych.run_folder import kind_of

    if kind_of(run) == "classifier":
        from diptych.uml import classifier as uml_runs

        if classes or templates:
            raise UserError(f"{run}: a classifier has learnt its classes: leave --classes and --templates away")
        found = uml_runs.classify_run(run, images, top=top, device=device)
    else:
        from diptych.dual import search as dual_runs

        found = dual_runs.classify_run(run, images, classes=classes, templates=templates, top=top, device=device)
    for image, predictions in zip(images, found, strict=True):
        if json:
            record = {"file": str(image), "guesses": [asdict(guess) for guess in predictions]}
            print(json_format.dumps(record, ensure_ascii=False))
        else:
            print(f"{image}: " + ", ".join(f"{guess.name} {guess.probability:.1%}" for guess in predictions))


def export(run: Run, *, out: Path) -> None:
    """The dual encoder of a run as a folder that open_clip reads. (RUN/model is one that transformers reads.)

    Args:
        run: Run folder of a dual encoder.
        out: Folder to write. Files of the same names are replaced.
    """
    from diptych.dual.export import save_open_clip
    from diptych.dual.model import open_dual

    save_open_clip(open_dual(run, device="cpu"), out)
    print(f'open_clip.create_model_and_transforms("local-dir:{out}")')
