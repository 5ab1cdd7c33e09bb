"""Every reader of files against damaged and foreign ones: an error that names the file, or a sound result.

    FUZZ=6000 python -m pytest tests/test_fuzz.py -s        # inputs for each reader; 30 without it

A ValueError or OSError, that is: never a crash, a hang or much memory. Bytes are overwritten, doubled, zeroed
and cut out; in JSON and in what torch.save wrote, values are exchanged for hostile ones too.
"""
import faulthandler
import gzip
import io
import json
import os
import resource
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import prepare_pile
import sample
import train
from conftest import zstd
from leviathan import Config, LanguageModel, load, load_tensors

MEMORY = 1_000_000              # kB that all inputs together may add
SLOWEST = 20                    # seconds for one input: more is a hang
SHAPE = Config(vocab_size=300, seq_len=8, d_model=8, n_layers=1, d_seed=4, n_modes=2, mode_width=1, base=9)
HOSTILE = st.one_of(st.integers(), st.floats(), st.text(max_size=9), st.sampled_from([
    0, -1, 10**5, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, None, True, [], {}, [[[[]]]], [1, 2], "8", "gpt2",
    "lev", "dense", "../../etc/passwd", "\ud800"]))
TENSORS = st.one_of(HOSTILE, st.sampled_from([
    torch.zeros(1), torch.zeros(300, 8), torch.ones(1).expand(300, 8), torch.ones(1).expand(3, 2**40, 4),
    torch.full((300, 8), torch.nan), torch.zeros(300, 8, dtype=torch.int8), torch.zeros(300, 8).double(),
    torch.zeros(300, 8, device="meta"), torch.zeros(0)]))


def saved(found) -> bytes:
    torch.save(found, file := io.BytesIO())
    return file.getvalue()


def make(folder: Path) -> dict:
    """One valid file of each kind. -> {name: (the file, what reads it, whether there is a checksum)}"""
    text = Path(prepare_pile.__file__).read_text(encoding="utf-8")
    lines = [json.dumps(dict(text=part, meta=dict(pile_set_name="ABC"[i % 3]))) + "\n"
             for i, part in enumerate(text.split("\n\n"))]
    halves = ["".join(half).encode() for half in (lines[:9], lines[9:])]        # two frames, two members
    (folder / "text.jsonl").write_bytes(b"".join(halves))
    (folder / "text.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (folder / "text.jsonl.zst").write_bytes(b"".join(map(zstd.compress, halves)))
    data, out, run, start = folder / "data", folder / "out", folder / "out/step-00000002", folder / "start.pt"
    meta = prepare_pile.prepare([folder / "text.jsonl"], data, vocab_size=300, holdout=3)
    model, about = LanguageModel(SHAPE), dict(config=asdict(SHAPE), training=dict(data=str(data)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    out.mkdir()
    train.save(out, 2, model, optimizer, about, meta["tokenizer"], keep=1)
    torch.save({"embed_tokens.codebooks": model.embed_tokens.codebooks}, start)

    def windows():
        for found in (prepare_pile.Windows(data, split, 8) for split in prepare_pile.SPLITS):
            for i in range(len(found)):
                found[i]

    def weights():
        model = load(run)
        next(sample.generate(model, torch.tensor([1, 2]), 1))
        return saved(model.state_dict())

    def tokenizer():
        encoding = sample.read_checkpoint(run)[1]
        prepare_pile.encode(encoding, "def f(x):\n    return 'né' * 10  # 北京\n" + " " * 50)
        prepare_pile.token_bytes(encoding)

    shard, counts, index = (data / name for name in ("train-00000.bin", "counts.npy", "train-00000.idx"))
    moments, known, begun = run / "optimizer.pt", data / "meta.json", train.Training(start=str(start))
    readers = {
        "meta.json": (known, windows, False), "shard": (shard, windows, False),
        "meta.json, verified": (known, lambda: prepare_pile.verify(data), False),
        "counts": (counts, lambda: prepare_pile.read_counts(data), False),
        "index": (index, lambda: prepare_pile.read_index(data, meta["train"]["shards"][0]), False),
        "config.json": (run / "config.json", weights, False),
        "tokenizer.json": (run / "tokenizer.json", tokenizer, False),
        "model.pt": (run / "model.pt", weights, True),
        "optimizer.pt": (moments, lambda: saved(load_tensors(moments)), True),
        "start.pt": (start, lambda: saved(train.build(SHAPE, begun).state_dict()), True)}
    for path in folder.glob("text.*"):
        readers[path.name] = path, lambda path=path: [*prepare_pile.documents(path)], False
    for path in (shard, counts, index):
        verified = lambda path=path: (prepare_pile.verify(data), path.read_bytes())     # noqa: E731
        readers[f"{path.name}, verified"] = path, verified, True
    return readers


@st.composite
def changes(draw, path: Path, content: bytes) -> tuple[bytes, bool]:
    """The content of a file, changed in a few places of its bytes (True) or in one of its values."""
    if path.suffix not in (".json", ".jsonl", ".pt") or draw(st.booleans()):
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(content)))
            end = draw(st.sampled_from([at, at + 1, at + 8, at + 5_000, len(content)]))
            part = content[at:end]
            new = draw(st.one_of(st.binary(max_size=8), st.sampled_from([part + part, bytes(len(part))])))
            content = content[:at] + new + content[end:]
        return content, True

    def places(tree):
        for key in [*tree][:50] if isinstance(tree, dict) else range(min(50, len(tree))):
            yield tree, key
            yield from places(tree[key]) if isinstance(tree[key], (dict, list)) else ()

    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    i, tensors = draw(st.integers(0, len(lines) - 1)), path.suffix == ".pt"
    tree = torch.load(io.BytesIO(content)) if tensors else json.loads(lines[i])
    place, key = draw(st.sampled_from([*places(tree)]))
    if draw(st.integers(0, 5)):
        place[key] = draw(TENSORS if tensors else HOSTILE)
    else:
        del place[key]
    if tensors:
        return saved(tree), False
    lines[i] = json.dumps(tree).encode()
    return b"\n".join(lines), False


def fuzz(path: Path, read, exact: bool, examples: int) -> tuple[int, int]:
    """Raises whatever a reader should not have done. -> inputs, those accepted"""
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
        except (ValueError, OSError) as error:
            assert (path.name in str(error) or path.parent.name in str(error)) and "\n" not in str(error)
            return
        tally[1] += 1
        assert not exact or not changed[1] or result == expected, "a changed file is accepted"

    try:
        one()
    finally:
        faulthandler.cancel_dump_traceback_later()
        path.write_bytes(content)
    return tuple(tally)


def test_damaged_and_foreign_files(tmp_path):
    found = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(found) == 16
    for name, how in found.items():
        inputs, accepted = fuzz(*how, examples=int(os.environ.get("FUZZ", 30)))
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{name}: {inputs:,} inputs, {accepted:,} accepted, {more:,} kB more", flush=True)
        assert inputs > accepted and more < MEMORY
