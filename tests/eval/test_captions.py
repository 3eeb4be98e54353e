"""Caption scores: against pycocoevalcap's own wrappers, closed forms, and the ways to misuse them."""

import math
import subprocess
import sys

import pytest

from diptych.errors import UserError
from diptych.eval.captions import _keyed, measure_diversity, score_captions, score_tokens

REFERENCES = {
    "cat": ["A black cat sleeps on the sofa.", "The cat is asleep on a couch."],
    "dog": ["Two dogs run along the beach.", "Dogs are running at the sea.", "A dog's day on the beach!"],
    "bus": ["A red bus waits at the stop."],
    "tea": ["Someone pours tea into a cup.", "A cup of tea, freshly poured."],
}
CANDIDATES = {
    "cat": "A cat sleeps on the couch.",
    "dog": "Two dogs on the beach.",
    "bus": "A red bus waits at the stop.",
    "tea": "A man rides a horse.",
}


def test_equals_the_wrappers_of_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    from diptych.eval.captions import tokenize

    references = {key: [tokenize(text) for text in texts] for key, texts in REFERENCES.items()}
    candidates = {key: [tokenize(text)] for key, text in CANDIDATES.items()}
    scores = score_captions(CANDIDATES, REFERENCES)

    cider, cider_each = Cider().compute_score(references, candidates)
    bleu, bleu_each = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, rouge_each = Rouge().compute_score(references, candidates)
    assert scores.cider == pytest.approx(100 * cider, abs=1e-9)
    assert scores.cider_per_image == pytest.approx(list(100 * cider_each), abs=1e-9)
    assert scores.bleu == pytest.approx(tuple(bleu), abs=1e-12)
    assert [each[3] for each in scores.bleu_per_image] == pytest.approx(bleu_each[3], abs=1e-12)
    assert scores.rouge_l == pytest.approx(rouge, abs=1e-12)
    assert scores.rouge_l_per_image == pytest.approx(list(rouge_each), abs=1e-12)
    assert scores.keys == list(CANDIDATES)


def test_the_best_possible_scores():
    """Candidates equal to their only references, no word shared between images, at least four words: all is full."""
    texts = ["red kites fly high", "old men play chess", "warm bread cools outside"]
    scores = score_tokens(texts, [[text] for text in texts])
    assert scores.cider == pytest.approx(1000)  # the cosine is 1 for n = 1..4, times 10, times 100
    assert scores.bleu == pytest.approx((1, 1, 1, 1))
    assert scores.rouge_l == pytest.approx(1)


def test_closed_form_values():
    """Two images, unigrams only ("a" against "a b"): CIDEr averages over n = 1..4, of which only n = 1 is not zero."""
    scores = score_tokens(["a", "c"], [["a b"], ["d"]])
    # Every word occurs in one image of two, so each has weight log 2: cosine 1 / sqrt 2; "length" counts bigrams: 0, 1.
    expected = 1000 / 4 / math.sqrt(2) * math.exp(-1 / (2 * 6**2))
    assert scores.cider_per_image == pytest.approx([expected, 0])
    assert scores.cider == pytest.approx(expected / 2)
    # Precision 1, recall 1/2, beta 1.2.
    assert scores.rouge_l_per_image == pytest.approx([(1 + 1.44) * 0.5 / (0.5 + 1.44), 0])
    # Corpus BLEU-1: one of two words is right, two words against three in the references.
    assert scores.bleu[0] == pytest.approx(0.5 * math.exp(1 - 3 / 2), rel=1e-6)


def test_lists_and_dicts_give_the_same():
    by_key = score_captions(CANDIDATES, REFERENCES)
    by_place = score_captions(list(CANDIDATES.values()), list(REFERENCES.values()))
    assert by_place.cider_per_image == by_key.cider_per_image
    assert by_place.keys == [0, 1, 2, 3]
    shuffled = score_captions(CANDIDATES, dict(reversed(REFERENCES.items())))
    assert shuffled.cider_per_image == pytest.approx(by_key.cider_per_image)


def test_one_image_gives_cider_zero_and_says_so():
    scores = score_captions(["A red bus."], [["A red bus."]])
    assert scores.cider == 0
    assert "always 0" in scores.warnings[0]


def test_few_images_and_empty_captions_are_reported():
    scores = score_captions({**CANDIDATES, "tea": ""}, REFERENCES)
    assert any("not comparable" in warning for warning in scores.warnings)
    assert any("1 of 4" in warning for warning in scores.warnings)
    assert scores.cider_per_image[3] == 0


def test_many_images_need_no_warning():
    texts = [f"picture {i} of many" for i in range(100)]
    assert score_captions(texts, texts).warnings == []


def test_diversity_by_hand():
    diversity = measure_diversity(["a cat sits", "a cat sits", "a dog", "fish"])
    assert diversity.distinct_captions == 3 / 4
    assert diversity.distinct_1 == 5 / 9  # a cat sits dog fish
    assert diversity.distinct_2 == 3 / 5  # (a cat) (cat sits) (a dog)
    assert diversity.mean_length == 9 / 4
    assert diversity.vocabulary == 5
    assert (diversity.most_common, diversity.most_common_share) == ("a cat sits", 1 / 2)


def test_table_is_flat_numbers():
    table = score_captions(CANDIDATES, REFERENCES).table()
    assert table["cider"] > 0
    assert {"bleu_1", "bleu_4", "rouge_l", "distinct_2", "vocabulary"} <= table.keys()
    assert all(isinstance(value, float) for value in table.values())


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "No candidate"),
        ([], [], "No candidate"),
        ({"x": "a"}, {"y": ["a"]}, "no references, e.g. 'x'"),
        ({"x": "a"}, {"x": ["a"], "y": ["b"]}, "no candidate, e.g. 'y'"),
        (["a", "b"], [["a"]], "no references"),
        ({"x": "a"}, {"x": []}, "no reference with a word"),
        ({"x": "a"}, {"x": ["..."]}, "no reference with a word"),
        ({"x": ["a", "b"]}, {"x": ["a"]}, "2 candidate captions"),
        ({"x": []}, {"x": ["a"]}, "0 candidate captions"),
    ],
)
def test_bad_input_is_explained(candidates, references, message):
    with pytest.raises(UserError, match=message):
        score_captions(candidates, references)


def test_a_missing_caption_is_not_taken_for_text():
    with pytest.raises(UserError, match="image 'x' are not all text"):
        _keyed({"x": [None]}, "candidates")  # through the public door, beartype would be faster in the tests


def test_needs_no_java_and_prints_nothing():
    """In a process with an empty PATH, so that a hidden call of Java would fail, and with stdout watched."""
    code = "from diptych.eval.captions import score_captions as s; s(['a dog', 'a cat'], [['a dog'], ['the cat']])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=True)
    assert done.stdout == ""
