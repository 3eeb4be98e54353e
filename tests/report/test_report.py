from diptych.report import print_metrics


def test_a_table_under_a_title_that_stays_whole(capsys):
    title = "runs/clip on " + "/very/long" * 30 + "?split=[test]"
    print_metrics({"recall": 0.123456, "images": 1000}, title=title, notes=["it was [dark]"])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == title
    assert "0.1235" in out
    assert "1,000" in out
    assert out.splitlines()[-1] == "Note: it was [dark]"
