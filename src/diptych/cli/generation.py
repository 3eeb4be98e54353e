"""Commands on ITIT runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from diptych.cli.arguments import Device, Images, Run
from diptych.errors import UserError

if TYPE_CHECKING:
    from diptych.pipeline import Diptych


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
    draw = replace(diptych.draw_config, **{name: value for name, value in given.items() if value is not None})
    pictures = list(diptych.imagine(texts, seed=seed, draw=draw))
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
    from diptych.pipeline import Diptych
    from diptych.recipes.folders import kind_of

    if (kind := kind_of(run)) != "itit":
        raise UserError(f"{run}: a run of kind {kind!r} neither captions nor draws: give a run of an itit recipe")
    return Diptych.from_pretrained(run, device=device)
