"""Streams: a batch is a function of (seed, step), for any start and any processes."""

import gc
import itertools
import multiprocessing
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sdegen.data import (
    AbstractStream,
    Arrays,
    Files,
    ImageFolder,
    array_records,
    batch_indices,
    one_hot,
    prefetch,
)

N = 23


def numbers():
    """Samples that say which they are: x[i] holds i, and so does its cond."""
    x = np.arange(N, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
    return x, {"label": np.arange(N), "hot": one_hot(np.arange(N), N)}


class Listed:
    """A random-access source, as Grain wants it."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        x, cond = numbers()
        return {"x": x[index], "label": index}


def decode(item):
    label = int(item["label"])
    return item["x"], {"label": label, "hot": one_hot(label, N)}


def stream(kind, **options):
    if kind == "Arrays":
        return Arrays(*numbers())
    pytest.importorskip("grain")
    return Files(Listed(), decode, **options)


def take(source, seed, start, count, batch_size, rows=slice(None)):
    """(count, rows) numbers of samples; checks that x and cond belong together."""
    batches = source.batches(seed, start, batch_size=batch_size, rows=rows)
    out = []
    for x, cond in itertools.islice(batches, count):
        label = np.asarray(cond["label"])
        assert x.shape[1:] == source.shape == (2, 3) and x.dtype == np.float32
        np.testing.assert_array_equal(x, label[:, None, None] * np.ones((1, 2, 3)))
        np.testing.assert_array_equal(cond["hot"], np.eye(N)[label])
        out.append(label)
    return np.stack(out)


KINDS = ["Arrays", "Files"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(kind, batch_size):
    source = stream(kind, threads=2)
    assert len(source) == N
    steps = -(-4 * N // batch_size)
    seen = take(source, 3, 0, steps, batch_size).ravel()[: 4 * N].reshape(4, N)
    for epoch in seen:
        assert sorted(epoch) == list(range(N))
    # Of 23 numbers in two random orders one or so agrees; seven, in one of 10^4.
    for a, b in itertools.combinations([np.arange(N), *seen], 2):
        assert (a == b).sum() < 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_at_any_step(kind):
    source = stream(kind, threads=3)
    whole = take(source, 1, 0, 16, 5)
    for start in (1, 4, 5, 11):  # step 4 crosses into the second epoch
        np.testing.assert_array_equal(take(source, 1, start, 5, 5), whole[start:][:5])
    late = take(source, 1, 10**9, 2, 5)
    np.testing.assert_array_equal(take(source, 1, 10**9 + 1, 1, 5), late[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_the_processes_are_the_global_batch(kind, processes):
    source = stream(kind, threads=2)
    whole = take(source, 0, 2, 7, 40)
    share = 40 // processes
    shares = [
        take(source, 0, 2, 7, 40, slice(p * share, (p + 1) * share))
        for p in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_have_orders_of_their_own(kind):
    source = stream(kind, threads=2)
    orders = np.concatenate([take(source, s, 0, 3, N) for s in (0, 1, 2**40)])
    # Neighbouring seeds share no epoch, not even a later one.
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 7


def test_arrays_come_in_the_order_of_batch_indices():
    want = batch_indices(4, 6, 9, n=N, batch_size=10)
    np.testing.assert_array_equal(take(stream("Arrays"), 4, 6, 9, 10), want)


@pytest.mark.parametrize("threads", [0, 1, 16])
def test_threads_do_not_change_the_order(threads):
    want = take(stream("Files", threads=2), 0, 3, 6, 7)
    got = take(stream("Files", threads=threads), 0, 3, 6, 7)
    np.testing.assert_array_equal(got, want)


def test_worker_processes_do_not_change_the_order():
    want = take(stream("Files", threads=2), 0, 3, 6, 7, slice(2, 6))
    got = take(stream("Files", threads=2, workers=2), 0, 3, 6, 7, slice(2, 6))
    np.testing.assert_array_equal(got, want)
    assert until(lambda: not multiprocessing.active_children())


def test_memory_mapped_bytes_are_read_as_they_are(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8)
    np.save(tmp_path / "x.npy", x)
    source = Arrays(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert isinstance(source.x, np.memmap)
    got, cond = next(source.batches(0, 1, batch_size=6, rows=slice(1, 5)))
    (index,) = batch_indices(0, 1, 1, n=9, batch_size=6)
    np.testing.assert_array_equal(got, x[index[1:5]])
    assert got.dtype == np.uint8 and cond is None
    got[:] = 0  # a batch is a copy: what is done to it does not reach the data
    np.testing.assert_array_equal(source.x, x)


def test_a_folder_and_records_are_streamed(tmp_path):
    pytest.importorskip("grain")
    Image = pytest.importorskip("PIL.Image")
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "r"), "group_size:1")
    for number in range(6):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)
        writer.write(bytes([number] * 5))
    writer.close()
    folder = Files(ImageFolder(tmp_path / "set", 4), threads=2)
    assert folder.shape == (4, 4, 3)
    x, label = next(folder.batches(0, 0, batch_size=6, rows=slice(None)))
    assert sorted(x[:, 0, 0, 0]) == list(range(6)) and (x.std((1, 2, 3)) == 0).all()
    np.testing.assert_array_equal(label, x[:, 0, 0, 0] % 2)
    records = array_records(tmp_path / "r", lambda r: np.frombuffer(r, np.uint8))
    x, cond = next(Files(records).batches(0, 0, batch_size=6, rows=slice(None)))
    assert sorted(x[:, 0]) == list(range(6)) and cond is None


def test_a_stream_of_ones_own_needs_three_methods():
    class Squares(AbstractStream):
        shape = (1,)

        def __len__(self):
            return 5

        def batches(self, seed, start, *, batch_size, rows):
            for step in itertools.count(start):
                yield np.full((batch_size, 1), step**2, np.float32)[rows], None

    (x, _) = next(Squares().batches(0, 3, batch_size=4, rows=slice(1, 3)))
    np.testing.assert_array_equal(x, [[9.0], [9.0]])


# -- sentences -------------------------------------------------------------------------


def test_arrays_that_are_no_data_are_answered():
    for bad in (np.zeros(4), np.zeros((4, 2), int), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="Arrays takes"):
            Arrays(bad)
    with pytest.raises(ValueError, match=r"leading axis of 4, got the shape \(3,\)"):
        Arrays(np.zeros((4, 2)), {"label": np.zeros(3)})


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_a_batch_is_answered_at_the_call(kind):
    source = stream(kind)
    for start, size, rows in [
        (-1, 4, slice(None)),
        (0, 0, slice(None)),
        (0, 4, slice(4, 8)),
    ]:
        with pytest.raises(ValueError, match="start >= 0, batch_size >= 1"):
            source.batches(0, start, batch_size=size, rows=rows)


def test_files_that_cannot_be_read_are_answered(monkeypatch):
    pytest.importorskip("grain")
    with pytest.raises(ValueError, match="__len__ and __getitem__"):
        Files(iter([1]))
    with pytest.raises(ValueError, match="is empty"):
        Files([])
    with pytest.raises(ValueError, match="threads >= 0 and workers >= 0"):
        Files([1], threads=-1)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'sdegen\[data\]'"):
        Files([1])


def ask(source):
    return next(source.batches(0, 0, batch_size=4, rows=slice(None)))


@pytest.mark.parametrize(
    "bad", [lambda item: None, lambda item: {"x": item}, lambda item: [0.0]]
)
def test_a_decode_that_gives_no_sample_is_answered(bad):
    pytest.importorskip("grain")
    with pytest.raises(ValueError, match=r"x or \(x, cond\).*Give Files a decode"):
        ask(Files(range(9), bad, threads=2))


def test_samples_of_many_shapes_are_answered():
    pytest.importorskip("grain")
    with pytest.raises(ValueError, match=r"one shape, got \(0,\) and \(1,\)"):
        ask(Files(range(4), np.zeros, threads=2))


def test_an_error_of_a_source_reaches_the_reader():
    pytest.importorskip("grain")

    def broken(item):
        raise OSError(f"disk {item} is gone")

    with pytest.raises(OSError, match="disk [0-8] is gone"):
        ask(Files(range(9), broken, threads=2))


# -- prefetch --------------------------------------------------------------------------


def background():
    return [t for t in threading.enumerate() if t.name == "sdegen-prefetch"]


def until(condition, seconds=5.0):
    """Wait for the other thread, and say whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_prefetch_gives_every_batch_in_order_put_by_another_thread():
    here, threads = threading.get_ident(), set()

    def put(batch):
        threads.add(threading.get_ident())
        return jax.device_put(batch)

    got = [int(x) for x in prefetch((np.array(i) for i in range(20)), put)]
    assert got == list(range(20)) and here not in threads and len(threads) == 1
    assert until(lambda: not background())


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_ahead_by_its_depth_and_no_more(depth):
    placed = []

    def put(batch):
        placed.append(batch)
        return batch

    with prefetch(itertools.count(), put, depth) as batches:
        assert until(lambda: len(placed) == depth)
        for used in range(4):
            assert next(batches) == used
            assert until(lambda: len(placed) == used + 1 + depth)  # noqa: B023
            time.sleep(0.01)
            assert len(placed) == used + 1 + depth
    assert not background()


@pytest.mark.parametrize("where", ["iterator", "put"])
def test_an_error_comes_where_its_batch_would_have(where):
    def read():
        yield from range(2)
        if where == "iterator":
            raise OSError("the disk is gone")
        yield 2

    def put(batch):
        if batch == 2:
            raise OSError("the disk is gone")
        return batch

    batches = prefetch(read(), put, depth=4)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not background()
    with pytest.raises(StopIteration):
        next(batches)


def endless(closed):
    try:
        yield from itertools.count()
    finally:
        closed.append(True)


def test_no_thread_is_left_when_the_reader_stops():
    closed = []
    for i in prefetch(endless(closed), abs):
        if i == 3:
            break
    gc.collect()
    assert not background() and closed == [True]
    prefetch(endless(closed), abs)  # not even read from
    gc.collect()
    # A generator that never began has nothing to close.
    assert not background() and len(closed) in (1, 2)


def test_no_thread_is_left_when_the_reader_raises():
    closed = []
    with pytest.raises(RuntimeError, match="the step failed"):
        with prefetch(endless(closed), abs) as batches:
            next(batches)
            raise RuntimeError("the step failed")
    assert not background() and closed == [True]
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_over_files_ends_their_threads_too():
    source = stream("Files", threads=2)
    want = take(source, 0, 0, 5, 4)
    batches = source.batches(0, 0, batch_size=4, rows=slice(None))
    with prefetch(batches, lambda b: b[1]["label"]) as labels:
        np.testing.assert_array_equal(list(itertools.islice(labels, 5)), want)

    def reading():
        return [t for t in threading.enumerate() if t.name.startswith("grain")]

    assert until(lambda: not background() and not reading())


def test_a_depth_of_nothing_is_answered():
    with pytest.raises(ValueError, match="depth >= 1"):
        prefetch(iter([]), abs, 0)
