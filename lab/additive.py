"""Is the product needed? A sum of the same curves in its place: 1 + Σ_d (φ_d - 1) for Π_d φ_d [O].

    python -m lab.additive --generator additive --out out/additive      # train.py, and all of its flags

It is also how a generator of one's own is tried: a class, and a name in GENERATORS.
"""
import sys

import train
from leviathan import GENERATORS, Modes, TokenGenerator, initialise, spline_basis


class Sums(Modes):
    def forward(self, x):
        return 1 + (spline_basis(x.T, self.splines.shape[1]) @ self.splines).sum(0)         # (U, C)


class Additive(TokenGenerator):
    def __init__(self, vocab_size: int, d_model: int, *, seed: int = 0, **settings):
        super().__init__(vocab_size, d_model, **settings)
        self.modes = Sums(self.d_seed, self.n_knots, self.n_modes * self.mode_width)
        initialise(self, seed)


GENERATORS["additive"] = Additive

if __name__ == "__main__":
    try:
        train.main()
    except (ValueError, OSError) as error:
        sys.exit(f"lab.additive: {error}")
