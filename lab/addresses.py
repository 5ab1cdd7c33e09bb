"""What stands beside a token tells of it before training starts: a file for `train.py --start` [O].

    python -m lab.addresses data/stdlib --out out/learned.pt                    # for Leviathan
    python -m lab.addresses data/stdlib --for dense-untied --out out/table.pt   # the control: a table
    python train.py --start out/learned.pt

The paper's address of a token is its id [P], and which tokens share a codebook row an accident. Here tokens
that are used alike share digits:

    shards -> co-occurrence up to two places away -> PPMI -> truncated SVD: a vector for each token
           -> additive quantisation into k digits of b values, one token to an address

In z = Σ_j C_j[i_j] a codebook row means the same whatever the other digits are, and so do the centroids of
additive quantisation. Codebooks can start as these: then z points where the token's vector does. W_seed and
W_res, which start orthogonal, bring it into the embedding, large enough to last.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab import command
from leviathan import digits, smallest_base
from prepare_pile import Windows, quiet, read_counts, read_meta
from train import save_tensors

BASE = 256                      # of digits learned with their codebooks: rows are cheap, and more fit better
OFFSETS = (-2, -1, 1, 2)        # places of the context
CONTEXTS = 8_192                # the most frequent tokens, which alone count as context
CHUNK = 2**22                   # tokens counted at once


# ---- a vector for each token -------------------------------------------------------------------------------

def cooccurrence(windows: Windows, counts, sample: int):
    """How often each context stands at each offset of each token, in `sample` tokens, of all shards alike.

    `counts` (V), of the whole text, choose the contexts. -> (V, 4 * contexts) sparse
    """
    V, n_contexts = len(counts), min(len(counts), CONTEXTS)
    column = torch.full((V,), -1)
    column[counts.argsort(descending=True, stable=True)[:n_contexts]] = torch.arange(n_contexts)
    sizes = [shard["tokens"] for shard in windows.shards]
    ends = [max(1, min(size, size * sample // sum(sizes))) for size in sizes]
    chunks = [(shard, i, min(i + CHUNK, end)) for shard, end in enumerate(ends) for i in range(0, end, CHUNK)]
    width = len(OFFSETS) * n_contexts
    keys, values = np.zeros(0, np.int64), np.zeros(0)
    for chunk in tqdm(chunks, desc="counting neighbours", disable=quiet()):
        tokens, new = torch.from_numpy(windows.tokens(*chunk)), []
        for j, offset in enumerate(OFFSETS):
            centre = tokens[max(0, -offset):len(tokens) - max(0, offset)]
            context = column[tokens[max(0, offset):len(tokens) - max(0, -offset)]]
            new.append((centre * width + j * n_contexts + context)[context >= 0].numpy())
        more, n = np.unique(np.concatenate(new), return_counts=True)
        keys, places = np.unique(np.concatenate([keys, more]), return_inverse=True)
        values = np.bincount(places, weights=np.concatenate([values, n]))
    indices, values = np.stack([keys // width, keys % width]), values.astype(np.float32)
    return torch.sparse_coo_tensor(indices, values, (V, width), check_invariants=True).coalesce()


def ppmi(counts):
    """max(0, log(p(token, context) / (p(token) p(context)^0.75 normalised))). Sparse -> sparse, of one shape

    Levy, Goldberg and Dagan (2015): smoothing the contexts' distribution tempers PMI's liking for rare ones.
    """
    (row, column), value = counts.indices(), counts.values()
    rows = torch.zeros(counts.shape[0]).index_add_(0, row, value)
    columns = torch.zeros(counts.shape[1]).index_add_(0, column, value) ** 0.75
    values = (value * columns.sum() / (rows[row] * columns[column])).log().clamp(min=0)
    return torch.sparse_coo_tensor(counts.indices(), values, counts.shape, check_invariants=True).coalesce()


def token_vectors(matrix, rank: int, seed: int = 0):
    """Rows of U √S of the truncated SVD, of length 1; 0 for tokens never seen. (V, columns) -> (V, rank)"""
    torch.manual_seed(seed)         # svd_lowrank has no generator of its own
    U, S, _ = torch.svd_lowrank(matrix, q=min(rank, *matrix.shape), niter=4)
    U[torch.sparse.sum(matrix, 1).to_dense() == 0] = 0          # where but rounding is left
    return F.pad(F.normalize(U * S.sqrt(), dim=1), (0, rank - U.shape[1]))


# ---- an address for each vector ----------------------------------------------------------------------------

def k_means(x, weight, n: int, seed: int, steps: int = 20):
    """Lloyd's centroids of weighted points. (V, d), (V) -> (n, d)"""
    centroids = x[torch.multinomial(weight, n, generator=torch.Generator().manual_seed(seed))]
    for _ in range(steps):
        centroids = means(x, weight, nearest(x, centroids)[:, 0], centroids)
    return centroids


