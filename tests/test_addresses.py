"""lab/addresses.py: each step against an obvious version of itself; the script; what train.py makes of it."""
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lab import addresses
from leviathan import Config, digits, load
from prepare_pile import Windows, read_counts
from train import Training, build

ROOT = Path(__file__).parent.parent
TINY = ("--seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --mode-width 1 --tokens-per-step 256 --steps 2 "
        "--eval-tokens 512 --device cpu").split()


def test_cooccurrence_by_a_loop(tiny_data, monkeypatch):
    """Over all pairs, of the first 3,000 tokens, which stand in one chunk."""
    monkeypatch.setattr(addresses, "CONTEXTS", 50)
    windows, counts = Windows(tiny_data, "train", 1), read_counts(tiny_data)
    found = addresses.cooccurrence(windows, torch.from_numpy(counts), 3_000).to_dense()
    tokens, contexts = windows.tokens(0, 0, 3_000).tolist(), np.argsort(-counts, kind="stable")[:50].tolist()
    expected = torch.zeros(300, 200)
    for place, token in enumerate(tokens):
        for j, offset in enumerate((-2, -1, 1, 2)):
            if 0 <= place + offset < len(tokens) and tokens[place + offset] in contexts:
                expected[token, 50 * j + contexts.index(tokens[place + offset])] += 1
    assert torch.equal(found, expected)
    monkeypatch.setattr(addresses, "CHUNK", 1_000)      # then only pairs across the two cuts are not counted
    found = addresses.cooccurrence(windows, torch.from_numpy(counts), 3_000).to_dense()
    assert (found <= expected).all() and 0 < (expected - found).sum() <= 12


@pytest.mark.parametrize("disable, seen", [("", True), ("1", False)])
def test_the_lab_obeys_tqdm_disable(tiny_data, monkeypatch, disable, seen):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: True
    monkeypatch.setenv("TQDM_DISABLE", disable)
    addresses.cooccurrence(Windows(tiny_data, "train", 1), torch.ones(300), 10**6)
    assert ("counting neighbours" in sys.stderr.getvalue()) == seen


def test_ppmi_by_its_formula():
    counts = torch.tensor([[4.0, 0, 1], [1, 2, 0]])
    p_token, p_context = counts.sum(1, keepdim=True) / counts.sum(), counts.sum(0) ** 0.75
    expected = (counts / counts.sum() / (p_token * p_context / p_context.sum())).log().clamp(min=0)
    torch.testing.assert_close(addresses.ppmi(counts.to_sparse().coalesce()).to_dense(), expected)


