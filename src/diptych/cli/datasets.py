"""Commands on data sets: what a source holds, which pairs do not fit, and which images to caption next.

Heavy imports are inside the functions, so that --help and mistakes answer at once.
"""

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from diptych.cli.inference import Device, EngineName, SourceArg, at_least_one, engine_of, open_itit
from diptych.errors import UserError
from diptych.run_folder import check_finished, kind_of, read_config

if TYPE_CHECKING:
    import numpy as np

    from diptych.data.sources import Source
    from diptych.data.splits import Subset
    from diptych.data.suggest import AssessedImages
    from diptych.encoders import ImageEncoder, PooledTextEncoder
    from diptych.itit.pipeline import Diptych


def check(source: SourceArg, *, images: int = 1000) -> None:
    """Report what a source holds: images, captions, labels, sizes, what is unreadable, unused or duplicate.

    Args:
        source: Source of images, texts or both.
        images: Number of images to open, spread over the source; 0 opens all of them.
    """
    from diptych.data.check import check_source
    from diptych.data.sources.columns import Columns
    from diptych.data.sources.open import find_source, first_scenes

    if images < 0:
        raise UserError(f"--images {images}: give a number of images, or 0 for all")
    for line in check_source(first_scenes(find_source(source, columns=Columns())), images=images).lines():
        print(line)


def _learned_from(run: Path, source: str) -> bool:
    """Whether a run was trained on ``source`` or a part of it, by the names."""
    if not (run / "config.json").is_file():
        return False
    pairs = str(read_config(run).get("run", {}).get("data", {}).get("pairs", ""))
    return source in (pairs, pairs.partition("?")[0])


def _has_frozen_towers(run: Path) -> bool:
    """Whether a dual encoder has pretrained towers that its training left as they were."""
    if not (run / "config.json").is_file():
        return False
    model = read_config(run).get("run", {}).get("model", {})
    return model.get("image_tower") is not None and model.get("tune") == "heads"


def audit(
    source: SourceArg,
    *,
    run: Path | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    out: Path,
    worst: float = 0.1,
    max_skipped_share: float = 1.0,
    device: Device = "auto",
    engine: EngineName = "local",
    ray_address: str | None = None,
) -> None:
    """Report captions that do not fit their images, images and captions that occur twice, and other oddities.

    Writes a table (csv and parquet), a sheet of the pairs that fit worst, and a list of the items to keep. They are a
    source: `SOURCE?keep=OUT/keep.jsonl`.

    Args:
        source: Source of captioned images.
        run: Run folder of ITIT, which compares how well captions are explained by their own and by other images, or of
            a dual encoder, which compares cosines; frozen towers are taken as the two encoders below. Without a run or
            encoders, captions and images are not compared.
        image_encoder: Pretrained image encoder by folder, hub name or package, in the place of a run. For each pair, a
            regression between its features and those of the text encoder is fitted to all other pairs of the source.
        text_encoder: Pretrained text encoder by folder, hub name or package.
        out: Folder for the findings.
        worst: Share of the captions to leave out, those that fit worst, 0 to 1.
        max_skipped_share: Largest share of unreadable images at which the audit goes on, 0 to 1.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
        engine: Where images are opened and captions compared: in this process, or by the workers of a Ray cluster
            (extra `ray`). The findings are the same.
        ray_address: Address of the cluster. Default: that of RAY_ADDRESS, else one is started on this machine.
    """
    if not 0 <= worst <= 1:
        raise UserError(f"--worst {worst}: a share from 0 to 1")
    if (image_encoder is None) != (text_encoder is None) or (run is not None and image_encoder is not None):
        raise UserError("give --run, or --image-encoder and --text-encoder together, or none of them")
    kind = check_finished(run, "dual", "itit") if run is not None else None
    if run is not None and kind == "dual" and _has_frozen_towers(run):
        image_encoder = text_encoder = str(run)
    working = engine_of(engine, ray_address, device=device)
    from diptych.data.audit import Fit, write_audit
    from diptych.data.audit import audit as look_at
    from diptych.data.pixels import SkippedItems
    from diptych.data.sources import open_finite
    from diptych.data.sources.columns import Columns
    from diptych.report.terminal import ProgressLine

    opened = open_finite(source, Columns())
    if not opened.has_images:
        raise UserError(f"{source}: has no images to look at")
    skipped = SkippedItems(max_skipped_share=max_skipped_share)
    fits: list[Fit] | None = None
    if run is not None and image_encoder is None and _learned_from(run, source):
        print(
            f"{run} has learned from {source}: it may know wrong captions by heart, which then seem to fit; "
            "better audit with a run of other pairs, e.g. one half with a run of the other half",
            file=sys.stderr,
        )
    # Of a command that is stopped, what is done stays here for its repetition.
    working = replace(working, keep=out / ".unfinished")
    if image_encoder is not None and text_encoder is not None:
        from diptych.eval.probe import encoder_fits

        working = replace(working, reopen=partial(_open_encoders, source, image_encoder, text_encoder, device))
        fits = encoder_fits(opened, image_encoder, text_encoder, skipped=skipped, device=device, engine=working)
    elif run is not None and kind == "dual":
        from diptych.dual.evaluation import pair_fits
        from diptych.dual.model import open_dual
        from diptych.dual.search import open_with_source

        working = replace(working, reopen=partial(open_with_source, run, source, device))
        encoder = open_dual(run, device=device)
        advance = ProgressLine("embedding pairs")
        fits = pair_fits(encoder, opened, skipped=skipped, engine=working, advance=advance)
    elif run is not None:
        from diptych.itit.evaluation import pair_fits as itit_pair_fits

        working = replace(working, reopen=partial(_open_itit_with_source, run, source, device))
        advance = ProgressLine("reading captions")
        fits = itit_pair_fits(open_itit(run, device), opened, skipped=skipped, engine=working, advance=advance)
    working = replace(working, reopen=partial(open_finite, source, Columns()))
    findings = look_at(opened, fits, worst=worst, engine=working, advance=ProgressLine("comparing images"))
    for line in write_audit(opened, findings, out, spec=source):
        print(line)
    shutil.rmtree(out / ".unfinished", ignore_errors=True)


