"""Addresses learned from the data, before training starts: tokens that are used alike share digits [O].

    python addresses.py data/mine           # -> data/mine/addresses-3.npz, which train.py --addresses learned reads

The paper's address of a token is its id [P], so that which tokens share a codebook row is an accident of the tokenizer.
Here it follows from what stands beside a token:

    shards -> co-occurrence with the tokens up to two places away -> PPMI -> truncated SVD: a vector for each token
           -> residual quantisation into k digits of b values, one token to an address

In z = Σ_j C_j[i_j] a codebook row means the same whatever the other digits are, and so do the centroids of residual
quantisation: z can start as the vector's approximation (--start vectors).
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from leviathan import Config, InputError, LanguageModel
from prepare_pile import Windows, read_meta

ADDRESSES = {"id": "the id itself [P]", "shuffled": "in any order", "frequency": "the rank by frequency", "learned": "by use"}
STARTS = {"noise": "as if nothing were known", "vectors": "from the vectors that addresses are learned from"}
OFFSETS = (-2, -1, 1, 2)        # places of the context
CONTEXTS = 8_192                # the most frequent tokens, which alone count as context
CHUNK = 2**23                   # tokens counted at once


def cooccurrence(folder, sample: int):
    """How often each context stands at each offset of each token, over the first `sample` tokens of every shard in turn.

    -> (V, 4 * contexts) sparse counts, (V) token counts
    """
    windows = Windows(folder, "train", seq_len=1)
    V, shards = windows.vocab_size, windows.shards
    share = [shard[:max(1, int(len(shard) * min(1, sample / sum(map(len, shards)))))] for shard in shards]
    counts = sum(np.bincount(shard, minlength=V) for shard in share)
    n_contexts = min(V, CONTEXTS)
    column = np.full(V, -1)
    column[np.argsort(-counts, kind="stable")[:n_contexts]] = np.arange(n_contexts)
    width = len(OFFSETS) * n_contexts
    keys, values = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for tokens in tqdm([shard[i:i + CHUNK] for shard in share for i in range(0, len(shard), CHUNK)], desc="counting neighbours"):
        tokens = tokens.astype(np.int64)
        new = []
        for j, offset in enumerate(OFFSETS):
            centre = tokens[max(0, -offset):len(tokens) - max(0, offset)]
            context = tokens[max(0, offset):len(tokens) - max(0, -offset)]
            known = column[context] >= 0
            new.append(centre[known] * width + j * n_contexts + column[context[known]])
        more, n = np.unique(np.concatenate(new), return_counts=True)
        keys, order = np.unique(np.concatenate([keys, more]), return_inverse=True)
        values = np.bincount(order, weights=np.concatenate([values, n]))
    indices = torch.from_numpy(np.stack([keys // width, keys % width]))
    pairs = torch.sparse_coo_tensor(indices, torch.from_numpy(values).float(), (V, width), check_invariants=True)
    return pairs.coalesce(), torch.from_numpy(counts)


def ppmi(counts):
    """max(0, log(p(token, context) / (p(token) p(context)^0.75 normalised))). Sparse -> sparse of the same shape

    Levy, Goldberg and Dagan (2015): smoothing the contexts' distribution tempers PMI's liking for rare ones.
    """
    (row, column), value = counts.indices(), counts.values()
    rows = torch.zeros(counts.shape[0]).index_add_(0, row, value)
    columns = torch.zeros(counts.shape[1]).index_add_(0, column, value) ** 0.75
    information = (value * columns.sum() / (rows[row] * columns[column])).log()
    return torch.sparse_coo_tensor(counts.indices(), information.clamp(min=0), counts.shape, check_invariants=True).coalesce()


def token_vectors(matrix, rank: int, seed: int = 0):
    """Rows of U √S of the truncated SVD, of length 1; 0 for tokens never seen. (V, columns) -> (V, rank)"""
    torch.manual_seed(seed)         # svd_lowrank has no generator of its own
    U, S, _ = torch.svd_lowrank(matrix, q=min(rank, *matrix.shape), niter=4)
    return F.pad(F.normalize(U * S.sqrt(), dim=1), (0, rank - U.shape[1]))


def k_means(x, weight, n: int, seed: int, steps: int = 20):
    """Lloyd's centroids of weighted points. (V, d), (V) -> (n, d)"""
    start = torch.multinomial(weight, n, generator=torch.Generator().manual_seed(seed))
    centroids = x[start].clone()
    for _ in range(steps):
        centroids = means(x, weight, nearest(x, centroids)[:, 0], centroids)
    return centroids


