import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from diptych import cli
from diptych.errors import Interrupted


def told_without(modules: set[str], *commands: list[str]) -> list[str]:
    """What each command prints, one after another in a process of their own, that imports none of ``modules``."""
    script = (
        "import json, sys\n"
        "from diptych.cli import main\n"
        "modules, *commands = map(json.loads, sys.argv[1:])\n"
        "for command in commands:\n"
        "    sys.argv = ['diptych', *command]\n"
        "    try: main()\n"
        "    except SystemExit as stopped: assert not stopped.code\n"
        "    print(sorted({*modules} & {*sys.modules}), end='END')\n"
    )
    arguments = [json.dumps(each) for each in (sorted(modules), *commands)]
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    told = found.stdout.split("END")[:-1]
    assert len(told) == len(commands)
    assert all(each.endswith("[]") for each in told), told
    return told


def test_help_and_version_come_without_the_heavy_libraries():
    heavy = {"torch", "numpy", "transformers", "diffusers", "datasets"}
    *helps, told = told_without(heavy, ["--help"], ["fit", "--help"], ["imagine", "--help"], ["--version"])
    assert all("usage: diptych" in each for each in helps)
    assert told == f"diptych {version('diptych')}\n[]"


def test_the_version_is_the_packages_and_comes_alone(call):
    assert call("--version") == (0, f"diptych {version('diptych')}\n", "")


def test_a_recipes_help_comes_without_anybodys_networks():
    """They take three times as long to import as torch."""
    recipes = "itit-tiny", "ito-tiny", "uml-finetune"
    heavy = {"transformers.modeling_utils", "diffusers", "datasets", "kornia", "matplotlib"}
    told = told_without(heavy, *(["fit", recipe, "--help"] for recipe in recipes))
    for recipe, each in zip(recipes, told, strict=True):
        assert f"usage: diptych fit {recipe}" in each


def test_no_arguments_give_the_commands(call):
    status, out, _ = call()
    assert status == 0
    for command in ("demo", "recipes", "fit", "encode", "caption", "imagine", "cycle", "evaluate"):
        assert command in out
    assert "\n\n\n" not in out
    assert len(out.splitlines()) < 2 * len(cli.COMMANDS) + 16  # a line or two for each


def test_the_description_of_an_option_fills_its_lines(call):
    _, out, _ = call("caption", "--help")
    lines = [line.strip(" │") for line in out.splitlines()]
    assert "--no-json" not in out
    begin = next(index for index, line in enumerate(lines) if "New file for the captions" in line)
    assert min(map(len, lines[begin : begin + 2])) > 80
    assert "--out PATH" in lines[begin]  # and not {None}|PATH
    assert "default: None" not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "nonsense"),
        (["caption", "run", "image.png", "--jsn"], "--json"),
        (["imagine", "run", "text"], "--out"),
        (["imagine", "run", "text", "--out", "x", "--steps", "many"], "many"),
        (["fit", "itit-tiny", "--out", "x"], "--data.pairs"),
        (["fit", "itit-tiny", "--data.pairs", "scenes:"], "--out"),
        (["fit", "itit-tiny", "--out", "x", "--data.pairs", "scenes:", "--train.stepz", "3"], "--train.steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_misspelt_commands_and_flags(call, arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_interruptions_have_the_shells_status(call, monkeypatch):
    def stop(error):
        def recipes():
            raise error

        monkeypatch.setitem(cli.COMMANDS, "recipes", recipes)

    stop(Interrupted(15, step=7))
    status, _, err = call("recipes")
    assert status == 143
    assert "after step 7" in err
    assert err.count("\n") == 1
    stop(KeyboardInterrupt())
    assert call("recipes") == (130, "", "")
