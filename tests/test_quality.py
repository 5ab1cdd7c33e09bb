"""bench.py quality at a tiny size."""
import sys

import numpy as np
import pytest
import torch

import bench
import quality
from common import InputError
from leviathan import Config, LanguageModel
from shards import Windows

TINY = ("--device cpu --seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --tokens-per-step 256 --steps 4 "
        "--eval-every 2 --eval-tokens 512")


def test_a_campaign_is_gone_on_with(tiny_data, tmp_path, monkeypatch, capsys):
    """Two experiments that share a variant: it runs once; a second call runs nothing; a new seed runs alone."""
    monkeypatch.setattr(quality, "EXPERIMENTS", {"one": {"dense": "--model dense-untied", "v1": ""}, "two": {"ours": ""}})
    flags = ["--experiments", "one", "two", "--train", f"{TINY} --data {tiny_data}", "--out", str(tmp_path)]
    ran = []
    monkeypatch.setattr(quality.subprocess, "run", lambda *a, run=quality.subprocess.run, **k: ran.append(a[0]) or run(*a, **k))
    for seeds, expected in ((1, 2), (1, 2), (2, 4)):
        monkeypatch.setattr(sys, "argv", ["bench.py", "quality", *flags, "--seeds", str(seeds)])
        bench.main()
        assert len(ran) == expected and len(list((tmp_path / "runs").glob("*.jsonl"))) == expected
    tables = (tmp_path / "tables.md").read_text()
    printed = capsys.readouterr().out
    assert all(line in printed for line in tables.splitlines())
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| v1 ")]
    assert len(rows) == 3 and "±" in rows[0][2] and rows[0][4] == "2 |"         # losses; by frequency of input and of target
    for figure in ("one.png", "one-frequency.png", "two.png"):
        assert (tmp_path / figure).stat().st_size > 10_000

    monkeypatch.setattr(sys, "argv", ["bench.py", "quality", *flags, "--seeds", "3", "--minutes", "0"])
    bench.main()
    assert len(ran) == 4 and "2 runs had no time: the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == tables

    monkeypatch.setattr(sys, "argv", ["bench.py", "quality", *flags, "--train", f"{TINY} --data {tiny_data} --clip 2"])
    with pytest.raises(InputError, match="was run with --train .*: name another --out"):
        bench.main()


def test_loss_by_frequency(tiny_data):
    """Against a loop: the bucket of a token is 0 if the run has not seen it, else its decile among the tokens that it has."""
    model = LanguageModel(Config(vocab_size=300, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=1))
    training = dict(data=str(tiny_data), seed=3, steps=2, tokens_per_step=256, eval_tokens=10**6)
    rows = quality.by_frequency(model, training)
    stream, val = (Windows(tiny_data, split, 32) for split in ("train", "val"))
    seen = np.bincount(stream.shuffled(np.arange(16), 3)[:, :-1].ravel(), minlength=300)
    known = sorted(np.flatnonzero(seen), key=lambda token: (seen[token], token))
    bucket = {token: 1 + place * 10 // len(known) for place, token in enumerate(known)}
    losses = {("target", d): [] for d in range(11)} | {("input", d): [] for d in range(11)}
    for i in range(len(val)):
        window = torch.from_numpy(val[i])
        logs = model(window[None, :-1])[0].log_softmax(-1)
        for place in range(32):
            loss = -logs[place, window[place + 1]].item()
            losses["target", bucket.get(int(window[place + 1]), 0)].append(loss)
            losses["input", bucket.get(int(window[place]), 0)].append(loss)
    for row in rows:
        expected = losses[row["role"], row["decile"]]
        assert row["tokens"] == len(expected)
        assert row["loss"] == (pytest.approx(np.mean(expected), rel=1e-5) if expected else None)


def test_a_failed_run_is_one_clear_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "quality", "--experiments", "iso-body", "--seeds", "1", "--out", str(tmp_path),
                                      "--train", f"{TINY} --data {tiny_data} --tokens-per-step 100"])
    with pytest.raises(InputError, match="the run .* of seed 0 failed: train.py: --tokens-per-step 100"):
        bench.main()