def nearest(x, centroids, n: int = 1):
    """Indices of the n nearest centroids, the nearest first. (V, d), (c, d) -> (V, n)"""
    return torch.cat([(centroids.square().sum(1) - 2 * part @ centroids.T).topk(n, largest=False).indices
                      for part in x.split(8_192)])


def means(x, weight, group, otherwise):
    """Weighted means of the groups; an empty one keeps its row of `otherwise`. -> like `otherwise`"""
    total = torch.zeros(len(otherwise)).index_add_(0, group, weight)[:, None]
    sums = torch.zeros_like(otherwise).index_add_(0, group, x * weight[:, None])
    return torch.where(total > 0, sums / total.clamp(min=1e-9), otherwise)


def ranks(counts):
    """0 for the most frequent token, 1 for the next ... (V) -> (V)"""
    return counts.argsort(descending=True, stable=True).argsort()


def assign(preferences, others, power: int, capacity: int, priority):
    """Addresses others + digit * power, each for at most `capacity` tokens. -> (V)

    Deferred acceptance (Gale and Shapley, 1962): every token asks for the digit it prefers; what is asked for
    too often keeps those of priority, the rest ask for their next. preferences (V, b) best first; others (V)
    """
    everyone, choice = torch.arange(len(others)), torch.zeros_like(others)
    while True:
        addresses = others + preferences[everyone, choice] * power
        crowd, order = (addresses * len(others) + priority).sort()
        crowd = crowd // len(others)
        refused = order[everyone - torch.searchsorted(crowd, crowd) >= capacity]
        if not len(refused):
            return addresses
        choice[refused] += 1


