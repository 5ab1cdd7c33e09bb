"""Learned addresses: each step against an obvious version of itself."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import addresses
from common import InputError
from leviathan import Config, digits
from shards import Windows, read_meta

HERE = Path(__file__).parent.parent


def test_cooccurrence_by_hand(tiny_data, monkeypatch):
    """Against a loop over all pairs; in chunks that cut the text in two."""
    tokens = Windows(tiny_data, "train", 1).shards[0][:3_000].astype(int).tolist()
    monkeypatch.setattr(addresses, "CONTEXTS", 50)
    total = sum(len(shard) for shard in Windows(tiny_data, "train", 1).shards)
    pairs, counts = addresses.cooccurrence(tiny_data, sample=3_000 * total // len(Windows(tiny_data, "train", 1).shards[0]))
    assert abs(len(tokens) - counts.sum()) <= 1
    tokens = tokens[:int(counts.sum())]
    assert counts.tolist() == np.bincount(tokens, minlength=300).tolist()
    contexts = np.argsort(-counts.numpy(), kind="stable")[:50].tolist()
    expected = torch.zeros(300, 200)
    for place, token in enumerate(tokens):
        for j, offset in enumerate((-2, -1, 1, 2)):
            if 0 <= place + offset < len(tokens) and tokens[place + offset] in contexts:
                expected[token, 50 * j + contexts.index(tokens[place + offset])] += 1
    assert torch.equal(pairs.to_dense(), expected)


def test_ppmi_by_its_formula():
    counts = torch.tensor([[4.0, 0, 1], [1, 2, 0]])
    p_context = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    expected = (counts / counts.sum() / (counts.sum(1, keepdim=True) / counts.sum() * p_context)).log().clamp(min=0)
    torch.testing.assert_close(addresses.ppmi(counts.to_sparse().coalesce()).to_dense(), expected)


def test_assignment_is_full_and_stable():
    """No digit takes more than it can hold, and no token is refused by a digit that holds a less frequent one."""
    rng = torch.Generator().manual_seed(0)
    V, b, capacity, cells = 230, 4, 15, 4
    preferences = torch.stack([torch.randperm(b, generator=rng) for _ in range(V)])
    cell = torch.arange(V) % cells
    priority = torch.randperm(V, generator=rng)
    digit = addresses.assign(preferences, cell, capacity, priority)
    for token in range(V):
        for better in preferences[token][:preferences[token].tolist().index(digit[token])]:
            holders = (cell == cell[token]) & (digit == better)
            assert holders.sum() == capacity and priority[holders].max() < priority[token]


@pytest.mark.parametrize("V, base, n_coords", [(200, 6, 3), (216, 6, 3), (64, 64, 1), (50, 64, 1), (90, 10, 2)])
def test_quantisation(V, base, n_coords):
    """One token to an address; each digit brings the sum nearer to the vectors, and all nearer than random addresses do."""
    rng = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(base, 16, generator=rng)
    cluster = torch.arange(V) % base
    vectors = centres[cluster] + 0.1 * torch.randn(V, 16, generator=rng)
    counts = torch.arange(V, 0, -1)
    chosen = addresses.quantise(vectors, counts, base, n_coords)
    assert chosen.shape == (V,) and len(chosen.unique()) == V and 0 <= chosen.min() and chosen.max() < base**n_coords

    def left(chosen):               # weighted squared error of the sums, with the best codebooks for these addresses
        codebooks = addresses.centroids(vectors, counts, chosen, base, n_coords)
        assert codebooks.shape == (n_coords, base, 16)
        return (addresses.weights(counts) @ (vectors - addresses.approximate(chosen, codebooks)).square()).sum().item()

    ours, random = left(chosen), left(torch.randperm(base**n_coords, generator=rng)[:V])
    if n_coords == 1:
        assert ours < 1e-6
    else:
        assert ours < random
        assert ours <= left(addresses.quantise(vectors, counts, base, n_coords, sweeps=0))


def test_centroids_are_the_least_squares_solution():
    """Against torch's own solver: Σ_j C_j[i_j] is linear in the codebook rows."""
    rng = torch.Generator().manual_seed(0)
    V, base, n_coords = 60, 4, 3
    vectors, counts, chosen = (torch.randn(V, 5, generator=rng), torch.randint(1, 50, (V,), generator=rng),
                               torch.randperm(base**n_coords, generator=rng)[:V])
    found = addresses.approximate(chosen, addresses.centroids(vectors, counts, chosen, base, n_coords, sweeps=200))
    rows = digits(chosen, base, n_coords) + base * torch.arange(n_coords)
    design = torch.zeros(V, base * n_coords).scatter_(1, rows, 1)
    weight = addresses.weights(counts).sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(weight * design, weight * vectors, driver="gelsd").solution
    torch.testing.assert_close(found, design @ solution, rtol=1e-3, atol=1e-3)


def test_a_model_starts_from_what_was_learned(tiny_data, tmp_path):
    config = Config(vocab_size=300, seq_len=16, d_model=32, n_layers=1, n_heads=2, d_seed=16, mode_width=2)
    path = addresses.learn(tiny_data, config)
    found = addresses.learned(tiny_data, config)
    model = addresses.new_model(config, 0, tiny_data, "learned", "vectors")
    assert torch.equal(model.embed_tokens.addresses, found["addresses"])
    codebooks = addresses.centroids(found["vectors"], found["counts"], found["addresses"], config.base, config.n_coords)
    torch.testing.assert_close(model.embed_tokens.codebooks / model.embed_tokens.codebooks.norm(), codebooks / codebooks.norm())
    assert model.embed_tokens.codebooks[0].square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    frequent = addresses.new_model(config, 0, tiny_data, "frequency").embed_tokens.addresses
    assert frequent[found["counts"].argmax()] == 0
    dense = addresses.new_model(Config(**vars(config) | dict(model="dense-untied")), 0, tiny_data, "learned", "vectors")
    table, vectors = dense.embed_tokens.weight.detach(), found["vectors"]
    seen = vectors.any(1)
    torch.testing.assert_close(table[seen] @ table[seen].T / table[seen].square().sum(1).mean(), vectors[seen] @ vectors[seen].T,
                               rtol=1e-4, atol=1e-5)
    assert table[seen].std().item() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(InputError, match="a tied table is the head too"):
        addresses.learn_where_needed(Config(**vars(config) | dict(model="dense")), tiny_data, "id", "vectors")
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError, match="damaged or of another vocabulary"):
        addresses.new_model(config, 0, tiny_data, "learned")
    path.unlink()


def test_addresses_travel_with_the_checkpoint(tiny_data, tmp_path):
    """train.py learns what it needs; on --resume the checkpoint's addresses count, not the file's."""
    flags = ("--device cpu --seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --tokens-per-step 256 "
             "--eval-tokens 512 --steps 2 --addresses learned --start vectors").split()
    command = [sys.executable, HERE / "train.py", "--data", tiny_data, "--out", tmp_path / "run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = Config(vocab_size=300, d_model=32, d_seed=8, base=addresses.BASE)
    file = addresses.file_of(tiny_data, config)
    weights = torch.load(tmp_path / "run/step-00000002/model.pt", weights_only=True)
    assert torch.equal(weights["embed_tokens.addresses"], addresses.learned(tiny_data, config)["addresses"])
    file.unlink()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not file.exists()
    assert json.loads((tmp_path / "run/step-00000002/config.json").read_text())["training"]["addresses"] == "learned"
    assert read_meta(tiny_data)["tokenizer"]["vocab_size"] == 300
