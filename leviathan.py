"""Leviathan: a LLaMA-style language model without an input embedding table.

    Batley and Saha, "A Separable Architecture for Continuous Token Representation in Language Models",
    arXiv 2601.22040, v1 (January 2026); v2 (May 2026) calls the generator LEV, "learned embedding vectorization".

An ordinary model looks the vector of token i up in a table of V rows. Leviathan computes it:

    i -> address -> base-b digits -> codebook sum -> dense, LayerNorm, sigmoid          (where the token lives)
      -> B-spline basis -> product over dimensions ("modes") -> projection (+ residual)  (what is found there)

Marks, here and in the README: [P] the paper says so, [R] reconstructed from its numbers or from later public code of
the same mathematics, [O] our own choice.

Names: paper symbol, code                       Shapes, in comments
    V    vocab_size   size of the vocabulary        N  tokens given (any shape)     B  sequences in a batch
    D    d_model      width of the model            U  distinct ids among them      T  positions in a sequence
    k    n_coords     digits of an address          P  seed projections: 1 for v1,  H  heads
    b    base         smallest with b^k >= V           M for lev (one per mode)     C  columns of one projection,
         d_seed       seed dimensions                                                  n_modes * mode_width / P
    κ    n_knots      knots of a spline
    M    n_modes      products ("h" in v2)
    r    mode_width   channels of each product

How the decoder differs from Hugging Face's Llama: it does not, and its parameters carry the same names; `TokenGenerator`
alone stands where Llama has `embed_tokens`. All three twins (`Config.model`) share everything else.
"""
import math
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoints import check_tensors, load_tensors, newest_checkpoint
from common import InputError, check_types, read_json
from loss import linear_cross_entropy

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: a preset is a shape, a generator is a reading of the method.

MODELS = {
    "leviathan": "token generator, untied head",
    "dense": "lookup table tied to the head: the iso-body twin [P]",
    "dense-untied": "lookup table, untied head: the isoparametric twin [R]",
}
GENERATORS = {  # slope: the sigmoid's argument is slope * LayerNorm
    "v1": dict(n_knots=32, seed_projection_per_mode=False, slope=1.0, residual=True),    # κ [P, from a digest], rest [P]
    "lev": dict(n_knots=16, seed_projection_per_mode=True, slope=0.5, residual=False),   # κ [R], slope [P/R]
}
PRESETS = {  # shape (Config), then recipe (train.py). The first two are [O]; below, D is [P], depth [R], the recipe [O],
    # but for 512 x 512 tokens a step [P] and about 20 tokens per parameter [R, from v2]. Sizes are Leviathan's.
    "nano":  dict(d_model=128, n_layers=4, seq_len=128, mode_width=32,
                  learning_rate=4e-3, tokens_per_step=4_096, steps=300),
    "micro": dict(d_model=256, n_layers=6, seq_len=256, mode_width=32,
                  learning_rate=2e-3, tokens_per_step=32_768, steps=600),
    "60m":   dict(d_model=256, n_layers=6, seq_len=512, mode_width=64,       # v1, isoparametric: 52 layers, 108.5M [P]
                  learning_rate=1e-3, tokens_per_step=262_144, steps=4_600),
    "270m":  dict(d_model=768, n_layers=12, seq_len=512, mode_width=64,      # v1, isoparametric: 28 layers, 421M [P]
                  learning_rate=6e-4, tokens_per_step=262_144, steps=20_600),
    "410m":  dict(d_model=1024, n_layers=12, seq_len=512, mode_width=64,
                  learning_rate=5e-4, tokens_per_step=262_144, steps=31_300),
    "1.2b":  dict(d_model=2048, n_layers=12, seq_len=512, mode_width=64,     # 24.1B tokens [P]
                  learning_rate=3e-4, tokens_per_step=262_144, steps=92_000),
}


