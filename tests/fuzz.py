"""Feed every reader of files with damaged and hostile ones: an InputError or a sound result, never a crash, a hang or much memory.

    python -m tests.fuzz --examples 100000

Files are cut, overwritten, doubled and filled byte by byte; in JSON and in what torch.save wrote, values are exchanged for
hostile ones too. What carries a checksum must not be accepted when it has changed.
"""
import argparse
import faulthandler
import io
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import addresses
import train
from common import InputError, read_json
from documents import documents
from eval import last_words
from leviathan import Config, LanguageModel
from prepare_pile import Unfinished, prepare
from shards import Windows, read_counts, read_index, read_meta, verify
from tokenizer import encode, token_bytes, tokenizer_from_json, train_tokenizer

SLOWEST = 20                    # seconds for one input: more is a hang
MEMORY = 1_000_000_000          # bytes that all inputs together may add
REQUEST = dict(sources=["a"], validation=[0, 20], tokenizer=None)
HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -0.0]),
    st.floats(), st.text(max_size=9), st.binary(max_size=9).map(lambda b: b.decode("latin-1")), st.just([]), st.just({}),
    st.just([[[[]]]]), st.just("../../etc/passwd"), st.just("\ud800"), st.lists(st.integers(), max_size=3))


def make(folder: Path):
    """One valid file of each kind. -> the folder"""
    source = Path(addresses.__file__).read_text(encoding="utf-8")
    lines = [dict(text=part, meta=dict(pile_set_name="ABC"[i % 3])) for i, part in enumerate(source.split("\n\n"))]
    halves = ["".join(json.dumps(line) + "\n" for line in half).encode() for half in (lines[:9], lines[9:])]
    (folder / "text.jsonl").write_bytes(b"".join(halves))
    (folder / "text.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))          # of two frames
    encoding = train_tokenizer(iter([source]), 300, "small")
    prepare([folder / "text.jsonl"], folder / "data", encoding, holdout=3)
    model = LanguageModel(Config(vocab_size=300, seq_len=8, d_model=8, n_layers=1, n_heads=2, d_seed=4, mode_width=1, base=9))
    addresses.learn(folder / "data", model.config)
    Unfinished(folder / "unfinished", REQUEST, lambda: encoding)
    sys.argv = ["train.py", "--data", str(folder / "data"), "--out", str(folder / "run"), *(
        "--device cpu --seq-len 8 --d-model 8 --n-layers 1 --n-heads 2 --d-seed 4 --mode-width 1 --base 9 --tokens-per-step 64 "
        "--steps 2 --keep 1").split()]
    train.main()
    return folder


def readers(folder: Path) -> dict:
    """{name: (the file that is changed, what reads it)}

    What a reader returns, if it is not None, must be as it was before where bytes were changed: there is a checksum.
    """
    data, run = folder / "data", folder / "run/step-00000002"
    tensors = lambda found: {name: x.numpy().tobytes() for name, x in found.items()}            # noqa: E731

    def tokenizer():
        encoding = tokenizer_from_json(read_json(run / "tokenizer.json"))
        encode(encoding, "def f(x):\n    return 'né' * 10  # 北京\n" + " " * 50)
        token_bytes(encoding)

    def meta():
        tokenizer_from_json(read_meta(data)["tokenizer"])
        for split in ("train", "val"):
            windows = Windows(data, split, 8)
            windows[0], windows[len(windows) - 1]

    def shard():
        windows = Windows(data, "train", 8)
        for i in range(len(windows)):
            windows[i]

    def index():
        n = read_meta(data)["train"]["tokens"]
        read_index(data / "train-00000.idx", n, 4)

    def verified(path):
        verify(data)
        return path.read_bytes()

    learned = Config(vocab_size=300, n_coords=3, base=9, d_seed=4)
    return {
        "config.json of a model": (run / "config.json", lambda: LanguageModel.from_checkpoint(run) and None),
        "config.json of a run": (run / "config.json", lambda: train.Checkpoint(run) and None),
        "model.pt": (run / "model.pt", lambda: tensors(LanguageModel.from_checkpoint(run).state_dict())),
        "optimizer.pt": (run / "optimizer.pt", lambda: {i: tensors(own) for i, own in train.Checkpoint(run).moments.items()}),
        "tokenizer.json": (run / "tokenizer.json", tokenizer),
        "meta.json": (data / "meta.json", meta),
        "a shard": (data / "train-00000.bin", shard),
        "a shard, verified": (data / "train-00000.bin", lambda: verified(data / "train-00000.bin")),
        "an index": (data / "train-00000.idx", index),
        "an index, verified": (data / "val-00000.idx", lambda: verified(data / "val-00000.idx")),
        "meta.json, verified": (data / "meta.json", lambda: verify(data) and None),
        "counts.npy": (data / "counts.npy", lambda: len(read_counts(data, 300)) < 0 or None),
        "counts.npy, verified": (data / "counts.npy", lambda: verify(data) and np.load(data / "counts.npy").tolist()),
        "addresses": (data / "addresses-3x9x4.npz", lambda: addresses.learned(data, learned) and None),
        "log.jsonl": (folder / "run/log.jsonl", lambda: train.read_log(folder / "run/log.jsonl") and None),
        "LAMBADA": (folder / "text.jsonl", lambda: [None for _ in last_words(folder / "text.jsonl")] and None),
        "JSON lines": (folder / "text.jsonl", lambda: [None for _ in documents(folder / "text.jsonl")] and None),
        "zstd": (folder / "text.jsonl.zst", lambda: [None for _ in documents(folder / "text.jsonl.zst")] and None),
        "progress.npz": (folder / "unfinished/progress.npz",
                         lambda: Unfinished(folder / "unfinished", REQUEST, None) and None),
    }


def changed_bytes(draw, content: bytes) -> bytes:
    """A few edits: overwrite, insert, remove, double, cut, or fill with zeros."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, max(0, len(content) - 1))), draw(st.sampled_from([1, 2, 4, 8, 100, 5_000]))
        how = draw(st.sampled_from(["set", "insert", "remove", "double", "cut", "zero"]))
        if how == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            content[at:at + len(new)] = new
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif how == "remove":
            del content[at:at + length]
        elif how == "double":
            content[at:at] = content[at:at + length]
        elif how == "cut":
            del content[at:]
        else:
            content[at:at + length] = bytes(len(content[at:at + length]))
    return bytes(content)


def changed_tree(draw, tree, hostile):
    """One value somewhere in dicts and lists exchanged, removed or added."""
    place = tree
    for _ in range(9):
        keys = sorted(place, key=str) if isinstance(place, dict) else range(min(len(place), 50))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 4)):
            place = place[key]
            continue
        if isinstance(place, dict) and not draw(st.integers(0, 5)):
            del place[key]
        else:
            place[key] = draw(hostile)
        break
    return tree


TENSORS = st.one_of(HOSTILE, st.sampled_from([
    torch.zeros(1), torch.zeros(300, 8), torch.ones(1).expand(300, 8), torch.tensor(torch.nan), torch.zeros(3, dtype=torch.int8),
    torch.ones(2).to_sparse(), torch.zeros(0)]))


@st.composite
def changes(draw, path: Path, content: bytes) -> tuple[bytes, bool]:
    """The content of a file, changed, and whether it was in its bytes."""
    if draw(st.booleans()) or path.suffix not in (".json", ".jsonl", ".pt"):
        return changed_bytes(draw, content), True
    if path.suffix == ".pt":
        found, file = torch.load(io.BytesIO(content), weights_only=True), io.BytesIO()
        torch.save(changed_tree(draw, found, TENSORS), file)
        return file.getvalue(), False
    lines = content.split(b"\n") if path.suffix == ".jsonl" else [content]
    i = draw(st.integers(0, len(lines) - 1))
    lines[i] = json.dumps(changed_tree(draw, json.loads(lines[i] or b"{}"), HOSTILE)).encode()
    return b"\n".join(lines), False


def fuzz(path: Path, read, examples: int) -> tuple[int, int]:
    """Raises what a reader should not have raised, or AssertionError where it should have. -> inputs, those accepted"""
    content, expected, tally = path.read_bytes(), read(), [0, 0]

    @settings(max_examples=examples, deadline=1_000 * SLOWEST, database=None, derandomize=True,
              phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(changes(path, content))
    def one(changed):
        faulthandler.dump_traceback_later(3 * SLOWEST, exit=True)       # a hang says where
        path.write_bytes(changed[0])
        tally[0] += 1
        try:
            result = read()
        except InputError as error:
            assert str(error)
            return
        tally[1] += 1
        assert expected is None or result == expected or not changed[1], f"{path.name} was changed and is accepted"

    try:
        one()
    finally:
        faulthandler.cancel_dump_traceback_later()
        path.write_bytes(content)
    return tuple(tally)


def resident() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000, help="in all, in equal parts [%(default)s]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, before = readers(make(Path(folder))), resident()
        for name, (path, read) in found.items():
            begun = time.monotonic()
            inputs, accepted = fuzz(path, read, -(-args.examples // len(found)))
            print(f"{name}: {inputs:,} inputs, {accepted:,} accepted, {time.monotonic() - begun:.0f} s, memory at most "
                  f"{(resident() - before) / 1e6:,.0f} MB more", flush=True)
            assert resident() - before < MEMORY


if __name__ == "__main__":
    main()
