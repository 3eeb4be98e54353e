"""Commands that train, and what comes before."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diptych.cli.inference import Device
from diptych.errors import UserError


def demo(*, out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> None:
    """Train and compare on the built-in scenes, and write a report. No download; a CPU is enough.

    Args:
        out: Folder for the two runs, metrics.json and report.html.
        quick: The same path in under a minute, for a first look; too short to learn much.
        seed: Of everything random.
    """
    from diptych.itit.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


def recipes() -> None:
    """List what can be trained, with cost and expected result."""
    from rich.console import Console

    from diptych.registry import RECIPES

    console = Console(highlight=False)
    for name, recipe in RECIPES.items():
        summary, _, rest = (recipe.__doc__ or "").strip().partition("\n")
        console.print(f"[bold]{name}[/bold]  {summary}")
        for line in rest.strip().splitlines():
            console.print(f"    {line.strip()}", markup=False)


def encode(
    source: Positional[str],
    *,
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    out: Path,
    features: bool = False,
    workers: int = 2,
) -> None:
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
    from diptych.itit.evaluation import run_coders

    opened = open_source(source)
    what = run_coders(run, features=features)
    what = replace(
        what, tokens=what.tokens if opened.has_images else None, ids=what.ids if opened.has_captions else None
    )
    store = encode_source(opened, out, what, workers=workers)
    skipped = store.manifest["skipped"]
    print(f"{len(store):,} items in {out}" + (f"; {skipped} skipped, see {out}/skipped.jsonl" if skipped else ""))


def features(
    source: Annotated[Positional[str], tyro.conf.arg(metavar="SRC")],
    *,
    kind: Literal["images", "texts", "audio"],
    encoder: str | None = None,
    out: Path,
    length: int = 64,
    hop: int = 160,
    device: Device = "auto",
) -> None:
    """Features of every token or frame, for `diptych fit uml-ssl`.

    Args:
        source: Any source of images or texts; of sounds, a tar of ogg, wav or flac.
        kind: What to take from it.
        encoder: Folder or hub name of transformers, or a run. Sounds may do without: log-mel frames.
        out: Folder to write: a store.
        length: Tokens or frames of an item; more are cut off.
        hop: Log-mel frames: samples from one to the next, of 16,000 a second.
        device: Where to compute.
    """
    from diptych.uml.features import write_sequences

    store = write_sequences(source, kind, encoder=encoder, out=out, length=length, hop=hop, device=device)
    print(f"{len(store):,} {kind} in {out}, {store.vectors.shape[1]} positions of width {store.vectors.shape[2]}")


def fit(arguments: list[str]) -> None:
    """`diptych fit RECIPE --out RUN [any field]`: the options depend on the recipe, so they are parsed here."""
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.cli(fit_for_help, prog="diptych fit", args=["--help"])
        return
    name, rest = arguments[0], arguments[1:]
    from diptych.registry import RECIPES

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


def fit_for_help(recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")], *, out: Path) -> None:
    """Train a recipe, or go on where the same command stopped.

    Every field of the recipe is an option: `diptych fit RECIPE --help` lists them.

    Args:
        recipe: See `diptych recipes`.
        out: Run folder.
    """
