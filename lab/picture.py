"""The method in one figure, from a checkpoint: digits and coordinates, basis, learned curves, embeddings.

    python -m lab.picture out/leviathan-nano --twin out/dense-untied-nano --out method.png

The map has two principal components of the embeddings of the most frequent tokens that are words; beside it
stands that of a dense twin, where one is named. Of lev, the first mode is shown.
"""
import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from lab import command
from lab.evaluate import check_tokenizer
from leviathan import Modes, digits, spline_basis
from prepare_pile import read_counts, token_bytes, written_whole
from sample import read_checkpoint

WORDS = 1_000           # frequent words that span the map, ...
SHOWN = 400             # ... and how many of them are written where there is room, the most frequent first
ANCHORS = 5             # words whose two nearest are shown


def frequent_words(spelling: list[bytes], counts: np.ndarray) -> dict[int, str]:
    """The most frequent tokens that are a space and a word. -> {id: word}"""
    words = {}
    for i in np.argsort(-counts, kind="stable").tolist():
        text = spelling[i].decode("ascii", errors="replace")
        if len(text) > 3 and text[0] == " " and text[1:].isalpha() and len(words) < WORDS:
            words[i] = text[1:]
    return words


def draw_coordinates(ax, generator, words: dict[int, str]):
    """Digits and ẑ of a few words, each with its two nearest."""
    ids = torch.tensor(list(words))
    points = generator.coordinates(generator.seeds(ids)).view(len(ids), -1)[:, :generator.d_seed]
    near = torch.cdist(points[:ANCHORS], points).argsort(dim=1)[:, :3].flatten()
    where = digits(generator.addresses[ids[near]], generator.base, generator.n_coords).tolist()
    ax.imshow(points[near, :64].numpy(), aspect="auto", interpolation="nearest", cmap="RdBu", vmin=0, vmax=1)
    ax.hlines(np.arange(2.5, len(near) - 1, 3), *ax.get_xlim(), color="black", lw=1)
    labels = [f"{words[i]}  {tuple(place)}" for i, place in zip(ids[near].tolist(), where)]
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set(title="digits and ẑ of words and of their two nearest", xlabel="first dimensions; red 0, blue 1")


def draw_curves(basis, curves, generator):
    """The basis, and curves of the first column, of the three dimensions where it is the least flat."""
    modes = next(module for module in generator.modules() if isinstance(module, Modes))
    x, S = torch.linspace(0, 1, 1_001), 1 + modes.splines[..., 0]               # (d_seed, κ)
    B = spline_basis(x, generator.n_knots)                                      # (1001, κ)
    basis.plot(x.numpy(), np.where(B > 0, B, np.nan), lw=1)
    basis.set(title=f"the basis: {generator.n_knots} quadratic B-splines", xlabel="coordinate ẑ")
    for d in S.var(dim=1).argsort(descending=True)[:3].tolist():
        curves.plot(x.numpy(), (B @ S[d]).numpy(), label=f"dimension {d}")
    curves.set(title="learned φ of three dimensions", xlabel="coordinate ẑ")
    curves.legend(fontsize=7)


def draw_map(ax, title: str, embed, words: dict[int, str]):
    """Words at two principal components of their embeddings, made of length 1; none that covers another."""
    rows = embed(torch.tensor(list(words)))                                     # (n, D)
    rows = F.normalize(rows - rows.mean(0), dim=1)
    U, S, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places, share = (U * S)[:, :2].numpy(), S[:2].square().sum() / S.square().sum()
    ax.set(xticks=[], yticks=[], title=f"{title}: two principal components, {share:.0%} of their variance")
    ax.scatter(*places.T, s=1.5, color="lightgray")
    ax.autoscale_view()                                 # now, since boxes of words are compared below
    taken = []
    for place, word in zip(places[:SHOWN], words.values()):
        text = ax.annotate(word, place, ha="center", va="center", fontsize=6.5)
        box = text.get_window_extent().padded(0.5)
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser("lab.picture", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a Leviathan's checkpoint, or the folder of its run")
    parser.add_argument("--twin", type=Path, help="a dense twin's, trained on the same data")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="a new file")
    args = parser.parse_args()
    if args.out.suffix != ".png" or not args.out.parent.is_dir() or args.out.exists():
        raise ValueError(f"--out {args.out} must be a new .png in a folder that exists")
    paths = [path for path in (args.checkpoint, args.twin) if path]
    found = [read_checkpoint(path) for path in paths]
    model, tokenizer, data = found[0]
    if not getattr(model.embed_tokens, "modes", None):
        raise ValueError(f"{args.checkpoint} has no generator with modes: it can be shown as --twin alone")
    for path, (_, own, _) in zip(paths, found):
        check_tokenizer(own, data, path)
    if len(words := frequent_words(token_bytes(tokenizer), read_counts(data))) < ANCHORS:
        raise ValueError(f"{data} has hardly any words: there is nothing to show")

    matplotlib.rc("axes", titlesize=10, labelsize=9)
    fig = Figure(figsize=(13, 9))
    grid = fig.add_gridspec(1, 3, left=0.13, right=0.99, bottom=0.67, top=0.97, width_ratios=[1.3, 1, 1])
    coordinates, basis, curves = grid.subplots()
    draw_coordinates(coordinates, model.embed_tokens, words)
    draw_curves(basis, curves, model.embed_tokens)
    grid = fig.add_gridspec(1, len(paths), left=0.01, right=0.99, bottom=0.01, top=0.59, wspace=0.02)
    for ax, path, (model, *_) in zip(grid.subplots(squeeze=False)[0], paths, found):
        draw_map(ax, f"embeddings of {path.name}", model.embed_tokens, words)
    with written_whole(args.out) as path:
        fig.savefig(path, dpi=130, format="png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command("lab.picture", main)
