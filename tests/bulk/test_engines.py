"""Batches and their results: the order, what is read ahead, and what a journal keeps in memory."""

import json
import threading
import time

import pytest

from perceptio_hf.bulk.engines import LocalEngine, Result, fill_journal, open_engine, readers, work_through
from perceptio_hf.bulk.journal import Journal
from perceptio_hf.bulk.order import cut, order_by_size, read_order, write_order


class Doubler:
    """Reads numbers, doubles them; remembers how far reading was ahead of the work."""

    def __init__(self, slow: float = 0.0):
        self.slow, self.worked, self.ahead, self.threads = slow, 0, [], set()
        self.lock = threading.Lock()

    def read(self, batch):
        with self.lock:
            self.ahead.append(batch[0] // len(batch) - self.worked)
            self.threads.add(threading.current_thread().name)
        if batch[0] == 1000:
            raise ValueError("1000 is too much")
        return [2 * number for number in batch]

    def work(self, batch, read):
        time.sleep(self.slow)
        self.worked += 1
        return [Result({"id": str(number), "twice": twice}) for number, twice in zip(batch, read, strict=True)]


def test_results_come_in_order_and_little_is_read_ahead():
    worker = Doubler(slow=0.002)
    batches = [[number, number + 1] for number in range(0, 60, 2)]
    results = [result.record["twice"] for part in work_through(worker, iter(batches)) for result in part]
    assert results == [2 * number for number in range(60)]
    assert 1 <= max(worker.ahead) <= readers() + 1
    assert threading.current_thread().name not in worker.threads


def test_an_error_comes_at_its_turn_and_ends_the_threads():
    worker, seen = Doubler(), []
    with pytest.raises(ValueError, match="too much"):
        for results in work_through(worker, [[0], [1], [1000], [3]]):
            seen += results
    assert [result.record["id"] for result in seen] == ["0", "1"]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_files_are_there_before_their_line(tmp_path):
    class Writer(Doubler):
        def work(self, batch, read):
            return [Result({"id": str(number)}, {f"sub/{number}.bin": bytes([number])}) for number in batch]

    journal = Journal(tmp_path / "r.jsonl", {"x": 1}, [str(number) for number in range(5)], keep=False)
    seen = []

    def watch(results):
        seen.append((len(results), journal.done, len(list((tmp_path / "sub").iterdir()))))

    assert fill_journal(journal, LocalEngine(), Writer, [[0, 1], [2, 3], [4]], watch) == 5
    assert seen == [(2, 2, 2), (2, 4, 4), (1, 5, 5)]
    assert (tmp_path / "sub" / "3.bin").read_bytes() == b"\3"
    assert fill_journal(journal, LocalEngine(), None, [[0, 1], [2, 3], [4]]) == 0  # done: the job is not even opened


@pytest.mark.parametrize("done", range(6))
def test_a_run_goes_on_with_whole_batches(tmp_path, done):
    ids = [str(number) for number in range(5)]
    batches, opened = [[0, 1], [2, 3], [4]], []

    def job():
        opened.append(Doubler())
        return opened[-1]

    whole = Journal(tmp_path / "whole.jsonl", {"x": 1}, ids)
    fill_journal(whole, LocalEngine(), Doubler, batches)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:done]) + (b'{"id": "' if done < 5 else b""))
    (tmp_path / "part.claim.json").write_bytes((tmp_path / "whole.claim.json").read_bytes())
    journal = Journal(tmp_path / "part.jsonl", {"x": 1}, ids, keep=False)
    assert journal.done == done and journal.records == []
    assert fill_journal(journal, LocalEngine(), job, batches) == 5 - done
    assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines)
    assert [worker.worked for worker in opened] == ([3 - done // 2] if done < 5 else [])


def test_text_that_no_line_can_hold_is_named(tmp_path):
    journal = Journal(tmp_path / "r.jsonl", {"x": 1}, ["a", "b"])
    with pytest.raises(ValueError, match=r"result of a holds text that is not UTF-8: .*caf\\udce9\.png"):
        journal.append({"id": "a", "name": "caf\udce9.png"})
    with pytest.raises(ValueError, match="result of a holds a number that is not finite"):
        journal.append({"id": "a", "score": float("nan")})
    assert journal.done == 0


def test_large_pictures_come_first_within_a_window_and_groups_share_no_batch():
    sizes = [index % 13 for index in range(1100)]
    groups = ["seg" if index % 3 else "depth" for index in range(1100)]
    order = order_by_size(sizes, groups)
    assert sorted(order) == list(range(1100))
    assert [place // 512 for place in order] == sorted(place // 512 for place in range(1100)), "windows in their order"
    batches = cut(order, groups, 8)
    assert [place for batch in batches for place in batch] == order
    assert all(len({groups[place] for place in batch}) == 1 and len(batch) <= 8 for batch in batches)
    padding = sum(max(sizes[place] for place in batch) * len(batch) - sum(sizes[p] for p in batch) for batch in batches)
    assert padding < 0.1 * sum(sizes)
    assert len(batches) < 1100 / 8 + 6
    assert order_by_size([1] * 30, ["a"] * 30) == list(range(30))


def test_the_order_is_kept_for_the_same_items_only(tmp_path):
    path = tmp_path / "order.json"
    assert read_order(path, "a") == (None, [])
    write_order(path, "a", [2, 0, 1], [7, None, 9])
    assert read_order(path, "a") == ([2, 0, 1], [7, None, 9]) and read_order(path, "b") == (None, [])
    for broken in ("", "[]", json.dumps({"items": "a"})):
        path.write_text(broken)
        assert read_order(path, "a") == (None, [])


def test_options_of_several_workers_need_ray():
    assert isinstance(open_engine("local", workers=1), LocalEngine)
    for options in ({"workers": 2}, {"address": "auto"}):
        with pytest.raises(ValueError, match="--engine ray"):
            open_engine("local", **options)
