"""Commands that train and that encode data for training, and the help of the recipes.

Heavy imports are inside the functions, so that --help and mistakes answer at once.
"""

import ast
import inspect
import itertools
import json
import re
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro import MISSING
from tyro.conf import Positional

from diptych.cli.inference import Device, EngineName, SourceArg, engine_of
from diptych.errors import UserError
from diptych.io import write_bytes
from diptych.run_folder import Kind, Run

RENAMED_FLAGS = {
    "objective.cycles-from": "objective.cycle-start-step",
    "objective.encoder-gradient": "objective.encoder-grad-scale",
    "objective.smoothing": "objective.label-smoothing",
    "objective.others-weight": "objective.aux-weight",
    "objective.others-from": "objective.aux-start-step",
    "objective.hide-for-image": "objective.image-masking",
    "objective.hide-for-text": "objective.text-masking",
    "objective.draw": "objective.image-generation",
    "objective.teacher": "objective.cycle-network",
    "objective.teacher-decay": "objective.cycle-network-decay",
    "generation.draw": "generation.image",
    "generation.write": "generation.text",
    "train.accumulate": "train.grad-accum-steps",
    "optim.clip": "optim.max-grad-norm",
    "model.codebook": "model.codebook-size",
    "model.vocabulary": "model.vocab-size",
    "model.text-tokens": "model.max-text-len",
    "model.text-length": "model.max-text-len",
    "model.size": "model.image-size",
    "model.codes": "model.codebook-size",
    "data.side": "data.decode-size",
    "stage.length": "stage.max-text-len",
    "text-encoder-stage.length": "text-encoder-stage.max-text-len",
}
"""Former names of fields of recipes and their present names. A row covers the fields within a field, and the field in
any part of a recipe: `model.codes` is also `--stage.model.codes`, `objective.draw` is also `--objective.draw.steps`."""


def demo(*, out: Path = Path("runs/demo"), quick: bool = False, from_scratch: bool = False, seed: int = 0) -> None:
    """Train ITIT with and without unpaired data on the built-in scenes, and compare. No download; a CPU is enough.

    Args:
        out: Folder for the two runs, metrics.json and report.html.
        quick: Train for less than a minute, for a first look; too short to learn much.
        from_scratch: Train the image tokenizer and the text encoder too, in place of the ones that come with Diptych.
        seed: Seed of scenes, weights and training; another seed gives other scenes.
    """
    from diptych.itit.demo import run_demo

    run_demo(out, quick=quick, from_scratch=from_scratch, seed=seed)


def recipes() -> None:
    """List the recipes, with the cost and the expected result of each."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from diptych.registry import RECIPES

    console = Console(highlight=False)
    console.print(_COSTS, markup=False)
    for name, recipe in RECIPES.items():
        summary, *rest = _paragraphs(recipe.__doc__ or "")
        console.print()
        console.print(Text.assemble((name, "bold"), "  ", summary))
        for paragraph in rest:
            if paragraph.startswith("Command: "):
                console.print(f"    {paragraph}", markup=False, soft_wrap=True)  # one line, to be copied
            else:
                console.print(Padding(Text(paragraph), (0, 0, 0, 4)))


def _paragraphs(doc: str) -> list[str]:
    """The paragraphs of a recipe's docstring, each on one line. A line that begins with a label begins one too."""
    blocks = re.split(r"\n\s*\n|\n\s*(?=(?:Command|Cost|Expected|Scores|With [^\n]*):)", doc.strip())
    return [" ".join(block.split()) for block in blocks]


def encode(
    source: SourceArg,
    *,
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    out: Path,
    features: bool = False,
    workers: int = 2,
    engine: EngineName = "local",
    ray_address: str | None = None,
) -> None:
    """Encode images to tokens and texts to ids ahead of training, by the tokenizer and text encoder of a run.

    Args:
        source: Source of images, texts or both.
        run: Run folder with tokenizer/ and text_encoder/.
        out: Folder for the encoded data, which `diptych fit` takes as a source.
        features: Also store the features of the frozen text encoder.
        workers: Number of threads that decode images.
        engine: Where items are encoded: in this process, or by the workers of a Ray cluster (extra `ray`). The
            result is the same.
        ray_address: Address of the cluster. Default: that of RAY_ADDRESS, else one is started on this machine.
    """
    working = engine_of(engine, ray_address)
    from diptych.data.sources import open_source

    open_source(source)  # what is wrong with it is told before the libraries are loaded
    from diptych.data.store import encode as encode_source
    from diptych.itit.data import open_to_encode

    opened = partial(open_to_encode, source, run, features=features)
    found, tokenizers = opened()
    store = encode_source(found, out, tokenizers, workers=workers, engine=replace(working, reopen=opened))
    skipped = store.manifest["skipped"]
    print(f"{len(store):,} items in {out}" + (f"; {skipped} skipped, see {out}/skipped.jsonl" if skipped else ""))


