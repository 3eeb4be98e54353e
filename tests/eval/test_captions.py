"""Caption scores against pycocoevalcap's own wrappers and closed forms, and the tokenizer rule by rule."""

import math
import subprocess
import sys
import time

import pytest

from diptych.errors import UserError
from diptych.eval.captions import _keyed, measure_diversity, score_captions, score_tokens, tokenize

# Scores


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


# Penn Treebank tokens: every expectation is the output of Stanford PTBTokenizer 3.4.1, as pycocoevalcap filters it


CASES = {
    "plain words": ("Two Dogs play", "two dogs play"),
    "sentence punctuation": ("Stop, now; here: yes. Really?", "stop now here yes really"),
    "runs of marks stay, single ones go": ("really?! wow!! no!", "really ?! wow !! no"),
    "dots": ("wait... or .. not", "wait or not"),
    "quotes": ("the \"big\" 'red' ``bus'' “x” ‘y’", "the big red bus x y"),
    "brackets": ("(a man) [sits] {there}", "-lrb- a man -rrb- -lsb- sits -rsb- -lcb- there -rcb-"),
    "dashes": ("x - y -- z—here x–y -end end-", "x y z here x y end end"),
    "hyphens": ("a red-and-white t-shirt, 4-wheeler, K-9, F-150", "a red-and-white t-shirt 4-wheeler k-9 f-150"),
    "possessive": ("the dog's and dogs' toys, T-shirt's", "the dog 's and dogs toys t-shirt 's"),
    "curly possessive": ("the dog’s", "the dog 's"),
    "clitics": ("I'm he'd they'll we've you're it's", "i 'm he 'd they 'll we 've you 're it 's"),
    "not": ("don't CAN'T won't ain't shouldn't've", "do n't ca n't wo n't ai n't should n't 've"),
    "not inside a chain": ("a can't-miss game", "a ca n't miss game"),
    "joined verbs": ("cannot gonna gotta wanna lemme gimme", "can not gon na got ta wan na lem me gim me"),
    "joined verbs in longer words": ("wanna-be cannots", "wanna-be cannots"),
    "it is": ("'tis and 'twas", "'t is and 't was"),
    "apostrophe inside": (
        "o'clock hors d'oeuvres O'Neil ma'am D'Angelo",
        "o'clock hors d'oeuvres o'neil ma'am d'angelo",
    ),
    "apostrophe does not hold": ("x'x m'lady goin' y'all", "x x m lady goin y' all"),
    "elisions": ("'em 'til 'cause '90s 'round ol' rock 'n' roll", "'em 'til 'cause '90s round ol' rock 'n' roll"),
    "years": ("the 1990s, 1990's and '05 but not '93'", "the 1990s 1990 's and '05 but not 93"),
    "titles": ("Mr. and mrs. Smith of St. Louis", "mr. and mrs. smith of st. louis"),
    "abbreviation at the end": ("he lives on Main st.", "he lives on main st."),
    "abbreviation before a hyphen": ("St.-Jean", "st.-jean"),
    "not an abbreviation": ("in the sun. On a mat. by no.", "in the sun on a mat by no"),
    "capitals only": ("in Mass. at mass. ", "in mass. at mass"),
    "before a number": ("no. 5 and fig. 2", "no. 5 and fig. 2"),
    "acronyms": ("the U.S. team, u.s.a. at 5 p.m., U.S.-made", "the u.s. team u.s.a. at 5 p.m. u.s.-made"),
    "initials": ("J. Crew and J.R.R. Tolkien", "j. crew and j.r.r. tolkien"),
    "initial before a sentence": ("vitamin C. The man", "vitamin c the man"),
    "capitals with &": ("AT&T and R&B but r&b", "at&t and r&b but r & b"),
    "dots inside words": ("yahoo.com no.yes hi!you", "yahoo.com no.yes hi!you"),
    "numbers": ("1,000 3.5 10:30 -5 +5 .5 :11 1,2", "1,000 3.5 10:30 -5 +5 .5 :11 1,2"),
    "numbers and letters": ("3rd 5x5 10am 12:30am 3.5mm 20-30", "3rd 5x5 10am 12:30 am 3.5 mm 20-30"),
    "measures": ("a 1,000-foot 3.5-inch 12:00-1:00", "a 1,000-foot 3.5-inch 12:00 -1:00"),
    "feet and inches": ("5'10\" 6' 6\"", "5 10 6 6"),
    "fractions": ("1/2 and 3 1/2 or 3½", "1/2 and 3\u00a01/2 or 3 1/2"),
    "slashes": ("and/or red-blue/green w/o w/ /x", "and/or red-blue/green w/o w / / x"),
    "money": ("$5.00 US$5 €5 £5 5¢ 10%", "$ 5.00 us$ 5 $ 5 # 5 5 cents 10 %"),
    "tags": ("#1 #fun @user A#B", "# 1 #fun @user a #b"),
    "addresses": ("see http://a.b/c?d=e. me@x.com", "see http://a.b/c?d=e me@x.com"),
    "markup": ("<b> hi </b> <3", "<b> hi </b> < 3"),
    "entities": ("a &amp; b &lt; &quot;c&quot;", "a & b < c"),
    "signs": ("a+b a=b x*y ** _ a_b a|b ~", "a + b a = b x * y ** _ a_b a | b ~"),
    "faces": (":) ;-) :D", ":-rrb- ;--rrb- :d"),
    "other letters": ("café Dalí São 日本語", "café dalí são 日本語"),
    "beyond 16 bits": ("dog 😀 cat", "dog cat"),
    "white space": ("  a\tdog \n sits ", "a dog sits"),
    "nothing left": ("... -- !", ""),
    "empty": ("", ""),
}


@pytest.mark.parametrize(("caption", "expected"), CASES.values(), ids=CASES.keys())
def test_tokens(caption, expected):
    assert tokenize(caption) == expected


@pytest.mark.parametrize("piece", ["a.b-", "a'", "ae", "x/", "<a", "1,", "a@", "&A", "..", "a-"])
def test_degenerate_text_takes_linear_time(piece):
    """A half-trained captioner repeats itself; nested repetitions in a pattern would then take for ever."""
    start = time.perf_counter()
    tokenize(piece * 2000 + ",")
    assert time.perf_counter() - start < 2
