"""Generators of one's own, each a class with a name in GENERATORS. Three that ask something of the method:

    python -m lab.generators --generator additive --out out/additive    # train.py, and all of its flags
    python -m lab.generators --generator bits --out out/bits

The lab's other scripts know them too; sample.py does not. Their matrices are drawn by `initialise`.
"""

import torch
from torch import nn

import train
from lab import command
from leviathan import GENERATORS, Modes, TokenGenerator, digits, initialise, spline_basis


class Sums(Modes):
    def forward(self, x):
        return 1 + (spline_basis(x.T, self.splines.shape[1]) @ self.splines).sum(0)         # (U, C)


class Additive(TokenGenerator):
    """Is the product needed? A sum of the same curves in its place: 1 + Σ_d (φ_d - 1) for Π_d φ_d [O]."""
    def __init__(self, vocab_size: int, d_model: int, *, seed: int = 0, **settings):
        super().__init__(vocab_size, d_model, **settings)
        self.modes = Sums(self.d_seed, self.n_knots, self.n_modes * self.mode_width)
        initialise(self, seed)


class Points(TokenGenerator):
    """Are the modes needed? Without them e = W_res (ẑ - 1/2): nothing but where the token lives [O]."""
    def __init__(self, vocab_size: int, d_model: int, *, seed: int = 0, **settings):
        super().__init__(vocab_size, d_model, **settings)
        self.modes = self.mode_proj = None
        initialise(self, seed)

    def surface(self, x):
        return self.residual_proj(x - 0.5)


class Bits(nn.Module):
    """Is anything to be learned? The bits of the id as ±1, tiled to D: no parameters (arXiv 2605.09751)."""
    def __init__(self, vocab_size: int, d_model: int, **_):
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, d_model
        self.n_bits = max(1, (vocab_size - 1).bit_length())

    def forward(self, ids):
        """(N) -> (N, D)"""
        column = torch.arange(self.d_model, device=ids.device) % self.n_bits
        return 2.0 * digits(ids, 2, self.n_bits)[..., column] - 1

    def table(self):
        """-> (V, D)"""
        return self(torch.arange(self.vocab_size))


GENERATORS |= dict(additive=Additive, points=Points, bits=Bits)

if __name__ == "__main__":
    command("lab.generators", train.main)