def features(
    source: SourceArg,
    *,
    kind: Literal["images", "texts", "audio"],
    encoder: str | None = None,
    out: Path,
    length: int = 64,
    hop: int = 160,
    device: Device = "auto",
) -> None:
    """Compute features of every token or frame, for `diptych fit uml-ssl`.

    Args:
        source: Source of images or texts; for audio a tar of ogg, wav or flac files.
        kind: Modality to take from the source.
        encoder: Encoder that gives the features: a folder or hub name of transformers, or a run. Audio needs none: its
            features are then log-mel frames.
        out: Folder for the store of features.
        length: Number of tokens or frames to keep of an item; what follows is cut off.
        hop: Number of audio samples from one log-mel frame to the next, at 16,000 samples a second.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    from diptych.uml.data import write_sequences

    store = write_sequences(source, kind, encoder=encoder, out=out, length=length, hop=hop, device=device)
    print(f"{len(store):,} {kind} in {out}, {store.vectors.shape[1]} positions of width {store.vectors.shape[2]}")


_COSTS = (
    "Costs, where a machine is not named: one thread of a Xeon, limited to AVX2 and fp32 (ATEN_CPU_CAPABILITY=avx2, "
    "ONEDNN_MAX_CPU_ISA=AVX2), 12 to 24 steps timed on Flickr8k and multiplied. --minutes N makes any of them end in "
    "N minutes.\n"
)
_MINUTES = (
    "Number of minutes for the whole run. In every stage the number of steps, the warm-up, the intervals and the steps "
    "at which losses begin are set so that the run ends in time on this machine; if the time is short, batches are "
    "made smaller. Default: the recipe's steps, however long they take."
)
_OUT = "Folder of the run; an interrupted run continues there."


def fit(arguments: list[str]) -> None:
    """`diptych fit RECIPE --out RUN [any field]`: the options depend on the recipe, so they are parsed here."""
    began = time.monotonic() - time.process_time()  # ahead of the imports, which count in --minutes
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.cli(fit_for_help, prog="diptych fit", args=["--help"])
        return
    file, arguments = _take_config(arguments)
    settings = read_settings(file) if file is not None else {}
    if not arguments or arguments[0].startswith("-"):
        if "recipe" not in settings:
            raise UserError("no recipe given: diptych fit RECIPE --out RUN, or `recipe:` in the file of --config")
        arguments = [str(settings["recipe"]), *arguments]
    name, rest = arguments[0], arguments[1:]
    if settings.get("recipe", name) != name:
        raise UserError(f"{file}: made for the recipe {settings['recipe']}, and {name} is given")
    for argument in rest:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and (now := _renamed(flag)) is not None:
            raise UserError(f"{flag} is now {now}")

    from diptych.registry import RECIPES

    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}: choose {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    if "--help" in rest or "-h" in rest:
        always = {"--out RUN": f"{_OUT} (required)", "--minutes MINUTES": _MINUTES}
        print(short_help(name, recipe, about=RECIPES[name].__doc__ or "", always=always), end="")
        return
    rest = ["--help" if argument == "--help-all" else argument for argument in rest]
    rest = settings_as_flags(settings, but_not=rest) + rest
    given = _parse_fit(type(recipe), recipe, rest, prog=f"diptych fit {name}", about=RECIPES[name].__doc__)
    asked = _changed(_plain(given.run), _plain(recipe))
    _check_length(asked, minutes=given.minutes)
    budget = None
    if given.minutes is not None:
        from diptych.train.pace import Budget

        budget = Budget(given.minutes, began=began)
    try:
        given.run.fit(given.out, recipe=name, budget=budget)
    except UserError:  # what was asked for may not fit the run that is there
        raise
    except BaseException:
        write_settings(given.out, name, asked)
        raise
    write_settings(given.out, name, asked)


def _check_length(asked: Mapping[str, Any], *, minutes: float | None, path: str = "") -> None:
    """Raise UserError where more than one of minutes, epochs and steps is asked for, in any stage."""
    for name, value in asked.items():
        if isinstance(value, Mapping):
            _check_length(value, minutes=minutes, path=f"{path}{name.replace('_', '-')}.")
    if asked.get("epochs") is None:
        return
    other = "--minutes" if minutes is not None else f"--{path}steps" if "steps" in asked else None
    if other is not None:
        raise UserError(f"--{path}epochs and {other} both say how long to train: leave one of them away")


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config`, and the other arguments."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.partition("=")[2]), arguments[:place] + arguments[place + 1 :]
        if argument == "--config":
            if place + 1 == len(arguments):
                raise UserError("--config: no file given")
            return Path(arguments[place + 1]), arguments[:place] + arguments[place + 2 :]
    return None, arguments


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a YAML file: fields of a recipe, nested as in `config.yaml` of a run folder, and its name.

    Raises UserError where there is no such file or it holds no settings.
    """
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is no YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{file}: holds no settings: write fields of a recipe, e.g. `train: {{steps: 100}}`")
    return settings


