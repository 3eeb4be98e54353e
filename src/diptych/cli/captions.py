"""`diptych caption`: captions of images on the terminal, or of a whole data set in a file.

Imports are inside the functions, after all arguments have been looked at: --help and mistakes answer at once.
"""

import json as json_format  # the command has a parameter `json`
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli.inference import (
    Device,
    EngineName,
    ImagesArg,
    Precision,
    RunArg,
    at_least_one,
    engine_of,
    open_itit,
    share_of_image,
)
from diptych.errors import UserError
from diptych.run_folder import check_finished

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from diptych.cli.images import ImageArguments, NamedImage
    from diptych.data.caption_file import MadeCaption
    from diptych.data.engine import Engine
    from diptych.itit.confidence import Confidence
    from diptych.itit.pipeline import Caption, Diptych

SIDECARS = Path("sidecars")
"""The `--out` that writes a text beside each image file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSearch:
    """The options of `caption` that decide its captions; as in `Diptych.candidates`."""

    beams: int | None
    candidates: int
    best_of: int | None

    def captions(self, diptych: "Diptych", pixels_BSS3: "np.ndarray") -> "list[list[Caption]]":
        """Captions of each image, the best first: one, or as many as ``candidates``."""
        if self.candidates > 1 or self.best_of:
            return diptych.candidates(pixels_BSS3, count=self.candidates, best_of=self.best_of, beams=self.beams)
        return [[found] for found in diptych.captions(pixels_BSS3, beams=self.beams)]

    def confidence(self, run: Path, diptych: "Diptych") -> "Confidence | None":
        """The confidence of these captions, if the run was calibrated for them."""
        from diptych.itit.confidence import Confidence, made_by

        found = Confidence.of(run, made_by(diptych, **asdict(self)))
        if found is None and (run / "confidence").is_dir():
            line = f"{run}/confidence is of other weights or settings and is not used; --calibrate makes it anew"
            print(f"diptych: {line}", file=sys.stderr)
        return found


def caption(
    run: RunArg,
    images: ImagesArg,
    *,
    json: bool = False,
    out: Path | None = None,
    all: bool = False,
    shard: str | None = None,
    calibrate: str | None = None,
    beams: int | None = None,
    candidates: int = 1,
    best_of: int | None = None,
    visible: float | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    engine: EngineName = "local",
    ray_address: str | None = None,
) -> None:
    """Caption images: one line for each, or a file of captions for a whole data set.

    The line is the caption alone for one image file, else FILE: CAPTION. An image that cannot be read is reported on
    stderr, the others are captioned, and the exit status is 1. With --out, images that have captions are left out, and
    an interrupted command continues when it is repeated.

    Args:
        run: Run folder of an itit recipe.
        images: Image files, and sources with all their images: a folder, a table, tars, scenes:.
        json: Output as one JSON object per line, with file, caption and score.
        out: New file for the captions and their scores. Its ending is the format: .csv, .jsonl, .parquet, .json as
            COCO has it, .tasks.json for Label Studio; with the images in it, .images.parquet for `datasets` or .tar
            for WebDataset. `sidecars` stands for a text beside each image file that has none.
        all: With --out FILE, new captions also for images that have captions. Texts beside images are never replaced.
        shard: With --out, the part of the images to caption, such as 0/4 for the first of four processes or machines.
            Each writes a file of its own, NAME-00000-of-00004, and a glob of these files is one source.
        calibrate: Source of captioned images that the run has not learned from, to find out how good captions of each
            score are; or `data.valid`, those that the run was scored on in training. The result is written to
            RUN/confidence, and from then on --json, --out and the page give a confidence for each caption. No other
            images need be given.
        beams: Number of beams of the search; 1 is greedy. Default: the setting of the run.
        candidates: Number of different captions of each image in the output of --json and --out, the best first.
        best_of: Number of captions of the beam search that are ranked again, by how probable they make the image.
            Default: no second ranking.
        visible: Share of the image tokens, evenly spread, that a caption is read from; 0.5 takes half of the time of
            reading and changes some captions. Default: the setting of the run.
        precision: Precision of the ITIT network: auto is bf16 where the device multiplies it, else fp32; int8 is the
            fastest on a CPU and changes a few results.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
        engine: With --out, where captions are computed: in this process, or by the workers of a Ray cluster (extra
            `ray`). The file is the same.
        ray_address: Address of the Ray cluster. Default: RAY_ADDRESS of the environment, else a cluster that is
            started on this machine.
    """
    if not images and calibrate is None:
        raise UserError("no image given: diptych caption RUN IMAGE...")
    check_finished(run, "itit")
    at_least_one("--beams", beams)
    at_least_one("--candidates", candidates)
    share_of_image("--visible", visible)
    sidecars = out == SIDECARS
    if candidates > 1 and not json and (out is None or sidecars):
        raise UserError(f"--candidates {candidates}: only --json and --out FILE tell more than one")
    if best_of is not None and best_of < max(2, candidates):
        raise UserError(f"--best-of {best_of}: must be 2 or more, and --candidates or more")
    search = CaptionSearch(beams=beams, candidates=candidates, best_of=best_of)
    if all and (out is None or sidecars):
        raise UserError("--all: goes with --out FILE alone: sidecars never replaces a caption")
    if engine != "local" and out is None:
        raise UserError(f"--engine {engine}: goes with --out alone")
    opened = partial(open_itit, run, device, precision, visible)
    working = engine_of(engine, ray_address, device=device)
    working = replace(working, reopen=partial(_open_to_caption, opened, images))
    part = _shard_of(shard, out)
    if out is not None and not sidecars:
        from diptych.data.caption_file import check_format, name_of_shard

        out = name_of_shard(out, *part) if part else out
        check_format(out)
    if calibrate is not None:
        _calibrate(run, calibrate, opened=opened, search=search)
        if not images:
            return
    from diptych.cli.images import ImageArguments

    given = ImageArguments(images)
    if part:  # of all images: those that have a caption already may become more while other processes work
        number, count = part
        total = len(given.images)
        given.images = given.images[total * number // count : total * (number + 1) // count]
        if not given.images:
            raise UserError(f"--shard {shard}: of {total} image{'s' * (total != 1)} none is in it; make fewer shards")

    if out is not None:
        _caption_into(out, given, run=run, opened=opened, every=all, search=search, engine=working)
        return
    diptych = opened()
    confidence = search.confidence(run, diptych) if json else None
    alone = len(images) == len(given.images) == 1
    for names, pixels in given.batches(diptych.image_size):
        for name, several in zip(names, search.captions(diptych, pixels), strict=True):
            record: dict[str, Any] = {"file": name, "caption": several[0].text, "score": several[0].score}
            if confidence is not None and several[0].score is not None:
                record["confidence"] = confidence(several[0].score)
            if candidates > 1:
                record["candidates"] = [{"caption": each.text, "score": each.score} for each in several]
            line = json_format.dumps(record, ensure_ascii=False) if json else several[0].text
            print(line if json or alone else f"{name}: {line}", flush=True)
    given.exit_if_any_was_left_out()


def _shard_of(shard: str | None, out: Path | None) -> tuple[int, int] | None:
    """Number of a part and of all parts. Raises UserError for what is no such text."""
    if shard is None:
        return None
    if out is None:
        raise UserError(f"--shard {shard}: goes with --out alone")
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {shard}: give the number of the part, from 0, and of all parts, as in 0/4")
    return int(number), int(count)


def _calibrate(run: Path, spec: str, *, opened: "Callable[[], Diptych]", search: CaptionSearch) -> None:
    """Write RUN/confidence, and say on stderr what it is worth: stdout is for captions."""
    from diptych.data.check import open_data_of
    from diptych.data.sources import open_finite, require_pairs
    from diptych.data.sources.columns import Columns
    from diptych.run_folder import read_config

    data = read_config(run)["run"]["data"] if (run / "config.json").is_file() else {}
    if spec == "data.valid" and not data.get("valid"):
        raise UserError(f"--calibrate data.valid: {run} had no --data.valid; give captioned images it has not seen")
    if spec == data.get("pairs"):
        raise UserError(
            f"--calibrate {spec}: the run has learned from these pairs; give captioned images it has not seen"
        )
    source = open_data_of(run, "valid") if spec == "data.valid" else open_finite(spec, Columns())
    require_pairs(source, spec)
    from diptych.itit.confidence import calibrate
    from diptych.report.terminal import ProgressLine

    found = calibrate(opened(), source, advance=ProgressLine("calibrating"), **asdict(search))
    where = found.save(run)
    print(f"{found.summary()}; written to {where}", file=sys.stderr)


def _caption_into(
    out: Path,
    given: "ImageArguments",
    *,
    run: Path,
    opened: "Callable[[], Diptych]",
    every: bool,
    search: CaptionSearch,
    engine: "Engine",
) -> None:
    from diptych.cli.images import ROWS
    from diptych.data.caption_file import CaptionFile, Sidecars, holds_images
    from diptych.io import weights_digest
    from diptych.report.terminal import ProgressLine

    images = [image for image in given.images if every or not image.has_caption()]
    captioned = len(given.images) - len(images)
    names = [image.name for image in images]
    if holds_images(out) and (computed := next((each.name for each in images if each.file is None), None)):
        raise UserError(f"--out {out}: {computed} is computed and has no file to put in; give another --out")
    diptych = opened()
    confidence = None if out == SIDECARS else search.confidence(run, diptych)
    file: CaptionFile | Sidecars
    if out == SIDECARS:
        file = Sidecars(names)
    else:
        settings = {"weights": weights_digest(diptych.model), **asdict(search), **diptych.reading}
        file = CaptionFile(out, made_by=settings, files={each.name: each.file for each in images if each.file})
    given.images = [image for image in images if image.name not in file.made]
    begun = len(images) - len(given.images)
    left = [image.name for image in given.images]
    blocks = [left[start : start + ROWS] for start in range(0, len(left), ROWS)]
    work = partial(_caption_block, search=search)
    advance, done = ProgressLine("captioning"), 0
    tools = diptych, {image.name: image for image in given.images}
    for block, (made, mistakes) in zip(blocks, engine.map(work, tools, blocks), strict=True):
        given.count(used=len(made), mistakes=mistakes)
        file.add(made)
        done += len(block)
        advance(done, len(left))
    file.finish(names, confidence=confidence)
    more = f", {begun:,} of them before" if begun else ""
    spared = f"; {captioned:,} that have captions left out" if captioned else ""
    print(f"{given.used + begun:,} images captioned{more}{spared}: {file.where}")
    given.exit_if_any_was_left_out()


def _open_to_caption(
    opened: "Callable[[], Diptych]", places: tuple[str, ...]
) -> "tuple[Diptych, dict[str, NamedImage]]":
    """In a worker of Ray: the run, and all images of the command by their names."""
    from diptych.cli.images import find_images

    return opened(), {image.name: image for image in find_images(places).images}


def _caption_block(
    tools: "tuple[Diptych, dict[str, NamedImage]]", names: list[str], *, search: CaptionSearch
) -> "tuple[list[MadeCaption], list[str]]":
    """Captions of the images of these names, and what is wrong with those that cannot be read."""
    import numpy as np

    from diptych.cli.images import read_named
    from diptych.data.caption_file import MadeCaption

    diptych, images = tools
    if gone := [name for name in names if name not in images]:
        raise UserError(f"{gone[0]}: not to be found where a worker of Ray runs; all machines must see the same files")
    read = read_named([images[name] for name in names], diptych.image_size)
    found = search.captions(diptych, np.stack(read.pixels)) if read.names else []
    made = [
        MadeCaption(
            file=name,
            caption=each[0].text,
            score=each[0].score,
            candidates=[one.text for one in each] if search.candidates > 1 else [],
        )
        for name, each in zip(read.names, found, strict=True)
    ]
    return made, read.mistakes