@dataclass(frozen=True)
class Config:
    """The shape of a model. None means: derived from the other fields. Raises InputError where they don't fit."""
    model: str = "leviathan"        # leviathan | dense | dense-untied
    vocab_size: int = 200_019       # V: the tokenizer's; o200k_base has this, the paper 200,376 [P]
    seq_len: int = 512              # the longest context
    d_model: int = 256              # D: width
    n_layers: int = 6               # decoder blocks of 16 D^2 parameters each [R]
    n_heads: int | None = None      # None: D / 64 [O]
    generator: str = "lev"          # v1 | lev: the paper's first or second version of the method
    n_coords: int = 3               # k: digits of a token's address [P]
    base: int | None = None         # b: None for the smallest with b^k >= V [P], and 256 where train.py learns addresses [O]
    d_seed: int = 128               # seed dimensions, factors of every product [P]
    n_knots: int | None = None      # κ: None for the generator's own, 32 (v1) or 16 (lev)
    n_modes: int = 8                # M: products [P]
    mode_width: int = 64            # r: channels of each product [R]
    paper: bool = False             # the literal reading: no centring, start of unit scale [R], the id as address [P]

    def __post_init__(self):
        check_types(self)

        def require(ok, message):
            if not ok:
                raise InputError(message)

        require(self.model in MODELS, f"unknown model {self.model!r}: choose from {', '.join(MODELS)}")
        require(self.generator in GENERATORS,
                f"unknown generator {self.generator!r}: choose from {', '.join(GENERATORS)}")
        object.__setattr__(self, "n_knots", self.n_knots or GENERATORS[self.generator]["n_knots"])
        object.__setattr__(self, "n_heads", self.n_heads or max(1, self.d_model // 64))
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not bool and isinstance(value, int):
                require(1 <= value < 2**31, f"{field.name} is {value}: it must be at least 1" if value < 1 else
                        f"{field.name} is {value:,}: it must be below 2^31")
        require(self.n_coords <= 62, f"n_coords is {self.n_coords}: 62 digits are the most that 64 bits have")
        object.__setattr__(self, "base", self.base or smallest_base(self.vocab_size, self.n_coords))
        require(self.d_model % self.n_heads == 0,
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        require(self.d_model // self.n_heads % 2 == 0,
                f"head_dim {self.d_model // self.n_heads} (d_model / n_heads) is odd: rotary positions need pairs")
        require(self.n_knots >= 3, f"n_knots {self.n_knots}: a quadratic spline needs at least 3")
        require(self.base**self.n_coords >= self.vocab_size,
                f"base {self.base} with {self.n_coords} digits has {self.base**self.n_coords:,} addresses, "
                f"too few for a vocabulary of {self.vocab_size:,}: raise base or n_coords")
        require(self.seq_len <= 2**20, f"seq_len is {self.seq_len:,}: it may be 1,048,576 at most")
        require(self.base**self.n_coords < 2**63, f"base {self.base} with {self.n_coords} digits exceeds 64 bits: lower one")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "Config":
        """The shape called `name` in PRESETS, with any field overridden."""
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        own = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in PRESETS[name].items() if key in own} | overrides)


def smallest_base(vocab_size: int, n_coords: int) -> int:
    """The smallest b with b^k >= V, in integers: ceil(V ** (1/k)) is wrong when V is an exact k-th power."""
    base = max(1, round(vocab_size ** (1 / n_coords)) - 1)
    while base**n_coords < vocab_size:
        base += 1
    return base


# ---------------------------------------------------------------------------------------------------------------------
# The method, step by step.

def digits(addresses, base: int, n_coords: int):
    """Base-b digits of each address, most significant first [P]. (U) -> (U, k)"""
    powers = base ** torch.arange(n_coords - 1, -1, -1, device=addresses.device)
    return addresses.unsqueeze(-1) // powers % base


def spline_basis(x, n_knots: int):
    """Quadratic B-splines on equally spaced knots of [0, 1], summing to 1 everywhere [R]. (...) -> (..., κ)

    With t the distance to a knot in knot spacings, B = 3/4 - t^2 for t < 1/2, (3/2 - t)^2 / 2 for t < 3/2, else 0. So at
    most three values are non-zero: that of the nearest knot, at signed distance u, and of its two neighbours.
    """
    position = x * (n_knots - 1)
    nearest = position.detach().round().clamp(0, n_knots - 1)
    u = position - nearest                                                                  # in [-1/2, 1/2]
    left = torch.where(nearest > 0, (0.5 - u).square() / 2, 0)                              # beyond either end there is
    right = torch.where(nearest < n_knots - 1, (0.5 + u).square() / 2, 0)                   # no knot, and the others
    middle = 0.75 - u.square()                                                              # share its part
    total = left + middle + right
    values = torch.stack([value / total for value in (left, middle, right)], dim=-1)        # (..., 3)
    knots = nearest.long().unsqueeze(-1) + torch.arange(-1, 2, device=x.device)             # (..., 3)
    return values.new_zeros(*x.shape, n_knots).scatter_add(-1, knots.clamp(0, n_knots - 1), values)


def product_tree(factors):
    """Product over the first dimension, in pairs. (n, ...) -> (...)

    Unlike a sum of logarithms with sign parity it has the right gradient where a factor is exactly 0.
    """
    while len(factors) > 1:
        first, second, *odd = factors.split(len(factors) // 2)      # slices would each fill a gradient with zeros
        factors = torch.cat([first * second, *odd]) if odd else first * second
    return factors[0]


class TokenGenerator(nn.Module):
    """Computes token embeddings: a drop-in for `nn.Embedding(vocab_size, d_model)` in any model.

    ids (any shape, any integer type, 0 <= id < V) -> (*ids.shape, D). Raises IndexError for other ids.

    addresses: V integers, one to one into 0 ... b^k - 1; None for the ids themselves [P]. They decide which tokens share
        digits, and so codebook rows; they are a buffer and travel with the weights.
    paper: the literal reading. By default modes and residual are centred (-1, -1/2) and start at the scale of a
        table, 0.02 [O]: literally, modes start near 1 and ẑ near 1/2, so that all tokens start nearly parallel.
    """
    ELEMENTS_PER_CHUNK = {"cpu": 2**21}    # spline values held at once: what fits a CPU's cache, ...
    DEFAULT_ELEMENTS = 2**27               # ... and half a gigabyte of float32 elsewhere

    def __init__(self, vocab_size: int, d_model: int, generator: str = "lev", *, n_coords: int = 3, base: int | None = None,
                 d_seed: int = 128, n_knots: int | None = None, n_modes: int = 8, mode_width: int = 64,
                 paper: bool = False, addresses=None, seed: int = 0):
        super().__init__()
        self.config = Config("leviathan", vocab_size, d_model=d_model, n_heads=1, generator=generator, n_coords=n_coords,
                             base=base, d_seed=d_seed, n_knots=n_knots, n_modes=n_modes, mode_width=mode_width, paper=paper)
        c, method = self.config, GENERATORS[generator]
        self.num_embeddings, self.embedding_dim = vocab_size, d_model       # as nn.Embedding calls them
        self.slope = method["slope"]
        P = n_modes if method["seed_projection_per_mode"] else 1
        self.register_buffer("addresses", torch.arange(vocab_size) if addresses is None else torch.as_tensor(addresses).clone())
        self.codebooks = nn.Parameter(torch.empty(n_coords, c.base, d_seed))
        self.seed_proj = nn.Parameter(torch.empty(P, d_seed, d_seed))
        self.seed_norm_weight = nn.Parameter(torch.empty(P, d_seed))
        self.seed_norm_bias = nn.Parameter(torch.empty(P, d_seed))
        self.splines = nn.Parameter(torch.empty(d_seed, P, c.n_knots, n_modes * mode_width // P))    # S
        self.mode_proj = nn.Linear(n_modes * mode_width, d_model, bias=False)                        # W_out
        self.residual_proj = nn.Linear(d_seed, d_model, bias=False) if method["residual"] else None  # W_res
        self.register_load_state_dict_post_hook(lambda module, _: module.check_addresses())
        self.check_addresses()
        initialise(self, seed)

    def check_addresses(self):
        """Raises InputError unless the addresses are V distinct integers in 0 ... b^k - 1."""
        a, room = self.addresses, self.config.base**self.config.n_coords
        if a.shape != (self.num_embeddings,) or a.is_floating_point():
            raise InputError(f"addresses must be {self.num_embeddings:,} integers, one per token; got {a.dtype} of shape "
                             f"{tuple(a.shape)}")
        if a.is_meta:
            return
        if a.min() < 0 or a.max() >= room:
            raise InputError(f"addresses must lie in 0 ... {room - 1:,} (base^n_coords - 1); got {a.min()} ... {a.max()}")
        order = a.argsort(stable=True)
        clash = (a[order][1:] == a[order][:-1]).nonzero()
        if len(clash):
            first, second = order[clash[0, 0]].item(), order[clash[0, 0] + 1].item()
            raise InputError(f"addresses collide: tokens {first} and {second} share {a[first]}; each needs one of its own")

    def forward(self, ids):
        """An embedding depends on the id alone, so each distinct id is generated once and then looked up."""
        distinct, inverse = ids.unique(return_inverse=True)
        return F.embedding(inverse, self.rows(distinct))

    def rows(self, ids):
        """Embeddings of a list of ids, in float32 or better whatever the autocast [O]. (U) -> (U, D)"""
        with torch.autocast(ids.device.type, enabled=False) if ids.device.type != "meta" else nullcontext():
            address = self.addresses.index_select(0, ids.long())
            latent = self.latent(digits(address, self.config.base, self.config.n_coords))
            return self.aggregate(latent, self.modes(latent)).to(self.splines.dtype)

    def from_seeds(self, seeds):
        """Embeddings of tokens that have a seed z of their own instead of digits: how one is added after training [O].

        (U, d_seed) -> (U, D)
        """
        latent = self.project(seeds)
        return self.aggregate(latent, self.modes(latent))

    @torch.no_grad()
    def table(self):
        """The rows of all ids: what `nn.Embedding` would hold. -> (V, D)"""
        return torch.cat([self.rows(ids) for ids in torch.arange(self.num_embeddings, device=self.addresses.device).split(8_192)])

    def latent(self, digits):
        """ẑ = sigmoid(slope * LN(W_seed Σ_j C_j[i_j])), in (0, 1) [P]. (U, k) -> (U, P, d_seed)

        W_seed is applied to the k·b codebook rows before they are summed: the same by linearity, and far fewer rows. Not so
        where ids are few, as when text is sampled.
        """
        wide = torch.promote_types(self.splines.dtype, torch.float32)       # a bfloat16 product of 128 errs by 2 %
        k, b, _ = self.codebooks.shape
        rows = digits + b * torch.arange(k, device=digits.device)                                      # (U, k)
        if len(rows) < b:
            return self.project(F.embedding(rows, self.codebooks.to(wide).flatten(0, 1)).sum(1))
        projected = torch.einsum("kbs,pts->kbpt", self.codebooks.to(wide), self.seed_proj.to(wide)).reshape(k * b, -1)
        return self.squash(F.embedding(rows, projected).sum(1).unflatten(-1, self.seed_norm_weight.shape))

    def project(self, seeds):
        """ẑ of seeds as they are. (U, d_seed) -> (U, P, d_seed)"""
        return self.squash(torch.einsum("us,pts->upt", seeds, self.seed_proj.to(seeds.dtype)))

    def squash(self, z):
        """LayerNorm and sigmoid, of each seed projection [P]. (U, P, d_seed) -> (U, P, d_seed)"""
        weight, bias = self.seed_norm_weight.to(z.dtype), self.seed_norm_bias.to(z.dtype)
        return torch.sigmoid(self.slope * (F.layer_norm(z, z.shape[-1:]) * weight + bias))

    def modes(self, latent):
        """mode_m = Π_d φ_{m,d}(ẑ_d), each channel a rank-1 tensor product of splines [P]. (U, P, d_seed) -> (U, M*r)

        The factors are d_seed times the size of the result, so where they are many only those of a chunk of ids and of one
        projection are held, and they are computed again in backward.
        """
        per_id = self.splines[:, 0, 0].numel()
        limit = max(32, self.ELEMENTS_PER_CHUNK.get(latent.device.type, self.DEFAULT_ELEMENTS) // per_id)
        if latent[..., 0].numel() <= limit:
            return self.modes_of_chunk(latent, self.splines)
        n_chunks = -(-len(latent) // limit)
        return torch.cat([
            torch.cat([checkpoint(self.modes_of_chunk, chunk, splines, use_reentrant=False, preserve_rng_state=False)
                       for chunk in latents.chunk(n_chunks)])
            for latents, splines in zip(latent.split(1, dim=1), self.splines.split(1, dim=1))], dim=1)

    def modes_of_chunk(self, latent, splines):
        """φ_{m,d} = Σ_n B_n(ẑ_d) S[m,d,n,:], then their product over d [P]. (U, P, d_seed) -> (U, P*C)"""
        basis = spline_basis(latent.permute(2, 1, 0), self.config.n_knots)      # (d_seed, P, U, κ)
        factors = basis @ splines.to(basis.dtype)                               # (d_seed, P, U, C)
        return product_tree(factors).transpose(0, 1).flatten(1)

    def compile_modes(self):
        """torch.compile what a chunk computes: the only part of the generator whose time counts."""
        self.modes_of_chunk = torch.compile(self.modes_of_chunk, dynamic=True)

    def aggregate(self, latent, modes):
        """e = W_out mode + W_res ẑ (Eq. 3 [P]; that the residual acts on ẑ is [R]). (U, M*r) -> (U, D)"""
        if not self.config.paper:                                               # 1 and 1/2: their means at the start
            latent, modes = latent - 0.5, modes - 1
        e = F.linear(modes, self.mode_proj.weight.to(modes.dtype))
        if self.residual_proj is not None:
            e = e + F.linear(latent[:, 0], self.residual_proj.weight.to(modes.dtype))
        return e


# ---------------------------------------------------------------------------------------------------------------------
# The decoder: Llama, parameter by parameter.

def rotary_tables(seq_len: int, head_dim: int):
    """Cosines and sines of the rotary positions, Llama's convention. -> two of (T, head_dim)"""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(seq_len), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x_j, x_{j + head_dim/2}) by their position's angles. (B, H, T, head_dim)"""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions. `cache`, for sampling, is this layer's KeyValues of sample.py."""
    def __init__(self, config: Config):
        super().__init__()
        self.n_heads = config.n_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.d_model, config.d_model, bias=False))

    def forward(self, x, cos, sin, cache=None):
        q, k, v = (proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)                 # (B, H, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)                                                        # of S positions, S >= T
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == S)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                     # (B, T, D)


class SwiGLU(nn.Module):
    """silu(W_gate x) * W_up x, projected back; three D x 4D matrices [R]."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.up_proj = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.down_proj = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Leviathan or one of its dense twins. With the same seed, twins start with bit-identical blocks and heads."""
    def __init__(self, config: Config, seed: int = 0, addresses=None):
        super().__init__()
        self.config = c = config
        self.materialized = False
        if c.model == "leviathan":
            self.embed_tokens = TokenGenerator(
                c.vocab_size, c.d_model, c.generator, n_coords=c.n_coords, base=c.base, d_seed=c.d_seed, n_knots=c.n_knots,
                n_modes=c.n_modes, mode_width=c.mode_width, paper=c.paper, addresses=addresses)
        else:
            self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.model == "dense":
            self.embed_tokens.weight = self.lm_head.weight
        cos, sin = rotary_tables(c.seq_len, c.d_model // c.n_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        initialise(self, seed)

    def forward(self, ids, targets=None):
        """Logits of the next token, or the mean loss where `targets` are given. (B, T) -> (B, T, V) or scalar"""
        if ids.shape[1] > self.config.seq_len:
            raise InputError(f"{ids.shape[1]} tokens exceed the model's seq_len of {self.config.seq_len}")
        if self.materialized and torch.is_grad_enabled() and (self.training or targets is not None):
            raise InputError("a materialized model has lost its generator and cannot be trained: load its checkpoint again, or "
                             "compute under torch.no_grad()")
        x = self.hidden(self.embed_tokens(ids))                                 # (B, T, D)
        return self.lm_head(x) if targets is None else linear_cross_entropy(x, self.lm_head.weight, targets)

    def hidden(self, x, caches=None):
        """The decoder between its two ends, embedding and head. (B, T, D) -> (B, T, D)

        With `caches`, one for each layer, x are the positions that follow those in them.
        """
        start = caches[0].length if caches else 0
        cos, sin = (table[start:start + x.shape[1]] for table in (self.cos, self.sin))
        for layer, cache in zip(self.layers, caches or repeat(None)):
            x = layer(x, cos, sin, cache)
        return self.norm(x)

    def compile_parts(self):
        """torch.compile in place what repeats: each block, so that one compilation serves all, and the generator's modes."""
        for layer in self.layers:
            layer.compile()
        if isinstance(self.embed_tokens, TokenGenerator):
            self.embed_tokens.compile_modes()

    def materialize(self) -> "LanguageModel":
        """Replace the generator by the table it makes, in place and for good: the model then *is* its untied dense twin.

        For inference, at the twin's cost. Training on would train a table: forward raises InputError instead.
        """
        if self.config.model == "leviathan":
            self.embed_tokens = nn.Embedding.from_pretrained(self.embed_tokens.table())
            self.config = replace(self.config, model="dense-untied")
            self.materialized = True
            self.eval().requires_grad_(False)
        return self

    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters stand where; a tied table is counted in the head."""
        count = lambda module: sum(p.numel() for p in module.parameters())      # noqa: E731
        embedding = {"leviathan": "generator"}.get(self.config.model, "table")
        return {embedding: 0 if self.config.model == "dense" else count(self.embed_tokens),
                "blocks": count(self.layers) + count(self.norm), "head": count(self.lm_head)}

    def n_parameters(self) -> int:
        return sum(self.parameters_by_part().values())

    def flops_per_token(self) -> int:
        """Of a training step: 6 per parameter of blocks and head, 12·L·D·T for attention; the generator is left out."""
        c, parts = self.config, self.parameters_by_part()
        return 6 * (parts["blocks"] + parts["head"]) + 12 * c.n_layers * c.d_model * c.seq_len

    def decay_groups(self, weight_decay: float, decay_splines: bool = False) -> list[dict]:
        """AdamW's groups: matrices decay; norms, codebooks and splines do not.

        A spline is neutral at 1, not at 0: decayed by 10 % each, a product of 128 of them vanishes (1e-6).
        """
        spared = ("norm",) if decay_splines else ("norm", "codebooks", "splines")
        decays = lambda name, p: p.ndim >= 2 and not any(part in name for part in spared)      # noqa: E731
        named = list(self.named_parameters())
        return [dict(params=[p for name, p in named if decays(name, p)], weight_decay=weight_decay),
                dict(params=[p for name, p in named if not decays(name, p)], weight_decay=0.0)]

    @classmethod
    def from_checkpoint(cls, path, device="cpu") -> "LanguageModel":
        """The model in a checkpoint, or in the newest checkpoint of a run's folder. Raises InputError."""
        folder = newest_checkpoint(path)
        about = read_json(folder / "config.json")
        try:
            config = Config(**about["config"])
        except (KeyError, TypeError, InputError) as error:
            raise InputError(f"{folder / 'config.json'} does not describe a model ({error})") from error
        weights = load_tensors(folder / "model.pt")
        differ = f"{folder / 'model.pt'} is of another configuration than config.json beside it"
        if config.n_layers > len(weights):
            raise InputError(f"{differ}: {config.n_layers:,} layers do not fit into {len(weights)} tensors")
        try:
            with torch.device("meta"):          # takes no memory: a config may claim any size
                expected = cls(config).state_dict()
        except RuntimeError as error:           # of more than 2^63 numbers
            raise InputError(f"{folder / 'config.json'} does not describe a model ({error})") from error
        check_tensors(weights, expected, differ)
        model = cls(config).to(weights["lm_head.weight"].dtype)
        ours, theirs = type(model.embed_tokens).__name__, about.get("embedding")
        if theirs not in (None, ours):
            raise InputError(f"{folder} was trained with {theirs} in the place of {ours}: load it where leviathan.TokenGenerator "
                             "is that class")
        model.load_state_dict(weights)
        return model.to(device)


def initialise(module: nn.Module, seed: int) -> None:
    """Every parameter's start, drawn from a stream of its own by (seed, name): so twins share what they have in common.

        parameter                        mean  standard deviation
        table, head, q k v gate up        0    0.02
        o_proj, down_proj                 0    0.02 / sqrt(2 L): the residual stream's scale does not grow with depth
        norms (weight, bias)             1, 0  0
        codebooks                         0    0.02, whose scale the LayerNorm removes
        seed_proj                         0    1 / sqrt(d_seed)
        splines                           1    0.1, for products of log-standard-deviation 0.85 [R]
        mode_proj, residual_proj          0    so that embeddings start at 0.02, half of the variance from each;
                                               paper: 1 / sqrt(fan_in), Flax's default [R]
    """
    generator = next((m for m in module.modules() if isinstance(m, TokenGenerator)), None)
    depth = len(getattr(module, "layers", [])) or 1
    names = {p: name for name, p in module.named_parameters(remove_duplicate=False)}    # tied: the head's name is last
    for p, name in names.items():
        leaf, mean, std = name.removesuffix(".weight").rpartition(".")[2], 0.0, 0.02
        if leaf in ("o_proj", "down_proj"):
            std = 0.02 / math.sqrt(2 * depth)
        elif "norm" in leaf:
            mean, std = float(not leaf.endswith("bias")), 0.0
        elif leaf == "splines":
            mean, std = 1.0, 0.1
        elif leaf == "seed_proj" or leaf in ("mode_proj", "residual_proj") and generator.config.paper:
            std = p.shape[-1] ** -0.5
        elif leaf in ("mode_proj", "residual_proj"):
            share = math.sqrt(0.5) if generator.residual_proj is not None else 1.0
            spread = 1.0 if leaf == "mode_proj" else 0.21           # of modes and of sigmoid(N(0, 1)), at the start
            std = 0.02 * share / (spread * math.sqrt(p.shape[-1]))
        if not p.is_meta:
            stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name.removeprefix('embed_tokens.')}".encode()))
            p.data.copy_(torch.empty(p.shape).normal_(mean, std, generator=stream))


def isoparametric_depth(config: Config) -> int:
    """Leviathan's depth at which it is as large as the untied dense twin of `config`, rounded down [P; floor R]."""
    with torch.device("meta"):
        ours, twin = (LanguageModel(replace(config, model=m)).parameters_by_part() for m in ("leviathan", "dense-untied"))
        block = sum(p.numel() for p in Block(config).parameters())
    return config.n_layers + max(0, twin["table"] - ours["generator"]) // block