def nearest(x, centroids, n: int = 1):
    """Indices of the n nearest centroids, the nearest first. (V, d), (c, d) -> (V, n)"""
    return torch.cat([(centroids.square().sum(1) - 2 * part @ centroids.T).topk(n, largest=False).indices
                      for part in x.split(8_192)])


def means(x, weight, group, otherwise):
    """Weighted means of the groups; an empty one keeps its row of `otherwise`. -> like `otherwise`"""
    total = torch.zeros(len(otherwise)).index_add_(0, group, weight)
    sums = torch.zeros_like(otherwise).index_add_(0, group, x * weight.unsqueeze(1))
    return torch.where(total.unsqueeze(1) > 0, sums / total.clamp(min=1e-9).unsqueeze(1), otherwise)


def assign(preferences, cell, capacity: int, priority):
    """A digit for each token, at most `capacity` tokens of a cell to a digit: deferred acceptance (Gale and Shapley, 1962).

    Every token asks for the digit it prefers; a digit that is asked too often keeps the most frequent tokens, and the
    others ask for their next. preferences (V, b) best first; priority (V), 0 first -> (V)
    """
    V, b = preferences.shape
    choice, everyone = torch.zeros(V, dtype=torch.long), torch.arange(V)
    while True:
        digit = preferences[everyone, choice]
        slot, order = ((cell * b + digit) * V + priority).sort()
        slot = slot // V
        place = everyone - torch.searchsorted(slot, slot)
        refused = order[place >= capacity]
        if not len(refused):
            return digit
        choice[refused] += 1


def ranks(counts):
    """0 for the most frequent token, 1 for the next ... (V) -> (V)"""
    return counts.argsort(descending=True, stable=True).argsort()


def quantise(vectors, counts, base: int, n_coords: int, seed: int = 0):
    """Residual quantisation, one token to an address. -> addresses (V), codebooks (k, b, d)"""
    V, residual = len(vectors), vectors.clone()
    weight = counts.float().sqrt() + 1e-3
    addresses, codebooks = torch.zeros(V, dtype=torch.long), []
    for j in range(n_coords):
        centroids = k_means(residual, weight, base, seed + j) if V > base else F.pad(residual, (0, 0, 0, base - V))
        digit = assign(nearest(residual, centroids, base), addresses, base ** (n_coords - 1 - j), ranks(counts))
        codebooks.append(means(residual, weight, digit, centroids))
        residual = residual - codebooks[-1][digit]
        addresses = addresses * base + digit
    return addresses, torch.stack(codebooks)


