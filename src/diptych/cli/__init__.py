"""The command line: one function for each command, its name, and the exit status of mistakes and interruptions."""

import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro

from diptych.cli.captions import caption
from diptych.cli.datasets import audit, check, suggest
from diptych.cli.evaluation import evaluate, sweep
from diptych.cli.inference import (
    app,
    classify,
    cycle,
    embed,
    export,
    imagine,
    push,
    search,
)
from diptych.cli.training import PlanArguments, demo, encode, features, fit, fit_for_help, plan, recipes
from diptych.errors import Interrupted, UserError

_ABOUT = (
    "Train a model to caption, generate, classify and search images "
    "from few captioned images and many unpaired images and texts. --version prints the version."
)

_METAVARS: dict[Any, str] = {Path | None: "PATH", str | None: "STR", int | None: "INT", float | None: "FLOAT"}
COMMANDS: dict[str, Any] = {
    "demo": demo,
    "recipes": recipes,
    "fit": fit_for_help,
    "plan": PlanArguments,
    "check": check,
    "audit": audit,
    "suggest": suggest,
    "encode": encode,
    "features": features,
    "caption": caption,
    "imagine": imagine,
    "cycle": cycle,
    "embed": embed,
    "search": search,
    "classify": classify,
    "app": app,
    "export": export,
    "push": push,
    "evaluate": evaluate,
    "sweep": sweep,
}


def _summary(command: Callable[..., object]) -> Callable[[], None]:
    """A command without options and with the first line of its description, for the list of commands."""

    def summary() -> None: ...

    summary.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return summary


def _for_help(command: Callable[..., object]) -> Callable[..., object]:
    """``command`` as its help shows it.

    The description of each option is on one line: its own line breaks would end lines early. For an option that may be
    left out, None is shown neither as its default nor as one of its values; its description says what happens then.
    """
    command.__doc__ = re.sub(r"\n {5,}", " ", inspect.cleandoc(command.__doc__ or ""))
    if inspect.isfunction(command):
        for name, parameter in inspect.signature(command).parameters.items():
            if parameter.default in (None, ()):
                shown = tyro.conf.arg(help_behavior_hint="", metavar=_METAVARS.get(parameter.annotation))
                command.__annotations__[name] = Annotated[parameter.annotation, shown]
    return command


def main() -> None:
    """Runs the command of ``sys.argv``. A mistake of the user ends in one line on stderr and status 2."""
    arguments = sys.argv[1:]
    # The libraries read these when they are imported. Loading three small files needs no progress bars.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        if arguments == ["--version"]:
            print(f"diptych {version('diptych')}")
        elif arguments[:1] == ["fit"]:
            fit(arguments[1:])
        elif arguments[:1] == ["plan"]:
            plan(arguments[1:])
        else:
            arguments = arguments or ["--help"]
            listed = arguments[0] in ("-h", "--help")
            tyro.extras.subcommand_cli_from_dict(
                {name: (_summary if listed else _for_help)(command) for name, command in COMMANDS.items()},
                prog="diptych",
                description=_ABOUT,
                args=arguments,
                sort_subcommands=False,
                config=(tyro.conf.FlagCreatePairsOff,),
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
