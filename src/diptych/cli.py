"""The command line. One function per command; heavy imports inside, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diptych.errors import UserError
from diptych.train.interrupt import Interrupted

Device = Literal["auto", "cpu", "cuda", "mps"]
_Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def demo(*, out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> None:
    """Train and compare on the built-in scenes, and write a report. No download; a CPU is enough.

    Args:
        out: Folder for the two runs, metrics.json and report.html.
        quick: The same path in under a minute, for a first look; too short to learn much.
        seed: Of everything random.
    """
    from diptych.recipes.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


def recipes() -> None:
    """List what can be trained, with cost and expected result."""
    from rich.console import Console

    from diptych.recipes import RECIPES

    console = Console(highlight=False)
    for name, recipe in RECIPES.items():
        summary, _, rest = (recipe.__doc__ or "").strip().partition("\n")
        console.print(f"[bold]{name}[/bold]  {summary}")
        for line in rest.strip().splitlines():
            console.print(f"    {line.strip()}", markup=False)


def encode(source: Positional[str], *, run: _Run, out: Path, features: bool = False, workers: int = 2) -> None:
    """Images to tokens and texts to ids ahead of training, with the tokenizer and text encoder of a run.

    Args:
        source: Any source of images, texts or both.
        run: Run folder with tokenizer/ and text_encoder/.
        out: Folder to write; `diptych fit` takes it as a source.
        features: Also store the frozen text features.
        workers: Threads that decode images.
    """
    from dataclasses import replace

    from diptych.data.encode import encode as encode_source
    from diptych.data.sources import open_source
    from diptych.recipes.runs import run_coders

    opened = open_source(source)
    what = run_coders(run, features=features)
    what = replace(
        what, tokens=what.tokens if opened.has_images else None, ids=what.ids if opened.has_captions else None
    )
    store = encode_source(opened, out, what, workers=workers)
    skipped = store.manifest["skipped"]
    print(f"{len(store):,} items in {out}" + (f"; {skipped} skipped, see {out}/skipped.jsonl" if skipped else ""))


def caption(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")],
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

    from diptych.pipeline import Diptych

    diptych = Diptych.from_pretrained(run, device=device)
    pictures = [diptych.read(image) for image in images]
    for image, found in zip(images, diptych.captions(pictures, beams=beams), strict=True):
        record = {"file": str(image), "caption": found.text, "score": found.score}
        print(json_format.dumps(record, ensure_ascii=False) if json else found.text)


def imagine(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
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

    from diptych.pipeline import Diptych
    from diptych.report.sheet import contact_sheet, save_png

    diptych = Diptych.from_pretrained(run, device=device)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    draw = replace(diptych.draw_config, **{name: value for name, value in given.items() if value is not None})
    pictures = list(diptych.imagine(texts, seed=seed, draw=draw))
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        save_png(out / f"{number:03d}.png", picture)
    sheet = save_png(out / "sheet.png", contact_sheet(pictures, captions=list(texts)))
    print(f"{len(pictures)} pictures in {out}, all on {sheet}")


def cycle(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
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
    from diptych.pipeline import Diptych
    from diptych.report.sheet import cycle_strip, save_png

    steps = Diptych.from_pretrained(run, device=device).cycle(text=text, image=image, rounds=rounds, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        if step.picture is None:
            print(f"{number}: {step.text}")
        else:
            print(f"{number}: {save_png(out / f'{number:03d}.png', step.picture)}")
    print(f"all steps on {save_png(out / 'strip.png', cycle_strip([step.shown for step in steps]))}")


def evaluate(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    *,
    data: str,
    limit: int | None = None,
    beams: int | None = None,
    seed: int = 0,
    features: str | None = None,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Score a run on data it has not seen: a table, metrics.json and a sheet.

    ITIT: captions and pictures, on captioned images. An image tokenizer: what it keeps of images.

    Args:
        run: Run folder.
        data: Images, captioned for ITIT, that the run has not seen: any source.
        limit: Score the first so many only. Scores of different subsets are not comparable.
        beams: ITIT: beams for the captions. Default: the run's own.
        seed: ITIT: of the drawn pictures.
        features: For the Frechet distance: folder or hub name of a vision model of transformers, or a TorchScript file
            (an Inception network gives FID). Default: a random network, which needs no download.
        out: Folder for metrics.json, captions.jsonl and a sheet. Default: RUN/evaluation.
        device: Where to compute.
    """
    from diptych.data.sources import open_source
    from diptych.eval.generation import EvaluateConfig
    from diptych.recipes.folders import kind_of
    from diptych.recipes.runs import evaluate_run, evaluate_tokenizer_run

    out, source, kind = out or run / "evaluation", open_source(data), kind_of(run)
    if kind == "tokenizer":
        evaluate_tokenizer_run(run, source, limit=limit, features=features, out=out, device=device)
        return
    if kind != "itit":
        raise UserError(f"{run}: a {kind} has no scores of its own: evaluate the run that uses it")
    config = EvaluateConfig(limit=limit, beams=beams, seed=seed)
    evaluate_run(run, source, config, features=features, out=out, device=device)


def fit(arguments: list[str]) -> None:
    """`diptych fit RECIPE --out RUN [any field]`: the options depend on the recipe, so they are parsed here."""
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.cli(_fit_for_help, prog="diptych fit", args=["--help"])
        return
    name, rest = arguments[0], arguments[1:]
    from diptych.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}: choose {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    out, run = _parse_fit(type(recipe), recipe, rest, prog=f"diptych fit {name}", about=RECIPES[name].__doc__)
    run.fit(out, recipe=name)


def _parse_fit(kind: type, default: Any, arguments: list[str], *, prog: str, about: str | None) -> tuple[Path, Any]:
    fields = Annotated[kind, tyro.conf.arg(name="")]  # --train.steps, not --run.train.steps

    def parse(*, out: Annotated[Path, tyro.conf.arg(metavar="RUN", help="Run folder.")], run: fields = default):
        return out, run

    return tyro.cli(parse, prog=prog, description=about, args=arguments)


COMMANDS = {
    "demo": demo,
    "recipes": recipes,
    "encode": encode,
    "caption": caption,
    "imagine": imagine,
    "cycle": cycle,
    "evaluate": evaluate,
}


def main() -> None:
    """Entry point. Mistakes of the user end in one line and status 2."""
    arguments = sys.argv[1:]
    # Read by the libraries when they are imported: loading three small files needs no progress bars.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    try:
        if arguments[:1] == ["fit"]:
            fit(arguments[1:])
        else:
            subcommands: dict[str, Any] = {**COMMANDS, "fit": _fit_for_help}
            tyro.extras.subcommand_cli_from_dict(
                subcommands, prog="diptych", description=_ABOUT, args=arguments or ["--help"], sort_subcommands=False
            )
    except UserError as error:
        print(f"diptych: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"diptych: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)


def _fit_for_help(recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")], *, out: Path) -> None:
    """Train a recipe, or go on where the same command stopped.

    Every field of the recipe is an option: `diptych fit RECIPE --help` lists them.

    Args:
        recipe: See `diptych recipes`.
        out: Run folder.
    """


_ABOUT = "Teach a model to caption and draw from few captioned images, many bare images and loose texts."