def approximate(addresses, codebooks):
    """Σ_j C_j[i_j], most significant digit first. (V), (k, b, d) -> (V, d)"""
    k, b, _ = codebooks.shape
    return sum(codebooks[j][addresses // b ** (k - 1 - j) % b] for j in range(k))


# ---- files, and what train.py takes from them ------------------------------------------------------------------------

def learn(folder: Path, config: Config, sample: int = 100_000_000) -> Path:
    """Write addresses, codebooks and vectors for the shape (V, k, b, d_seed) of `config` beside the shards. -> the file"""
    pairs, counts = cooccurrence(folder, sample)
    vectors = token_vectors(ppmi(pairs), config.d_seed)
    addresses, codebooks = quantise(vectors, counts, config.base, config.n_coords)
    left = (vectors - approximate(addresses, codebooks)).square().sum(1)
    explained = 1 - (left * counts).sum() / (vectors.square().sum(1) * counts).sum()
    print(f"{config.n_coords} x {config.base} codebook rows explain {explained:.1%} of the vectors of the text's tokens")
    path = file_of(folder, config)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, addresses=addresses.numpy(), codebooks=codebooks.numpy(), vectors=vectors.numpy(), counts=counts.numpy())
    os.replace(partial, path)
    return path


def file_of(folder, config: Config) -> Path:
    return Path(folder) / f"addresses-{config.n_coords}x{config.base}x{config.d_seed}.npz"


def learned(folder, config: Config) -> dict[str, torch.Tensor]:
    """What `learn` wrote. Raises InputError where it is damaged or of other data."""
    path = file_of(folder, config)
    shapes = dict(addresses=(config.vocab_size,), vectors=(config.vocab_size, config.d_seed),
                  codebooks=(config.n_coords, config.base, config.d_seed), counts=(config.vocab_size,))
    try:
        with np.load(path) as file:
            found = {name: torch.from_numpy(file[name]) for name in shapes}
        assert all(found[name].shape == shape for name, shape in shapes.items())
    except Exception as error:      # numpy raises anything from BadZipFile to EOFError
        raise InputError(f"{path} is damaged or of another vocabulary ({error!r}): remove it and run addresses.py") from error
    return found


def learn_where_needed(config: Config, folder, addresses: str, start: str):
    """Before new_model, in one process alone: make the file that it reads, if it reads one and there is none."""
    if start == "vectors" or config.model == "leviathan" and addresses in ("frequency", "learned"):
        if not file_of(folder, config).exists():
            learn(folder, config)


def new_model(config: Config, seed: int, folder, addresses: str = "id", start: str = "noise") -> LanguageModel:
    """A model before training. Raises InputError."""
    if start == "vectors" and config.model == "dense":
        raise InputError("--start vectors: a tied table is the head too; choose --model dense-untied or leviathan")
    V, chosen = config.vocab_size, None
    if config.model == "leviathan" and addresses == "shuffled":
        chosen = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    elif config.model == "leviathan" and addresses == "frequency":
        chosen = ranks(learned(folder, config)["counts"])
    elif config.model == "leviathan" and addresses == "learned":
        chosen = learned(folder, config)["addresses"]
    model = LanguageModel(config, seed=seed, addresses=chosen)
    if start == "vectors":
        start_from_vectors(model, learned(folder, config))
    return model


@torch.no_grad()
def start_from_vectors(model: LanguageModel, found: dict, scale: float = 0.02):
    """Let the codebooks start as the quantisation's centroids, or a table as the vectors, at the scale that they start at anyway.

    A table of other width than the vectors takes them through a random rotation; tokens never seen keep their noise.
    """
    if model.config.model == "leviathan":
        codebooks = found["codebooks"]
        model.embed_tokens.codebooks.copy_(codebooks * scale / codebooks[0].square().mean().sqrt())
        return
    table, vectors = model.embed_tokens.weight, found["vectors"]
    rotation = torch.empty(vectors.shape[1], table.shape[1])
    nn.init.orthogonal_(rotation, generator=torch.Generator().manual_seed(0))
    rows = vectors @ rotation
    seen = vectors.any(1)
    table[seen] = rows[seen] * scale / rows[seen].square().mean().sqrt()


def main():
    parser = argparse.ArgumentParser(description="Learn addresses, and vectors to start from, from prepared shards.")
    parser.add_argument("data", type=Path, help="a folder that prepare_pile.py has written")
    parser.add_argument("--n-coords", type=int, default=3, help="digits [%(default)s]")
    parser.add_argument("--base", type=int, help="values of a digit [the smallest that gives each token an address]")
    parser.add_argument("--d-seed", type=int, default=128, help="numbers in a vector [%(default)s]")
    parser.add_argument("--sample", type=int, default=100_000_000, help="tokens to count, from all over the shards [%(default)s]")
    args = parser.parse_args()
    V = read_meta(args.data)["tokenizer"]["vocab_size"]
    config = Config(vocab_size=V, n_coords=args.n_coords, base=args.base, d_seed=args.d_seed)
    print(f"written: {learn(args.data, config, args.sample)}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"addresses.py: {error}")
