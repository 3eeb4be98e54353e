"""Commands that compare images with texts."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from diptych.cli.arguments import Device, Images, Run
from diptych.errors import UserError


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
    from diptych.recipes.folders import kind_of

    if kind_of(run) == "feature encoder":
        from diptych.recipes.uml_ssl import embed_store

        print(f"{len(embed_store(run, Path(source), out=out, device=device)):,} embeddings in {out}")
        return

    from diptych.recipes.dual_runs import embed_run

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

    from diptych.recipes.dual_runs import Index
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

    from diptych.recipes.folders import kind_of

    if kind_of(run) == "classifier":
        from diptych.recipes import uml_runs

        if classes or templates:
            raise UserError(f"{run}: a classifier has learnt its classes: leave --classes and --templates away")
        found = uml_runs.classify_run(run, images, top=top, device=device)
    else:
        from diptych.recipes import dual_runs

        found = dual_runs.classify_run(run, images, classes=classes, templates=templates, top=top, device=device)
    for image, guesses in zip(images, found, strict=True):
        if json:
            record = {"file": str(image), "guesses": [asdict(guess) for guess in guesses]}
            print(json_format.dumps(record, ensure_ascii=False))
        else:
            print(f"{image}: " + ", ".join(f"{guess.name} {guess.probability:.1%}" for guess in guesses))


def export(run: Run, *, out: Path) -> None:
    """The dual encoder of a run as a folder that open_clip reads. (RUN/model is one that transformers reads.)

    Args:
        run: Run folder of a dual encoder.
        out: Folder to write. Files of the same names are replaced.
    """
    from diptych.models.open_clip import save_open_clip
    from diptych.recipes.dual_runs import open_dual

    save_open_clip(open_dual(run, device="cpu"), out)
    print(f'open_clip.create_model_and_transforms("local-dir:{out}")')