def settings_as_flags(settings: Mapping[str, Any], *, but_not: Sequence[str]) -> list[str]:
    """The settings as arguments of `diptych fit`, without those that ``but_not`` gives: flags take precedence."""
    given = {_without_no(argument.partition("=")[0]) for argument in but_not if argument.startswith("--")}
    flags: list[str] = []

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                add(f"{path}.{name}" if path else str(name), inner)
            return
        flag = "--" + path.replace("_", "-")
        if flag in given:
            return
        if isinstance(value, bool):
            head, _, last = flag.rpartition(".")
            flags.append(flag if value else f"{head}.no-{last}" if head else f"--no-{last.removeprefix('--')}")
        elif isinstance(value, list):
            flags.extend([flag, *map(str, value)])
        else:
            flags.extend([flag, str(value)])

    add("", {name: value for name, value in settings.items() if name != "recipe"})
    return flags


def _without_no(flag: str) -> str:
    head, dot, last = flag.replace("_", "-").rpartition(".")
    return f"{head}{dot}{last.removeprefix('no-')}" if dot else flag.replace("_", "-")


def write_settings(out: Path, name: str, changed: Mapping[str, Any]) -> None:
    """Write ``out/config.yaml``, for `--config`: the recipe and the fields that differ from it. Only into a run."""
    import yaml

    if (out / "config.json").is_file():
        text = yaml.safe_dump({"recipe": name, **changed}, sort_keys=False, allow_unicode=True)
        write_bytes(out / "config.yaml", text.encode())


def _plain(run: Any) -> dict[str, Any]:
    """All fields, as lists, numbers and texts."""
    return json.loads(json.dumps(asdict(run), default=str))


