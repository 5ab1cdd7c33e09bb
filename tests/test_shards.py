"""Reading shards: every window once in every epoch, in an order that no layout and no interruption changes."""
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import InputError
from shards import HEADER_BYTES, MAGIC, SHARD_TOKENS, TOKEN, VERSION, Windows, batches, open_shard, permute


def write_folder(folder: Path, sizes: list[int], vocab_size: int = 2**20, sparse: bool = False) -> Path:
    """A training split of shards of these sizes, whose tokens are 0, 1, 2 ... throughout: each window begins with its place."""
    first = 0
    for i, size in enumerate(sizes):
        with open(folder / f"train-{i:05d}.bin", "wb") as file:
            file.write(np.array([MAGIC, VERSION, size] + [0] * 253, dtype="<i4").tobytes())
            if sparse:
                file.truncate(HEADER_BYTES + TOKEN.itemsize * size)
            else:
                file.write(np.arange(first, first + size, dtype=TOKEN).tobytes())
        first += size
    listed = [dict(file=f"train-{i:05d}.bin", tokens=size) for i, size in enumerate(sizes)]
    split = lambda shards: dict(shards=shards, tokens=sum(shard["tokens"] for shard in shards), documents=0)       # noqa: E731
    (folder / "meta.json").write_text(json.dumps(dict(
        tokenizer=dict(vocab_size=vocab_size, fingerprint=""), end_of_text=0, domains=[], unigram_val_loss=0.0, train=split(listed),
        val=split([]))))
    return folder


def test_two_shards_by_hand(tmp_path):
    """Shards of 8 and 5 tokens, windows of 2 + 1: three in the first, whose last token is dropped, and two in the second."""
    windows = Windows(write_folder(tmp_path, [8, 5]), "train", 2)
    assert [windows[i].tolist() for i in range(len(windows))] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [8, 9, 10], [10, 11, 12]]


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1_000])
def test_permute_is_a_permutation(n):
    first, second = (permute(np.arange(n), n, seed) for seed in (0, 1))
    assert sorted(first) == list(range(n)) == sorted(second)
    assert n < 64 or first.tolist() != second.tolist() != list(range(n))


def test_windows_cover_an_epoch_once(tiny_data):
    """Window i starts at token i * seq_len and overlaps the next by one token, the target of its last position."""
    windows = Windows(tiny_data, "train", 32)
    tokens = np.fromfile(tiny_data / "train-00000.bin", dtype="<u4", offset=1024)
    assert len(windows) == (len(tokens) - 1) // 32
    assert (windows[3] == tokens[96:129]).all()
    n = len(windows)
    epochs = windows.shuffled(np.arange(2 * n), seed=0)
    assert epochs.shape == (2 * n, 33)
    for epoch in (epochs[:n], epochs[n:]):
        assert sorted(map(tuple, epoch)) == sorted(tuple(windows[i]) for i in range(n))
    assert (epochs[:n] != epochs[n:]).any()
    assert (windows.shuffled(np.arange(n - 3, n + 3), seed=0) == epochs[n - 3:n + 3]).all()      # any position, at once


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_window_once_whatever_the_layout(data):
    """Two epochs of any shards, in steps of any size, on any number of ranks, stopped anywhere."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5), label="sizes of shards")
    seq_len = data.draw(st.integers(1, 9), label="seq_len")
    starts = [start + i * seq_len for start, size in zip(np.cumsum(sizes) - sizes, sizes) for i in range((size - 1) // seq_len)]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), sizes)
        if not starts:
            with pytest.raises(InputError, match="is shorter than one window"):
                Windows(folder, "train", seq_len)
            return
        windows = Windows(folder, "train", seq_len)
        assert len(windows) == len(starts)
        world, seed = data.draw(st.integers(1, 4), label="ranks"), data.draw(st.integers(0, 99), label="seed")
        per_step = data.draw(st.integers(world, 12), label="windows in a step")
        n_steps = -(-2 * len(starts) // per_step)
        stop = data.draw(st.integers(0, n_steps), label="stopped after")

        def read(first, last, world):
            """[[windows of a rank, as tuples] for each rank] for each step"""
            ranks = [batches(windows, per_step, range(first, last), seed, rank, world) for rank in range(world)]
            return [[list(map(tuple, batch.tolist())) for batch in step] for step in zip(*ranks)]

        alone, dealt = read(0, n_steps, 1), read(0, n_steps, world)
        for whole, parts in zip(alone, dealt, strict=True):
            assert sorted(whole[0]) == sorted(sum(parts, []))               # the same step on any number of ranks
        assert read(0, stop, world) + read(stop, n_steps, world) == dealt   # stopping changes nothing
        stream = sum((ranks[0] for ranks in alone), [])
        for epoch in (stream[:len(starts)], stream[len(starts):2 * len(starts)]):
            assert sorted(window[0] for window in epoch) == starts          # every window once
        assert all(window == tuple(range(window[0], window[0] + seq_len + 1)) for window in stream)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**32), st.data())
def test_permute_is_one_to_one_however_large(n, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    found = permute(index, n, seed)
    assert len(set(found.tolist())) == len(index) and found.min() >= 0 and found.max() < n
    assert (permute(index[::-1], n, seed)[::-1] == found).all()         # each by itself, so the same on every rank


def test_a_fault_while_reading_ahead_reaches_the_loop(tmp_path):
    windows = Windows(write_folder(tmp_path, [100], vocab_size=99), "train", 9)
    with pytest.raises(InputError, match="train-00000.bin holds the id 99, but the vocabulary has 99"):
        list(batches(windows, 4, range(10), seed=0))


def test_250_billion_tokens_open_at_once(tmp_path):
    """2,500 shards, as holes in files; more than a process may open by default. No token is read, so memory stays."""
    folder = write_folder(tmp_path, [SHARD_TOKENS] * 2_500, sparse=True)
    before, started = resident(), time.perf_counter()
    windows = Windows(folder, "train", 512)
    assert time.perf_counter() - started < 1 and resident() - before < 100e6
    assert len(windows) == 2_500 * ((SHARD_TOKENS - 1) // 512)
    last = windows.shuffled(np.arange(len(windows) - 2, len(windows) + 2), seed=0)      # any position, at once
    assert last.shape == (4, 513) and time.perf_counter() - started < 2


def resident() -> int:
    """Bytes of memory that this process holds; of files that it has mapped, what it has touched."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("no /proc here")


def test_no_waiting_for_data(tmp_path):
    """A loop that does nothing for as long as a million tokens a second would take: it waits less than 1 % of the time.

    Steps are the paper's 262,144 tokens.
    """
    windows = Windows(write_folder(tmp_path, [2**20] * 4, vocab_size=2**22), "train", 512)
    waited, started, stream = 0.0, time.perf_counter(), batches(windows, 512, range(14), seed=0)
    next(stream)
    for _ in range(12):
        time.sleep(512 * 512 / 1e6)
        asked = time.perf_counter()
        assert next(stream).shape == (512, 513)
        waited += time.perf_counter() - asked
    assert waited < 0.01 * (time.perf_counter() - started)


def test_a_header_and_a_size_that_disagree(tmp_path):
    path = write_folder(tmp_path, [10]) / "train-00000.bin"
    for tokens, message in ((9, "is truncated or of other data"), (2**40, "is truncated or of other data")):
        with pytest.raises(InputError, match=message):
            open_shard(path, tokens)
    assert torch.equal(torch.from_numpy(open_shard(path, 10).astype(np.int64)), torch.arange(10))
