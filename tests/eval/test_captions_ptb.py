"""Our Treebank tokenizer, rule by rule. Every expectation is the output of Stanford PTBTokenizer 3.4.1 as filtered by
pycocoevalcap; `benchmarks/caption_parity.py` compares whole corpora."""

import time

import pytest

from diptych.eval.captions import tokenize

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
def test_rule(caption, expected):
    assert tokenize(caption) == expected


@pytest.mark.parametrize("piece", ["a.b-", "a'", "ae", "x/", "<a", "1,", "a@", "&A", "..", "a-"])
def test_degenerate_text_takes_linear_time(piece):
    """A half-trained captioner repeats itself; nested repetitions in a pattern would then take for ever."""
    start = time.perf_counter()
    tokenize(piece * 2000 + ",")
    assert time.perf_counter() - start < 2