def quantise(vectors, weight, base: int, n_coords: int, seed: int = 0, sweeps: int = 10):
    """Additive quantisation, one token to an address. (V, d), (V) -> (V)

    Residual quantisation finds the digits one after the other; then each is chosen again, given the others.
    """
    if n_coords == 1:
        return torch.arange(len(vectors))
    addresses, priority = torch.zeros(len(vectors), dtype=torch.long), ranks(weight)
    codebooks = torch.zeros(n_coords, base, vectors.shape[1])
    for sweep in range(1 + sweeps):
        for j, power in enumerate(base ** i for i in reversed(range(n_coords))):
            digit = addresses // power % base
            residual = vectors - summed(addresses, codebooks) + codebooks[j, digit]
            if sweep == 0:
                codebooks[j] = k_means(residual, weight, base, seed + j)
            room = 1 if sweep else power        # at first as many as the digits to come can tell apart
            wanted = nearest(residual, codebooks[j], base)
            addresses = assign(wanted, addresses - digit * power, power, room, priority)
            codebooks[j] = means(residual, weight, addresses // power % base, codebooks[j])
    return addresses


def centroids(vectors, weight, addresses, base: int, n_coords: int, sweeps: int = 10):
    """Codebooks whose sums come nearest to the vectors: each in turn, given the others. -> (k, b, d)"""
    codebooks = torch.zeros(n_coords, base, vectors.shape[1])
    for _ in range(sweeps):
        for j, digit in enumerate(digits(addresses, base, n_coords).T):
            residual = vectors - summed(addresses, codebooks) + codebooks[j, digit]
            codebooks[j] = means(residual, weight, digit, codebooks[j])
    return codebooks


def summed(addresses, codebooks):
    """z = Σ_j C_j[i_j]. (U), (k, b, d) -> (U, d)"""
    k, b, _ = codebooks.shape
    return sum(codebook[digit] for codebook, digit in zip(codebooks, digits(addresses, b, k).T))


# ---- the file ----------------------------------------------------------------------------------------------

def start(data, model="leviathan", addresses="learned", noise=False, n_coords=3, base=None, d_seed=128,
          d_model=128, sample=10**8, seed=0, scale=None) -> dict:
    """Part of a state dict, for a model of the prepared folder `data` to start from. Raises ValueError.

    leviathan, lev: addresses, and codebooks from the vectors or of `noise`, whose shape tells the base. With
    vectors leviathan has an orthogonal W_seed and W_res too, which bring what they know into the embedding.
    dense-untied: a table, a random rotation of the vectors; tokens without a neighbour start as noise.
    scale: standard deviation of a table's rows, 0.5, or of leviathan's embeddings, 1, where D <= d_seed. So
    large, what vectors know outlasts Adam's steps, which are of one size, whatever they are added to.
    """
    if scale is not None and (model == "lev" or noise and model == "leviathan"):
        raise ValueError("--scale is of a table, or of leviathan's embeddings from vectors: leave it out")
    if scale is None:
        scale = 0.5 if model == "dense-untied" else 1
    sizes = n_coords, d_seed, d_model, sample, seed + 1, 1 if base is None else base
    if min(sizes) < 1 or max(sizes) > 2**31 or not 0 < scale < 2**31:
        raise ValueError("numbers must be positive, the seed at least 0, and all below 2^31")
    counts = torch.from_numpy(read_counts(data))
    V, rng = len(counts), torch.Generator().manual_seed(seed)
    base = base or max(smallest_base(V, n_coords), 1 if noise or addresses != "learned" else min(BASE, V))
    if not V <= base**n_coords < 2**63 // V or base > V:
        raise ValueError(f"{n_coords} digits of base {base:,} do not suit {V:,} tokens: choose others")
    vectors = token_vectors(ppmi(cooccurrence(Windows(data, "train", 1), counts, sample)), d_seed, seed)
    if not vectors.any():
        raise ValueError(f"in {data} no two tokens attract each other: take a larger --sample, or more text")
    if model == "dense-untied":
        seen, table = vectors.any(1), scale * torch.randn(V, d_model, generator=rng)
        rows = vectors[seen] @ torch.nn.init.orthogonal_(torch.empty(d_seed, d_model), generator=rng)
        table[seen] = rows * scale / rows.square().mean().sqrt()
        return {"embed_tokens.weight": table}
    weight = counts.float().sqrt() + 1e-3       # between all tokens alike and all text alike
    order = {"id": torch.arange(V), "shuffled": torch.randperm(V, generator=rng), "frequency": ranks(counts)}
    chosen = quantise(vectors, weight, base, n_coords, seed) if addresses == "learned" else order[addresses]
    if noise:
        codebooks = torch.randn(n_coords, base, d_seed, generator=rng)      # as `initialise` has them
    else:
        codebooks = centroids(vectors, weight, chosen, base, n_coords)
        lost = (vectors - summed(chosen, codebooks)).square().sum(1) @ counts.float() / counts.sum()
        print(f"{n_coords} x {base} codebook rows explain {1 - lost:.1%} of the text's token vectors")
        codebooks /= codebooks[0, codebooks[0].any(1)].square().mean().sqrt()       # the largest: to 1
    found = {"addresses": chosen, "codebooks": codebooks}
    if model == "leviathan" and not noise:
        seed_proj, residual_proj = (torch.nn.init.orthogonal_(torch.empty(n, d_seed), generator=rng)
                                    for n in (d_seed, d_model))
        found["seed_proj.weight"] = seed_proj * d_seed**0.5             # 1, as `initialise` has it
        found["residual_proj.weight"] = residual_proj * scale / 0.21    # what ẑ spreads by
    return {f"embed_tokens.{name}": x for name, x in found.items()}


def write(path: Path, data, **settings):
    """start(data, **settings), as a file that says for which tokenizer it is."""
    path.parent.mkdir(parents=True, exist_ok=True)          # before the work
    found = start(data, **settings) | {"tokenizer": read_meta(data)["tokenizer"]["sha256"]}
    save_tensors(found, path)


def main():
    parser = argparse.ArgumentParser(description="Learn a start from prepared data.", allow_abbrev=False)
    parser.add_argument("data", type=Path, help="a folder that prepare_pile.py has written")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--for", dest="model", choices=("leviathan", "lev", "dense-untied"),
                        default="leviathan", help="a generator, v1 or lev, or the control: a table")
    parser.add_argument("--addresses", choices=("learned", "shuffled", "frequency", "id"), default="learned",
                        help="by use [O], at random, by frequency, or the id [P]; [%(default)s]")
    parser.add_argument("--noise", action="store_true", help="codebooks start as noise, not from the vectors")
    for name, default, about in (
            ("n-coords", 3, "digits of an address [3]"), ("d-seed", 128, "numbers in a vector [128]"),
            ("base", None, f"values of a digit [as few as go with noise or given addresses, else {BASE}]"),
            ("d-model", 128, "width of the model [128]"), ("sample", 10**8, "tokens to count [100 million]"),
            ("seed", 0, "of all that is drawn [0]")):
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    parser.add_argument("--scale", type=float, help="of embeddings from vectors [1; of a table 0.5]")
    args = vars(parser.parse_args())
    out = args.pop("out")
    if out.exists():
        raise ValueError(f"{out} exists: name another --out")
    write(out, **args)
    which = "--generator lev" if args["model"] == "lev" else f"--model {args['model']}"
    print(f"written: {out}, for train.py {which} --start {out} --out out/{out.stem}")


if __name__ == "__main__":
    command("lab.addresses", main)