def _open_itit_with_source(run: Path, source: str, device: Device) -> "tuple[Diptych, Source]":
    """In a worker of Ray: a run and a source for it to go through."""
    from diptych.data.sources import open_finite
    from diptych.data.sources.columns import Columns

    return open_itit(run, device), open_finite(source, Columns())


def _open_encoders(
    source: str, image_encoder: str, text_encoder: str, device: Device
) -> "tuple[ImageEncoder, PooledTextEncoder, Source]":
    """In a worker of Ray: two pretrained encoders and a source for them to go through."""
    from diptych.data.sources import open_finite
    from diptych.data.sources.columns import Columns
    from diptych.eval.probe import open_encoders

    return *open_encoders(image_encoder, text_encoder, device), open_finite(source, Columns())


def suggest(
    places: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN] SRC", help_behavior_hint="")],
    *,
    count: int = 100,
    out: Path | None = None,
    captioned: str | None = None,
    features: str | None = None,
    pool: int = 10_000,
    max_skipped_share: float = 0.01,
    device: Device = "auto",
) -> None:
    """Choose the images to caption next: a line for each, best first, or a table to write the captions into.

    The choice is made among the fifth of the images without a caption of which the run is most uncertain, or without a
    run among all of them. It takes images that resemble many others and are unlike those that have captions.

    Args:
        places: Run folder of ITIT or of a dual encoder, and the source of the images. Without a run the images are
            chosen by their features alone.
        count: Number of images to suggest.
        out: Table that does not exist yet, .csv or .jsonl; a sheet of the images of the same name (.png) goes beside
            it. With captions filled in, `SRC?keep=TABLE` is a source. Default: a line for each image.
        captioned: Source of the images that have captions already. Default: those of SRC that have some.
        features: Pretrained image encoder by folder, hub name or package, whose features decide what is alike. Default:
            the run's own; without a run, colour and gradient histograms.
        pool: Largest number of images with captions, and of images without, that are considered; of more, a random
            part.
        max_skipped_share: Largest share of unreadable images that is left out without stopping, 0 to 1.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if len(places) not in (1, 2):
        raise UserError("give a run and a source, or a source alone: diptych suggest RUN SRC")
    run, source = (Path(places[0]) if len(places) == 2 else None), places[-1]
    at_least_one("--count", count)
    if pool < count:
        raise UserError(f"--pool {pool}: must be at least --count, {count}")
    if run is not None:
        check_finished(run, "dual", "itit")
    from diptych.data.suggest import check_format, write_suggestions
    from diptych.data.suggest import suggest as suggest_images

    if out is not None:
        check_format(out)
    from diptych.data.sources import open_finite
    from diptych.data.sources.columns import Columns

    opened = open_finite(source, Columns())
    if not opened.has_images:
        raise UserError(f"{source}: has no images to caption")
    known = opened if captioned is None else open_finite(captioned, Columns())
    uncaptioned, done = _some_items(opened, pool, captions=False), _some_items(known, pool, captions=True)
    if not len(uncaptioned.items):
        raise UserError(f"{source}: every image has a caption already")
    if not len(done.items):
        print("no image has a caption: --captioned SRC names those that have", file=sys.stderr)
    images, captioned_MF = _look_at(
        uncaptioned, done, run=run, features=features, max_skipped_share=max_skipped_share, device=device
    )
    found = suggest_images(opened, images, captioned_MF, count=count)
    if out is None:
        for each in found:
            print(f"{each.key}  {each.draft}".rstrip())
        return
    sheet = write_suggestions(opened, found, out)
    joined = "&" if "?" in source else "?"
    print(f"{len(found):,} of {len(uncaptioned.items):,} images without a caption in {out}, to be seen on {sheet}")
    print(f"with captions written into it, a source: '{source}{joined}keep={out}'")


def _some_items(source: "Source", most: int, *, captions: bool) -> "Subset[Source]":
    """The images that have captions or have none, a random part of them if there are more than ``most``."""
    import numpy as np

    from diptych.data.splits import Subset
    from diptych.rng import derive_seed

    held = [item for item in range(len(source)) if bool(source.captions(item)) == captions and source.has_images]
    items = np.array(held, np.int64)
    if len(items) > most:
        items = np.sort(np.random.default_rng(derive_seed("suggest")).choice(items, most, replace=False))
    return Subset(source, items)


def _look_at(
    uncaptioned: "Subset[Source]",
    done: "Subset[Source]",
    *,
    run: Path | None,
    features: str | None,
    max_skipped_share: float,
    device: Device,
) -> "tuple[AssessedImages, np.ndarray]":
    """What the run says of the images without captions, and the features of those with."""
    import numpy as np

    from diptych.data.pixels import SkippedItems
    from diptych.data.suggest import AssessedImages
    from diptych.report.terminal import ProgressLine

    # Of each part so many may be unreadable.
    skipped, skipped_known = (SkippedItems(max_skipped_share=max_skipped_share) for _ in range(2))
    seen = known = None
    if run is not None and kind_of(run) == "itit":
        from diptych.itit.evaluation import assess_images as assess_itit_images

        diptych = open_itit(run, device)
        seen = assess_itit_images(diptych, uncaptioned, skipped=skipped, advance=ProgressLine("captioning"))
        known = assess_itit_images(diptych, done, drafts=False, skipped=skipped_known) if len(done.items) else None
    elif run is not None:
        from diptych.dual.evaluation import assess_images
        from diptych.dual.model import open_dual

        encoder = open_dual(run, device=device)
        texts = [text for item in done.items for text in done.source.captions(int(item))]
        seen = assess_images(encoder, uncaptioned, texts, skipped=skipped, advance=ProgressLine("embedding images"))
        known = assess_images(encoder, done, (), skipped=skipped_known) if len(done.items) else None
    if run is None or features is not None:
        from diptych.eval.baselines import image_features

        left = uncaptioned if seen is None else replace(uncaptioned, items=seen.items_N)
        items_N, features_NF = image_features(left, features, device)
        seen = (
            AssessedImages(items_N=items_N, features_NF=features_NF)
            if seen is None
            else replace(seen, features_NF=features_NF)
        )
        known = (
            AssessedImages(items_N=np.asarray(done.items), features_NF=image_features(done, features, device)[1])
            if len(done.items)
            else None
        )
    assert seen is not None
    return seen, np.empty((0, seen.features_NF.shape[1]), np.float32) if known is None else known.features_NF
