"""The command line: one function for each command, its name, and the exit status of mistakes and interruptions."""

import io
import os
import sys
from typing import Any

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
from diptych.cli.training import demo, encode, features, fit, fit_for_help, plan, plan_for_help, recipes
from diptych.errors import Interrupted, UserError

_ABOUT = (
    "Train a model to caption, generate, classify and search images "
    "from few captioned images and many unpaired images and texts."
)

COMMANDS = {
    "demo": demo,
    "recipes": recipes,
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
        if arguments[:1] == ["fit"]:
            fit(arguments[1:])
        elif arguments[:1] == ["plan"]:
            plan(arguments[1:])
        else:
            subcommands: dict[str, Any] = {**COMMANDS, "fit": fit_for_help, "plan": plan_for_help}
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
