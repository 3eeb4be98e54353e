"""Skipping: tolerated up to a share, counted, listed."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from diptych.data.skipped import SkippedItems
from diptych.errors import UserError


def test_one_percent_is_tolerated_and_more_is_not():
    skipped = SkippedItems()
    skipped.check(0)
    skipped.record("a", "a: broken")
    skipped.check(100)
    with pytest.raises(UserError, match=r"1 of 99 items .* 1\.0%: a: broken; mend"):
        skipped.check(99)


def test_the_share_can_be_set_but_everything_is_too_much():
    skipped = SkippedItems(max_skipped_share=1.0)
    skipped.record("a", ValueError("a"))
    skipped.check(2)
    with pytest.raises(UserError):
        skipped.check(1)


def test_lists_only_the_first_few():
    skipped = SkippedItems()
    for i in range(5):
        skipped.record(f"k{i}", f"k{i}: bad")
    with pytest.raises(UserError, match="k0: bad; k1: bad; k2: bad; and 2 more"):
        skipped.check(5)


def test_writes_one_line_each_and_leaves_nothing_else(tmp_path):
    skipped = SkippedItems()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: skipped.record(f"{i:03}", f"bad\n{i}"), range(100)))
    skipped.record("007", "again")
    skipped.write(tmp_path / "run" / "skipped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) == len(skipped) == 100
    assert rows[7] == {"key": "007", "reason": "again"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["skipped.jsonl"]
