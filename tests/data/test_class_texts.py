import json

import numpy as np
import pytest

from diptych.data.class_texts import choose_texts, from_templates, permuted, read_class_texts, read_names, texts_of
from diptych.errors import UserError

CLASSES = ["grand_piano", "Leopard"]


def test_templates_speak_of_every_class():
    assert from_templates(CLASSES, ["a photo of a {}.", "{}"]) == [
        ["a photo of a grand piano.", "grand piano"],
        ["a photo of a Leopard.", "Leopard"],
    ]
    assert from_templates(["001.Black_Tern", "2 Owl"], ["a {}"]) == [["a Black Tern"], ["a Owl"]]
    assert from_templates(["7 up", "cola"], ["{}"]) == [["7 up"], ["cola"]]
    with pytest.raises(UserError, match=r"has no \{\}"):
        from_templates(CLASSES, ["a photo"])
    with pytest.raises(UserError, match="no template"):
        from_templates(CLASSES, [])


def test_json_is_no_list_of_names_and_numbers_are_not_spoken(tmp_path):
    (tmp_path / "names.json").write_text('{"0": ["n01440764", "tench"]}')
    with pytest.raises(UserError, match="holds JSON: write one class name a line"):
        read_names(tmp_path / "names.json")
    assert from_templates(["0,bus", "1,car"], ["a {}"]) == [["a bus"], ["a car"]]


def test_a_json_of_descriptions_is_sorted_in_by_name(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"leopard": ["It has  spots.", " "], "grand piano": ["It is black."]}))
    assert read_class_texts(path, CLASSES) == [["It is black."], ["It has spots."]]
    assert texts_of(str(path), CLASSES, templates=()) == [["It is black."], ["It has spots."]]
    assert texts_of(None, CLASSES, templates=("{}",)) == [["grand piano"], ["Leopard"]]


def test_a_folder_has_a_file_for_each_class(tmp_path):
    (tmp_path / "leopard.txt").write_text("It has spots.\n\nIt is a cat.\n")
    (tmp_path / "grand-piano.txt").write_text("It is black.")
    assert read_class_texts(tmp_path, CLASSES) == [["It is black."], ["It has spots.", "It is a cat."]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"leopard": ["spots"]}, "no text about the class 'grand_piano'"),
        ({"leopard": [" "], "grand piano": ["black"]}, "no text about 'leopard'"),
        ({"leopart": ["spots"], "grand piano": ["black"]}, "'leopart', which is no class of the images; is it 'Leop"),
        ({"leopard": [3]}, "not a list of sentences"),
        (["leopard"], "not a JSON object"),
    ],
)
def test_mistakes_in_a_json_are_told(content, message, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_class_texts(tmp_path / "texts.json", CLASSES)


def test_broken_and_empty_places_are_told(tmp_path):
    (tmp_path / "texts.json").write_text("{")
    with pytest.raises(UserError, match=r"is not JSON .*a folder with a file CLASS\.txt"):
        read_class_texts(tmp_path / "texts.json", CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt files"):
        read_class_texts(tmp_path / "empty", CLASSES)
    (tmp_path / "empty" / "leopard.txt").write_text("\n")
    with pytest.raises(UserError, match="no text about 'leopard'"):
        read_class_texts(tmp_path / "empty", CLASSES)
    with pytest.raises(UserError, match="does not exist"):
        read_class_texts(tmp_path / "absent", CLASSES)


def test_so_many_texts_of_each_class_are_chosen():
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    chosen = choose_texts(labels, 4, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [4, 2, 4]
    assert len(set(chosen.tolist())) == 10
    assert np.array_equal(chosen, choose_texts(labels, 4, seed=0))
    assert not np.array_equal(chosen, choose_texts(labels, 4, seed=1))
    assert set(choose_texts(labels, 2, seed=0)) < set(chosen)
    with pytest.raises(UserError, match="0 texts"):
        choose_texts(labels, 0, seed=0)


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_every_class_gets_the_texts_of_another(classes):
    other = permuted(classes, seed=0)
    assert sorted(other) == list(range(classes))
    assert not (other == np.arange(classes)).any()
    with pytest.raises(UserError, match="two classes"):
        permuted(1, seed=0)
