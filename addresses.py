"""Addresses learned from the data, before training starts: tokens that are used alike share digits [O].

    python addresses.py data/mine           # -> data/mine/addresses-3x256x128.npz, which train.py reads

The paper's address of a token is its id [P], so that which tokens share a codebook row is an accident of the tokenizer.
Here it follows from what stands beside a token:

    shards -> co-occurrence with the tokens up to two places away -> PPMI -> truncated SVD: a vector for each token
           -> additive quantisation into k digits of b values, one token to an address

In z = Σ_j C_j[i_j] a codebook row means the same whatever the other digits are, and so do the centroids of additive
quantisation: z can start as the vector's approximation (`--start vectors`).
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import InputError, command_line, written_whole
from leviathan import Config, LanguageModel, digits, smallest_base
from shards import Windows, read_meta

ADDRESSES = ("id", "shuffled", "frequency", "learned")      # the id itself [P], in any order, the rank by frequency, by use [O]
STARTS = ("noise", "vectors")   # as if nothing were known; codebooks, or a table, from the vectors that addresses are learned from
BASE = 256                      # values of a learned digit: more than the smallest base that has room, since rows are cheap
OFFSETS = (-2, -1, 1, 2)        # places of the context
CONTEXTS = 8_192                # the most frequent tokens, which alone count as context
CHUNK = 2**23                   # tokens counted at once


def cooccurrence(folder, sample: int):
    """How often each context stands at each offset of each token, over `sample` tokens, a share of each shard's beginning.

    -> (V, 4 * contexts) sparse counts, (V) token counts
    """
    windows = Windows(folder, "train", seq_len=1)
    V, sizes = windows.vocab_size, [len(shard) for shard in windows.shards]
    ends = [min(size, max(1, int(size * min(1, sample / sum(sizes))))) for size in sizes]
    chunks = [(shard, start, min(start + CHUNK, end)) for shard, end in enumerate(ends) for start in range(0, end, CHUNK)]
    counts = sum(np.bincount(windows.tokens(*chunk), minlength=V) for chunk in chunks)
    n_contexts = min(V, CONTEXTS)
    column = np.full(V, -1)
    column[np.argsort(-counts, kind="stable")[:n_contexts]] = np.arange(n_contexts)
    width = len(OFFSETS) * n_contexts
    keys, values = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for chunk in tqdm(chunks, desc="counting neighbours"):
        tokens = windows.tokens(*chunk)
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
    cell = cell.unique(return_inverse=True)[1]          # 0 ... below V: sorted together with digit and priority
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


def quantise(vectors, counts, base: int, n_coords: int, seed: int = 0, sweeps: int = 10):
    """Additive quantisation, one token to an address. -> addresses (V)

    Residual quantisation finds the digits one after the other; then each in turn is chosen again, given the others.
    """
    if n_coords == 1:
        return torch.arange(len(vectors))
    weight, powers = weights(counts), base ** torch.arange(n_coords - 1, -1, -1)
    addresses, codebooks = torch.zeros(len(vectors), dtype=torch.long), torch.zeros(n_coords, base, vectors.shape[1])
    for sweep in range(1 + sweeps):
        for j, power in enumerate(powers):
            digit = addresses // power % base
            others, residual = addresses - digit * power, vectors - approximate(addresses, codebooks) + codebooks[j, digit]
            if sweep == 0:                  # as many may share this digit as those behind it, still 0, can tell apart
                codebooks[j], room = k_means(residual, weight, base, seed + j), power
            else:
                room = 1
            digit = assign(nearest(residual, codebooks[j], base), others, room, ranks(counts))
            addresses = others + digit * power
            codebooks[j] = means(residual, weight, digit, codebooks[j])
    return addresses


def weights(counts):
    """What a token counts for: more than one in the vocabulary, less than one in the text. (V) -> (V)"""
    return counts.float().sqrt() + 1e-3


def centroids(vectors, counts, addresses, base: int, n_coords: int, sweeps: int = 10):
    """Codebooks whose sums come nearest to the vectors, for any addresses: each in turn, given the others. -> (k, b, d)"""
    codebooks = torch.zeros(n_coords, base, vectors.shape[1])
    for _ in range(sweeps if n_coords > 1 else 1):
        for j, digit in enumerate(digits(addresses, base, n_coords).T):
            residual = vectors - approximate(addresses, codebooks) + codebooks[j, digit]
            codebooks[j] = means(residual, weights(counts), digit, codebooks[j])
    return codebooks


def approximate(addresses, codebooks):
    """Σ_j C_j[i_j]. (V), (k, b, d) -> (V, d)"""
    k, b, _ = codebooks.shape
    return sum(codebook[digit] for codebook, digit in zip(codebooks, digits(addresses, b, k).T))


# ---- files, and what train.py takes from them ------------------------------------------------------------------------

def learn(folder: Path, config: Config, sample: int = 100_000_000) -> Path:
    """Write addresses and vectors for the shape (V, k, b, d_seed) of `config` beside the shards. -> the file"""
    if config.base > config.vocab_size:
        raise InputError(f"base {config.base:,} exceeds the vocabulary of {config.vocab_size:,}: lower --base")
    print(f"learning the addresses of {config.vocab_size:,} tokens from {folder}, once", flush=True)
    pairs, counts = cooccurrence(folder, sample)
    vectors = token_vectors(ppmi(pairs), config.d_seed)
    addresses = quantise(vectors, counts, config.base, config.n_coords)
    codebooks = centroids(vectors, counts, addresses, config.base, config.n_coords)
    left = (vectors - approximate(addresses, codebooks)).square().sum(1)
    explained = 1 - (left * counts).sum() / (vectors.square().sum(1) * counts).sum()
    print(f"{config.n_coords} x {config.base} codebook rows explain {explained:.1%} of the vectors of the text's tokens")
    path = file_of(folder, config)
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, addresses=addresses.numpy(), vectors=vectors.numpy(), counts=counts.numpy())
    return path


def file_of(folder, config: Config) -> Path:
    return Path(folder) / f"addresses-{config.n_coords}x{config.base}x{config.d_seed}.npz"


def learned(folder, config: Config) -> dict[str, torch.Tensor]:
    """What `learn` wrote. Raises InputError where it is damaged or of other data."""
    path = file_of(folder, config)
    V = config.vocab_size
    shapes = dict(addresses=(V,), vectors=(V, config.d_seed), counts=(V,))
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            found = {name: torch.from_numpy(file[name]) for name in shapes}
        assert all(found[name].shape == shape for name, shape in shapes.items())
    except Exception as error:      # numpy raises anything from BadZipFile to EOFError
        raise InputError(f"{path} is missing, damaged or of another vocabulary ({error!r}): remove it and run addresses.py "
                         "(on each machine, if they share no disk)") from error
    return found


def learned_base(vocab_size: int, n_coords: int) -> int:
    return min(vocab_size, max(BASE, smallest_base(vocab_size, n_coords)))


def learn_where_needed(config: Config, folder, addresses: str, start: str):
    """Before new_model, in one process alone: make the file that it reads, if it reads one and there is none."""
    if start == "vectors" and config.model == "dense":
        raise InputError("--start vectors: a tied table is the head too; choose --model dense-untied or leviathan")
    if start != "noise" or config.model == "leviathan" and addresses in ("frequency", "learned"):
        if not file_of(folder, config).exists():
            learn(folder, config)


def new_model(config: Config, seed: int, folder, addresses: str = "id", start: str = "noise") -> LanguageModel:
    """A model before training. Raises InputError."""
    V, chosen = config.vocab_size, None
    if config.model == "leviathan" and addresses == "shuffled":
        chosen = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    elif config.model == "leviathan" and addresses == "frequency":
        chosen = ranks(learned(folder, config)["counts"])
    elif config.model == "leviathan" and addresses == "learned":
        chosen = learned(folder, config)["addresses"]
    model = LanguageModel(config, seed=seed, addresses=chosen)
    if start != "noise":
        start_from_vectors(model, learned(folder, config))
    return model


@torch.no_grad()
def start_from_vectors(model: LanguageModel, found: dict, scale: float = 0.02):
    """Let codebooks start as centroids of the vectors, or a table as the vectors, whose rows have the scale of noise.

    The table takes them through a random rotation (below their width, a projection); tokens never seen keep their noise.
    """
    vectors, c, embed = found["vectors"], model.config, model.embed_tokens
    if c.model == "leviathan":
        codebooks = centroids(vectors, found["counts"], embed.addresses, c.base, c.n_coords)
        used = codebooks[0].any(1)
        embed.codebooks.copy_(codebooks * scale / codebooks[0, used].square().mean().sqrt())
        return
    rotation = nn.init.orthogonal_(torch.empty(vectors.shape[1], c.d_model), generator=torch.Generator().manual_seed(0))
    seen, rows = vectors.any(1), vectors @ rotation
    embed.weight[seen] = rows[seen] * scale / rows[seen].square().mean().sqrt()


def main():
    parser = argparse.ArgumentParser(description="Learn addresses, and vectors to start from, from prepared shards.")
    parser.add_argument("data", type=Path, help="a folder that prepare_pile.py has written")
    parser.add_argument("--n-coords", type=int, default=3, help="digits [%(default)s]")
    parser.add_argument("--base", type=int, help=f"values of a digit [{BASE}, or more where the vocabulary needs it]")
    parser.add_argument("--d-seed", type=int, default=128, help="numbers in a vector [%(default)s]")
    parser.add_argument("--sample", type=int, default=100_000_000, help="tokens to count, of all shards alike [%(default)s]")
    args = parser.parse_args()
    if args.sample < 1:
        raise InputError(f"--sample {args.sample}: it must be at least 1")
    V = read_meta(args.data)["tokenizer"]["vocab_size"]
    config = Config(vocab_size=V, n_coords=args.n_coords, base=args.base or learned_base(V, args.n_coords), d_seed=args.d_seed)
    print(f"written: {learn(args.data, config, args.sample)}")


if __name__ == "__main__":
    command_line(main)