def test_assignment_is_stable():
    """No address holds too many, and no token was refused for one of lower priority."""
    rng = torch.Generator().manual_seed(0)
    V, b, capacity = 230, 4, 15
    preferences = torch.stack([torch.randperm(b, generator=rng) for _ in range(V)])
    others, priority = torch.arange(V) % 4, torch.randperm(V, generator=rng)
    found = addresses.assign(preferences, others, 4, capacity, priority)
    assert torch.equal(found % 4, others) and found.unique(return_counts=True)[1].max() <= capacity
    for token in range(V):
        for better in preferences[token][:preferences[token].tolist().index(found[token] // 4)]:
            holders = found == others[token] + 4 * better
            assert holders.sum() == capacity and priority[holders].max() < priority[token]


@pytest.mark.parametrize("V, base, n_coords", [(200, 6, 3), (216, 6, 3), (64, 64, 1), (90, 10, 2)])
def test_quantisation(V, base, n_coords):
    """One token to an address; sums of codebook rows come nearer to the vectors than at other addresses."""
    rng = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(base, 16, generator=rng)
    vectors = centres[torch.arange(V) % base] + 0.1 * torch.randn(V, 16, generator=rng)
    weight = torch.arange(V, 0, -1).sqrt()

    def error(chosen):
        codebooks = addresses.centroids(vectors, weight, chosen, base, n_coords)
        return (weight @ (vectors - addresses.summed(chosen, codebooks)).square()).sum().item()

    chosen = addresses.quantise(vectors, weight, base, n_coords)
    assert len(chosen.unique()) == V and 0 <= chosen.min() and chosen.max() < base**n_coords
    if n_coords == 1:
        assert error(chosen) < 1e-6
    else:
        assert error(chosen) < 0.5 * error(torch.randperm(base**n_coords, generator=rng)[:V])
        assert error(chosen) <= error(addresses.quantise(vectors, weight, base, n_coords, sweeps=0))


def test_centroids_are_the_least_squares_solution():
    """Against torch's own solver: Σ_j C_j[i_j] is linear in the codebook rows."""
    rng = torch.Generator().manual_seed(0)
    V, base, n_coords = 60, 4, 3
    vectors, weight = torch.randn(V, 5, generator=rng), 1 + torch.rand(V, generator=rng)
    chosen = torch.randperm(base**n_coords, generator=rng)[:V]
    found = addresses.summed(chosen, addresses.centroids(vectors, weight, chosen, base, n_coords, sweeps=200))
    rows = digits(chosen, base, n_coords) + base * torch.arange(n_coords)
    design, root = torch.zeros(V, base * n_coords).scatter_(1, rows, 1), weight.sqrt()[:, None]
    solution = torch.linalg.lstsq(root * design, root * vectors, driver="gelsd").solution
    torch.testing.assert_close(found, design @ solution, rtol=1e-3, atol=1e-3)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lab.addresses", *map(str, args)])
    addresses.main()


def test_what_a_start_holds(tiny_data):
    """The base of each kind; what scale changes; rare tokens behind frequent ones; a table as the vectors."""
    learned, again = (addresses.start(tiny_data, d_seed=16) for _ in range(2))
    assert all(torch.equal(learned[name], again[name]) for name in learned)
    codebooks = learned["embed_tokens.codebooks"]
    assert codebooks.shape == (3, 256, 16) and len(learned["embed_tokens.addresses"].unique()) == 300
    assert codebooks[0][codebooks[0].any(1)].square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    frequent = addresses.start(tiny_data, addresses="frequency", noise=True, d_seed=16)
    assert frequent["embed_tokens.codebooks"].shape == (3, 7, 16)
    assert frequent["embed_tokens.codebooks"].std().item() == pytest.approx(1, rel=0.1)
    for how in dict(noise=True), dict(model="lev"):
        with pytest.raises(ValueError, match="is of a table, or of leviathan's embeddings from vectors"):
            addresses.start(tiny_data, d_seed=16, scale=0.5, **how)
    for how, parts in (dict(), {"residual_proj.weight"}), (dict(model="dense-untied"), {"weight"}):
        own, larger = (addresses.start(tiny_data, d_seed=16, scale=scale, **how) for scale in (0.02, 0.5))
        changed = {name for name, x in own.items() if not torch.equal(x, larger[name])}
        assert changed == {f"embed_tokens.{part}" for part in parts}
        torch.testing.assert_close({name: own[name] * 25 for name in changed},
                                   {name: larger[name] for name in changed})
    assert (np.diff(read_counts(tiny_data)[frequent["embed_tokens.addresses"].argsort()]) <= 0).all()
    shuffled = addresses.start(tiny_data, addresses="shuffled", d_seed=16)["embed_tokens.addresses"]
    assert sorted(shuffled.tolist()) == list(range(300)) != shuffled.tolist()

    counts = torch.from_numpy(read_counts(tiny_data))
    vectors = addresses.token_vectors(addresses.ppmi(
        addresses.cooccurrence(Windows(tiny_data, "train", 1), counts, 10**8)), 16)
    table = addresses.start(tiny_data, "dense-untied", d_seed=16, d_model=32)["embed_tokens.weight"]
    seen = vectors.any(1)
    assert torch.equal(seen, counts > 0) and 100 < seen.sum() < 200
    torch.testing.assert_close(table[seen] @ table[seen].T / table[seen].square().sum(1).mean(),
                               vectors[seen] @ vectors[seen].T, rtol=1e-4, atol=1e-5)
    assert table[seen].std().item() == pytest.approx(0.5, rel=0.05) and table[~seen].any(1).all()


def test_from_data_to_a_trained_model(tiny_data, tmp_path, monkeypatch):
    """Both kinds of file, as train.py takes them; its models keep the addresses."""
    path = tmp_path / "new/learned.pt"
    run(monkeypatch, tiny_data, "--d-seed", 16, "--d-model", 32, "--out", path)
    run(monkeypatch, tiny_data, "--for", "dense-untied", "--d-model", 32, "--out", tmp_path / "new/table.pt")
    config = Config(model="dense-untied", vocab_size=300, d_model=32, n_layers=1)
    training = Training(data=str(tiny_data), start=str(tmp_path / "new/table.pt"))
    table = build(config, training).embed_tokens.weight
    assert torch.equal(table, torch.load(tmp_path / "new/table.pt", weights_only=True)["embed_tokens.weight"])
    flags = ["--data", tiny_data, "--start", path, "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, trained = torch.load(path, weights_only=True), load(tmp_path / "run")
    assert trained.config.base == 256 and trained.config.d_seed == 16
    assert torch.equal(trained.embed_tokens.addresses, start["embed_tokens.addresses"])
    begun = build(replace(config, model="leviathan"), replace(training, start=str(path))).embed_tokens
    with torch.no_grad():                       # where two tokens' seeds are alike, so are their embeddings
        seeds, table = begun.seeds(torch.arange(300)), begun.table()
    known = seeds.any(1)                        # those that the text never has have no vector
    alike = [(x @ x.T).flatten() for x in (F.normalize(rows[known], dim=1) for rows in (seeds, table))]
    assert torch.equal(known, torch.from_numpy(read_counts(tiny_data) > 0))
    assert torch.corrcoef(torch.stack(alike))[0, 1] > 0.9
    assert 0.3 < table.std() < 1                # large, as d_seed / D is 1/2 here


def test_bad_input_is_one_clear_line(tiny_data, tmp_path, monkeypatch):
    (tmp_path / "there.pt").write_bytes(b"kept")
    monkeypatch.setattr(addresses, "cooccurrence", lambda *_: pytest.fail("work was done first"))
    for out, base, message in (("there.pt", 256, "there.pt exists: name another --out"),
                               ("x.pt", 6, "3 digits of base 6 do not suit 300 tokens"),
                               ("x.pt", 301, "3 digits of base 301 do not suit"),
                               ("x.pt", 0, "numbers must be positive"),
                               ("there.pt/x.pt", 256, "File exists: .*there.pt")):
        with pytest.raises((ValueError, OSError), match=message):
            run(monkeypatch, tiny_data, "--base", base, "--out", tmp_path / out)
    assert (tmp_path / "there.pt").read_bytes() == b"kept" and not (tmp_path / "x.pt").exists()
    command = [sys.executable, "-m", "lab.addresses", tmp_path, "--out", tmp_path / "x.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("lab.addresses: no prepared data in")
    assert len(done.stderr.splitlines()) == 1
