"""What a run folder says of itself, and how its parts are found and replaced."""

import json

import pytest

from diptych.errors import UserError
from diptych.registry import RECIPES
from diptych.run_folder import kind_of, part_of, read_config, save_model, write_config

KINDS = {
    "itit": "itit",
    "clip": "dual",
    "siglip": "dual",
    "slip": "dual",
    "ito": "dual",
    "uml-probe": "classifier",
    "uml-finetune": "classifier",
    "uml-ssl": "feature encoder",
    "vqgan": "tokenizer",
    "text": "text encoder",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kind_of_every_recipe_is_stored(recipe, tmp_path):
    write_config(tmp_path, recipe=recipe, run=RECIPES[recipe]())
    assert kind_of(tmp_path) == KINDS.get(recipe, KINDS.get(recipe.split("-")[0]))


def test_the_kind_does_not_depend_on_the_name_of_the_recipe(tmp_path):
    write_config(tmp_path, recipe="my-own", run=RECIPES["vqgan-tiny"]())
    assert kind_of(tmp_path) == "tokenizer"


def test_config_holds_recipe_fields_and_versions(tmp_path):
    write_config(tmp_path / "run", recipe="vqgan-tiny", run=RECIPES["vqgan-tiny"]())
    config = read_config(tmp_path / "run")
    assert config["recipe"] == "vqgan-tiny"
    assert config["run"]["stage"]["model"]["image_size"] == 32
    assert {"diptych", "torch"} <= config["versions"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run folder"),
        ("{", "not readable"),
        ("[1]", "not the settings of a run"),
        ('{"recipe": "itit-tiny"}', '"kind": add it'),
        ('{"kind": "newer than this"}', "unknown kind 'newer than this'"),
    ],
)
def test_a_folder_that_does_not_say_what_it_holds(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        kind_of(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_part_of_a_run_or_the_name_itself(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    assert part_of(str(tmp_path), "tokenizer") == str(tmp_path / "tokenizer")
    assert part_of(str(tmp_path), "model") == str(tmp_path)
    assert part_of("amused/amused-256", "tokenizer") == "amused/amused-256"


def test_a_saved_model_takes_the_place_of_the_older_one(tmp_path):
    class Model:
        def __init__(self, name):
            self.name = name

        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / f"{self.name}.json").write_text(json.dumps(self.name))

    (tmp_path / ".model.fresh").mkdir()  # as a killed process leaves it
    (tmp_path / ".model.fresh/stale.json").touch()
    for name in ("old", "new"):
        save_model(Model(name), tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new.json"]
