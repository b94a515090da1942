"""What long work says of itself where nobody watches a terminal: a line now and then."""

import pytest

from perceptio_hf.bulk import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    with progress.progress("pictures") as watch:
        for done in range(0, 2001, 50):  # 10 a second, after 1,000 that an earlier run did
            watch("labelling", 1000 + done, 10_000, "")
            clock[0] += 5
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == "" and len(lines) == 200 // 30
    assert lines[0] == "labelling: 1,300 of 10,000, 10 pictures/s, 0:14:30 left"
    assert lines[-1] == "labelling: 2,800 of 10,000, 10 pictures/s, 0:12:00 left"


def test_shares_and_words(clock, capsys):
    with progress.progress() as watch:
        watch("training", 0.0, 1.0, "")
        clock[0] += 40
        watch("training", 0.25, 1.0, "error 0.0400")
    assert capsys.readouterr().err == "training: 25.0%, 0:02:00 left, error 0.0400\n"


def test_short_work_says_nothing_and_a_stage_that_stands_still_divides_by_nothing(clock, capsys):
    assert list(progress.tracked(range(3), "reading", "maps")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    with progress.progress("maps") as watch:
        watch("reading", 7, 9, "")
        clock[0] += 31
        watch("reading", 7, 9, "")
    assert capsys.readouterr().err == "reading: 7 of 9\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.tracked(range(3), "reading", "maps")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "reading" in shown and "of 3" in shown