def _changed(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := _changed(value, old):
                found[name] = inner
        elif value != old:
            found[name] = value
    return found


def _renamed(flag: str) -> str | None:
    """The present name of a flag in :data:`RENAMED_FLAGS`, None for any other flag."""
    dotted = "." + flag.removeprefix("--").replace("_", "-") + "."
    for old, new in RENAMED_FLAGS.items():
        if f".{old}." in dotted:
            return "--" + dotted.replace(f".{old}.", f".{new}.").strip(".")
    return None


class _Given(NamedTuple):
    """The arguments of `diptych fit`."""

    out: Path
    minutes: float | None
    run: Any


def _parse_fit(kind: type, default: Any, arguments: list[str], *, prog: str, about: str | None) -> _Given:
    fields = Annotated[kind, tyro.conf.arg(name="")]  # --train.steps, not --run.train.steps
    folder = Annotated[Path, tyro.conf.arg(metavar="RUN", help=_OUT)]

    time_limit = Annotated[float | None, tyro.conf.arg(metavar="MINUTES", help=_MINUTES)]

    def parse(*, out: folder, minutes: time_limit = None, run: fields = default):
        return _Given(out, minutes, run)

    return tyro.cli(parse, prog=prog, description=about, args=arguments)


def fit_for_help(
    recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")],
    *,
    out: Path,
    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
) -> None:
    """Train a recipe, or continue where the same command stopped.

    Every field of the recipe is an option: `diptych fit RECIPE --help` lists the ones that matter first, `--help-all`
    all of them.

    Args:
        recipe: Name of a recipe; `diptych recipes` lists them.
        config: YAML file of fields, as `config.yaml` of a run folder; flags take precedence. It may name the recipe.
        out: Folder of the run; an interrupted run continues there.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArguments:
    """Estimate what a recipe takes on given devices: operations, memory, time, and what limits it first.

    Every field of the recipe is an option, as with `diptych fit`. Nothing is read or downloaded.
    """

    recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe; `diptych recipes` lists them."""
    devices: tuple[int, ...] = (1,)
    """Number of devices, eight in each machine; several numbers give a plan for each."""
    device: Literal["h100", "h200", "a100", "rtx4090", "cpu"] = "h100"
    """Kind of device; cpu measures the peak of this machine."""
    utilization: float = 0.4
    """Share of the peak of a device that is reached, 0 to 1."""
    images: int = 10_000_000
    """Number of different images in the data, each of which is encoded once."""
    text_features: Literal["computed", "cached"] = "computed"
    """Features of the frozen text encoder: computed in each step, or cached on disk."""
    json: Path | None = None
    """File for all numbers."""


def plan(arguments: list[str]) -> None:
    """`diptych plan RECIPE [any field]`: the options depend on the recipe, so they are parsed here."""
    given, rest = tyro.cli(PlanArguments, prog="diptych plan", args=arguments or ["--help"], return_unknown_args=True)

    from diptych.plan import plan as on_paper
    from diptych.registry import RECIPES

    if given.recipe not in RECIPES:
        raise UserError(f"no recipe {given.recipe!r}: choose {', '.join(RECIPES)}")
    recipe = RECIPES[given.recipe]()
    _fill_missing(recipe)
    run = _parse_fit(
        type(recipe), recipe, ["--out", "plan", *rest], prog=f"diptych plan {given.recipe}", about=None
    ).run
    work, found = None, []
    for devices in given.devices:
        found.append(
            on_paper(
                run,
                recipe=given.recipe,
                device=given.device,
                devices=devices,
                utilization=given.utilization,
                images=given.images,
                text_features=given.text_features,
                work=work,
            )
        )
        work = found[-1].work
        print("\n".join(found[-1].lines()))
    if given.json is not None:
        write_bytes(given.json, (json.dumps([asdict(each) for each in found], indent=1) + "\n").encode())


def _fill_missing(run: Any) -> None:
    """Give an empty name to each source that a run needs and a plan does not."""
    for field in fields(run):
        value = getattr(run, field.name)
        if is_dataclass(value):
            _fill_missing(value)
        elif value is MISSING:
            setattr(run, field.name, "")


FIRST: dict[Kind, str] = {
    "itit": "data.pairs data.images data.texts data.valid data.max_pairs tokenizer text_encoder train.steps "
    "train.batch_size optim.lr",
    "dual": "data.pairs data.valid start model.image_tower model.text_tower model.tune model.image_size train.steps "
    "train.batch_size optim.lr",
    "classifier": "data.images data.texts data.valid data.shots encoder text_encoder objective.aux_weight patience "
    "train.steps optim.lr",
    "feature encoder": "target others model.width model.depth train.steps train.batch_size optim.lr",
    "tokenizer": "images stage.model.image_size stage.model.codebook_size stage.train.steps stage.train.batch_size "
    "stage.optim.lr",
    "text encoder": "texts stage.model.vocab_size stage.max_text_len stage.train.steps stage.train.batch_size "
    "stage.optim.lr",
}
"""Fields of each kind of run that `--help` lists, separated by spaces."""


def short_help(name: str, run: Run, *, about: str, always: dict[str, str]) -> str:
    """The help of a recipe on a page or two. ``always`` are the options that all recipes have, with their help."""
    width = min(shutil.get_terminal_size().columns, 120)
    rows, listed = dict(always), FIRST[run.kind].split()
    for field in listed:
        text, value = _field(run, field)
        default = " (required)" if value is MISSING else f" (default: {value})" if value not in (None, "") else ""
        rows[f"--{field.replace('_', '-')}"] = text + default
    lines = [f"usage: diptych fit {name} [OPTIONS]", "", textwrap.dedent(f"    {about.strip()}"), ""]
    for flag, text in rows.items():
        lines += [flag, *textwrap.wrap(text, width - 6, initial_indent="      ", subsequent_indent="      ")]
    rest = _count(run) - len(listed)
    return "\n".join([*lines, "", f"{rest} more options: diptych fit {name} --help-all", ""])


def _field(run: Any, path: str) -> tuple[str, Any]:
    """Help and value of a field with a dotted name."""
    *outer, last = path.split(".")
    for name in outer:
        run = getattr(run, name)
    return next(found for kind in type(run).__mro__ if (found := _documented(kind).get(last))), getattr(run, last)


def _documented(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass: by our convention its help."""
    if not is_dataclass(kind):
        return {}
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if hasattr(node, "body"))
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _count(run: Any) -> int:
    """Number of fields that are no dataclasses, at any depth."""
    values = [getattr(run, field.name) for field in fields(run)]
    return sum(_count(value) if is_dataclass(value) else 1 for value in values)
