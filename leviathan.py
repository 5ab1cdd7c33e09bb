"""Leviathan: a LLaMA-style language model that computes its input embeddings instead of looking them up.

    Batley and Saha, "A Separable Architecture for Continuous Token Representation in Language Models",
    arXiv 2601.22040. v1 (January 2026) is what stands here by default; v2 (May 2026) calls the generator LEV.

An ordinary model keeps a table with one row for each of its V tokens. Leviathan computes the row of token i:

    z = Σ_j C_j[i_j]                       its base-b digits i_j choose rows of k codebooks   `seeds`
    ẑ = σ(LN(W_seed z))                    a point in the unit cube: where the token lives    `coordinates`
    e = Σ_m W_m Π_d φ_md(ẑ_d) + W_res ẑ    products of learned curves: what is found there    `surface`

`TokenGenerator.rows` is these three lines, centred (see `surface`); `forward` the same, but fast. Behind it
comes Llama, with its parameters' names. `Config.model` chooses the dense twins, of another embedding.

Marks: [P] the paper says so, [R] reconstructed from its numbers or from later code, [O] our own choice.
    V  vocab_size  size of the vocabulary        κ  n_knots     knots of a spline
    D  d_model     width of the model            M  n_modes     modes ("h" in v2)
    k  n_coords    digits of an address          r  mode_width  products side by side in each mode
    b  base        smallest with b^k >= V        C  codebooks   k of b rows; S: the splines' coefficients
       d_seed      dimensions of z and ẑ         N, U           ids of any shape; the distinct among them
    H  n_heads     attention heads               B, T           sequences; positions in each
"""
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """The shape of a model. Raises ValueError where it is none."""
    model: str = "leviathan"        # leviathan [P], dense (tied table [P]) or dense-untied [R]
    vocab_size: int = 200_019       # V: the tokenizer's; o200k_base has this, the paper 200,376 [P]
    seq_len: int = 512              # T: the longest context
    d_model: int = 256              # D: width
    n_layers: int = 6               # blocks of 16 D² parameters each [R]
    n_heads: int | None = None      # H: D / 64 if left out [O]
    generator: str = "v1"           # the method as of January, v1, or as of May, lev
    n_coords: int = 3               # k: digits of a token's address [P]
    base: int | None = None         # b: the smallest with b^k >= V if left out [P]
    d_seed: int = 128               # dimensions of seed and point, factors of every product [P]
    n_knots: int | None = None      # κ: the generator's own if left out, 32 for v1 [P], 16 for lev [R]
    n_modes: int = 8                # M: modes [P]
    mode_width: int = 64            # r: products in each mode; 64 fits the paper's sizes [R]
    centred: bool = True            # subtract what modes and points have in common; start at 0.02 [O]

    def __post_init__(self):
        for name, known in (("model", ("leviathan", "dense", "dense-untied")), ("generator", GENERATORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}")
        for field in fields(self):
            name, value, number = field.name, getattr(self, field.name), field.type in (int, int | None)
            most = dict(n_coords=62, n_modes=4_096, seq_len=2**20, n_layers=2**14).get(name, 2**31 - 1)
            if number and value is not field.default and not (type(value) is int and 1 <= value <= most):
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 to {most:,}")
        self.n_heads = self.n_heads or max(1, self.d_model // 64)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads}")


# ---- the method ----------------------------------------------------------------------------------------

def smallest_base(vocab_size: int, n_coords: int) -> int:
    """The smallest b with b^k >= V, in integers: ceil(V ** (1/k)) errs where V is an exact power [P]."""
    return next(base for base in count(int(vocab_size ** (1 / n_coords))) if base**n_coords >= vocab_size)


def digits(addresses, base: int, n_coords: int):
    """Base-b digits of each address, the most significant first [P]. (U) -> (U, k)"""
    powers = base ** torch.arange(n_coords - 1, -1, -1, device=addresses.device)
    return addresses.unsqueeze(-1) // powers % base


def spline_basis(x, n_knots: int):
    """Quadratic B-splines on equally spaced knots of [0, 1], made to sum to 1 [R]. (...) -> (..., κ)

    At t knot spacings from its knot, B = 3/4 - t² for t < 1/2, (3/2 - t)² / 2 for t < 3/2, else 0. So three
    at most are not zero: that of the nearest knot, at signed distance u, and those of its neighbours.
    """
    position = x * (n_knots - 1)
    nearest = position.detach().round().clamp(0, n_knots - 1)
    u = position - nearest                                                      # in [-1/2, 1/2]
    left = torch.where(nearest > 0, (0.5 - u).square() / 2, 0)                  # no knot lies beyond an end
    right = torch.where(nearest < n_knots - 1, (0.5 + u).square() / 2, 0)
    middle = 0.75 - u.square()
    three = torch.stack([left, middle, right], dim=-1) / (left + middle + right).unsqueeze(-1)
    knots = nearest.long().unsqueeze(-1) + torch.arange(-1, 2, device=x.device)             # (..., 3)
    return three.new_zeros(*x.shape, n_knots).scatter_add(-1, knots.clamp(0, n_knots - 1), three)


def product_tree(factors):
    """Product over the first dimension, in pairs: its gradient is right at 0 too. (n, ...) -> (...)"""
    while len(factors) > 1:
        first, second, *odd = factors.split(len(factors) // 2)
        factors = torch.cat([first * second, *odd]) if odd else first * second
    return factors[0]


class Modes(nn.Module):
    """Products Π_d φ_d(x_d) of learned curves φ_d = Σ_n B_n S_dn [P]. (U, d_seed) -> (U, columns)

    Columns: M r, all modes side by side, for v1; r, those of one mode, for lev.
    `splines` holds S - 1 [O]: so 0 is neutral, and bfloat16, whose steps near 1 are 1/128, can train it.
    Factors are float32 at least: the errors of 128 in bfloat16 would add up to 2 %.
    """
    def __init__(self, d_seed: int, n_knots: int, columns: int):
        super().__init__()
        self.splines = nn.Parameter(torch.empty(d_seed, n_knots, columns))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        basis = spline_basis(x.T.to(wide), self.splines.shape[1])               # (d_seed, U, κ)
        curves = basis @ (self.splines.to(wide) + 1)                            # (d_seed, U, columns)
        return product_tree(curves).to(x.dtype)


class TokenGenerator(nn.Module):
    """Computes token embeddings; stands wherever `nn.Embedding(vocab_size, d_model)` does. Settings: Config.

    The January version. Where the paper leaves a choice ours is [R]: the residual acts on ẑ (W_seed z would
    fit too); "M modes summed and projected" is Σ_m W_m mode_m, as in v2; LayerNorm's eps is torch's, 1e-5.

    centred [O]: modes start around 1 and points around 1/2, which all embeddings share (cosines of 0.6; 0.03
    without). So both are subtracted, and embeddings start at 0.02. Uncentred: as written, at Flax's scale.
    addresses, a buffer: the digits of token i are those of addresses[i] < b^k: i itself [P], or as loaded.
    """
    N_KNOTS = 32
    CPU, GPU = 2**22, 2**29                             # values of φ at once: 16 MB, that cache holds; 2 GB

    def __init__(self, vocab_size: int, d_model: int, *, n_coords: int = 3, base: int | None = None,
                 d_seed: int = 128, n_knots: int | None = None, n_modes: int = 8, mode_width: int = 64,
                 centred: bool = True, seed: int = 0):
        super().__init__()
        if min(n_coords, d_seed - 1, n_modes, mode_width) < 1:        # of one number LayerNorm makes 0
            raise ValueError("n_coords, n_modes and mode_width must be at least 1, d_seed 2")
        self.num_embeddings, self.embedding_dim = vocab_size, d_model           # as nn.Embedding calls them
        self.n_coords, self.base = n_coords, smallest_base(vocab_size, n_coords) if base is None else base
        self.d_seed, self.n_knots = d_seed, self.N_KNOTS if n_knots is None else n_knots
        self.n_modes, self.mode_width, self.centred = n_modes, mode_width, centred
        if not vocab_size <= self.base**n_coords < 2**63:
            raise ValueError(f"{n_coords} digits of base {self.base} cannot number {vocab_size:,} tokens")
        if self.n_knots < 3:
            raise ValueError(f"n_knots is {self.n_knots}: a quadratic spline needs 3")
        self.register_buffer("addresses", torch.empty(vocab_size, dtype=torch.long))
        self.codebooks = nn.Parameter(torch.empty(n_coords, self.base, d_seed))     # C
        self.seed_proj = nn.Linear(d_seed, d_seed, bias=False)                      # W_seed
        self.seed_norm = nn.LayerNorm(d_seed)
        self.modes = Modes(d_seed, self.n_knots, n_modes * mode_width)
        self.mode_proj = nn.Linear(n_modes * mode_width, d_model, bias=False)       # W_1 ... W_M
        self.residual_proj = nn.Linear(d_seed, d_model, bias=False)                 # W_res
        initialise(self, seed)

    def seeds(self, ids):
        """Mechanism 1: z = Σ_j C_j[i_j] [P]. (U) -> (U, d_seed)"""
        chosen = digits(self.addresses.index_select(0, ids.long()), self.base, self.n_coords)
        return sum(F.embedding(digit, codebook) for digit, codebook in zip(chosen.T, self.codebooks))

    def coordinates(self, z):
        """ẑ = σ(LN(W_seed z)), in (0, 1) [P]. (U, d_seed) -> (U, d_seed)"""
        return torch.sigmoid(self.seed_norm(self.seed_proj(z)))

    def surface(self, x):
        """Mechanism 2, Eq. 3: e = Σ_m W_m Π_d φ_md(ẑ_d) + W_res ẑ [P]. (U, d_seed) -> (U, D)

        Centred [O]: e = Σ_m W_m (Π_d φ_md(ẑ_d) - 1) + W_res (ẑ - 1/2).
        """
        centre = 1 if self.centred else 0
        return self.mode_proj(self.modes(x) - centre) + self.residual_proj(x - centre / 2)

    def rows(self, ids):
        """The method. (U) -> (U, D)"""
        return self.surface(self.coordinates(self.seeds(ids)))

    def forward(self, ids):
        """The same, fast [O]: each distinct id once, in chunks that backward computes again. (N) -> (N, D)

        Autocast is off inside. Raises TypeError unless ids are integers, IndexError beyond V. Backward of
        many chunks reads the module's own parameters, so that torch.func.functional_call would get wrong
        gradients: for that make a module whose forward is `rows`.
        """
        if ids.dtype == torch.bool or ids.is_floating_point():
            raise TypeError(f"ids are of type {ids.dtype}: they must be integers")
        distinct, inverse = ids.unique(return_inverse=True)
        values = self.d_seed * self.n_modes * self.mode_width                   # of φ for an id
        chunks = distinct.split(max(32, (self.CPU if ids.is_cpu else self.GPU) // values))
        with torch.autocast(ids.device.type, enabled=False):
            rows = [checkpoint(self.rows, chunk, use_reentrant=False) if len(chunks) > 1 else self.rows(chunk)
                    for chunk in chunks]
            return F.embedding(inverse, torch.cat(rows))

    @torch.no_grad()
    def table(self):
        """What `nn.Embedding` would hold. -> (V, D)"""
        return self(torch.arange(self.num_embeddings, device=self.addresses.device))


class LevGenerator(TokenGenerator):
    """LEV, the May version, as a difference: each mode has a W_seed and a LayerNorm, so a point, of its own
    [P]; half the sigmoid's argument [P, in part R]; 16 knots [R]; no residual [R: v2 names none]."""
    N_KNOTS = 16
    CPU = 2**23                                         # more, as modes come one by one

    def __init__(self, vocab_size: int, d_model: int, *, seed: int = 0, **settings):
        super().__init__(vocab_size, d_model, **settings)
        M, d = self.n_modes, self.d_seed
        self.seed_proj = nn.Linear(d, M * d, bias=False)
        self.seed_norm = nn.GroupNorm(M, M * d)                                 # a LayerNorm for each mode
        self.modes = nn.ModuleList(Modes(d, self.n_knots, self.mode_width) for mode in range(M))
        self.residual_proj = None
        initialise(self, seed)                      # again, for what is new here

    def coordinates(self, z):
        """ẑ_m = σ(LN_m(W_seed,m z) / 2). (U, d_seed) -> (U, M, d_seed)"""
        return torch.sigmoid(self.seed_norm(self.seed_proj(z)) / 2).unflatten(-1, (-1, self.d_seed))

    def surface(self, x):
        """e = Σ_m W_m Π_d φ_md(ẑ_md). (U, M, d_seed) -> (U, D)"""
        modes = torch.cat([mode(point) for mode, point in zip(self.modes, x.unbind(1))], dim=-1)
        return self.mode_proj(modes - (1 if self.centred else 0))


GENERATORS = {"v1": TokenGenerator, "lev": LevGenerator}


# ---- the decoder: Llama, parameter by parameter --------------------------------------------------------

def rotate(x, start: int):
    """Turn the pairs (x_j, x_{j + d/2}) by the angles of positions start, start + 1 ... (B, H, T, d)

    Angles are made when needed, in float32: a buffer would follow the model's dtype, and be empty on "meta".
    """
    T, d = x.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    positions = torch.arange(start, start + T, dtype=torch.float32, device=x.device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)                   # (T, d)
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(x.dtype)


class Block(nn.Module):
    """Causal attention with rotary positions; SwiGLU of three D x 4D matrices [R]. (B, T, D) -> (B, T, D)

    `cache`, for sampling: this layer's KeyValues of sample.py, whose positions x follow.
    """
    def __init__(self, config: Config):
        super().__init__()
        D, self.n_heads = config.d_model, config.n_heads
        self.input_layernorm = nn.RMSNorm(D, eps=1e-6)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(D, D, bias=False) for name in "qkvo"})
        self.post_attention_layernorm = nn.RMSNorm(D, eps=1e-6)
        self.mlp = nn.ModuleDict({f"{name}_proj": nn.Linear(D, 4 * D, bias=False) for name in ("gate", "up")})
        self.mlp["down_proj"] = nn.Linear(4 * D, D, bias=False)

    def forward(self, x, cache=None):
        attn, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attn[name](h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)          # (B, H, T, d)
                   for name in ("q_proj", "k_proj", "v_proj"))
        start = cache.length if cache else 0
        q, k = rotate(q, start), rotate(k, start)
        if cache:
            k, v = cache.append(k, v)                                           # of all positions so far
        T, P = q.shape[2], k.shape[2]
        mask = torch.ones(T, P, dtype=torch.bool, device=x.device).tril(P - T) if 1 < T < P else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == P)
        x = x + attn["o_proj"](y.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class LanguageModel(nn.Module):
    """Leviathan or a twin: `dense` ties its table to the head (iso-body [P]), `dense-untied` has both
    (isoparametric [R]). With the same seed all start with bit-identical blocks and heads."""
    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        self.config = c = config
        if c.model == "leviathan":
            self.embed_tokens = GENERATORS[c.generator](
                c.vocab_size, c.d_model, n_coords=c.n_coords, base=c.base, d_seed=c.d_seed, n_knots=c.n_knots,
                n_modes=c.n_modes, mode_width=c.mode_width, centred=c.centred, seed=seed)
        else:
            self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(Block(c) for layer in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.softmax = softmax_                                                 # which train.py may compile
        self.tie()
        initialise(self, seed)

    def tie(self):
        if self.config.model == "dense":
            self.embed_tokens.weight = self.lm_head.weight

    def forward(self, ids, targets=None):
        """Logits of the next token, or the mean loss of `targets` if given. (B, T) -> (B, T, V) or scalar"""
        if ids.shape[1] > self.config.seq_len:
            raise ValueError(f"{ids.shape[1]} tokens exceed the model's seq_len of {self.config.seq_len}")
        x, head = self.hidden(self.embed_tokens(ids)), self.lm_head             # (B, T, D)
        changed = (type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head) or any(
            (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)))
        if targets is None or changed:                                          # by LoRA, quantisation ...
            logits, wide = head(x), torch.promote_types(x.dtype, torch.float32)
            return logits if targets is None else F.cross_entropy(logits.mT.to(wide), targets)
        return linear_cross_entropy(x, head.weight, targets, self.softmax)

    def hidden(self, x, caches=None):
        """The decoder between embedding and head. `caches`: what each layer has seen before x. (B, T, D)"""
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x = layer(x, cache)
        return self.norm(x)

    def materialize(self) -> "LanguageModel":
        """For inference: put the table that the generator makes in its place, for good. The model then is its
        untied twin, at that one's cost; its parameters are frozen, for training on would train a table."""
        if self.config.model == "leviathan":
            self.embed_tokens = nn.Embedding.from_pretrained(self.embed_tokens.table())
            self.config = replace(self.config, model="dense-untied")
        return self.eval().requires_grad_(False)

    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters stand where; a tied table is counted in the head."""
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}
        embedding = 0 if self.config.model == "dense" else sizes["embed_tokens"]
        return {"embedding": embedding, "blocks": sizes["layers"] + sizes["norm"], "head": sizes["lm_head"]}

    def decay_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's groups: matrices decay; norms, codebooks and splines do not [O]."""
        groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
        for name, p in self.named_parameters():
            groups[p.ndim < 2 or name.endswith(("codebooks", "splines"))]["params"].append(p)     # True is 1
        return groups


def initialise(module: nn.Module, seed: int) -> None:
    """Every parameter's start [O], from a random stream of its own by (seed, name): so twins start alike.

        parameter                     standard deviation, around 0
        table, head, q k v gate up    0.02
        o_proj, down_proj             0.02 / sqrt(2 L): the residual stream's scale does not grow with depth
        codebooks, seed_proj          1: LayerNorm removes their scale; it only sets their pace, since Adam
                                      moves every number by about the rate. 0.02 is far too fast
        splines, which are S - 1      0.1, for products of log-standard-deviation 0.85 [R]
        mode_proj, residual_proj      so that embeddings start at 0.02, half of the variance from each;
                                      uncentred: 1 / sqrt(fan_in), Flax's default [R]
        norms, and all that is no matrix: none, they start as they were built
    """
    generator = next((m for m in module.modules() if isinstance(m, TokenGenerator)), None)
    if generator is not None:
        generator.addresses.copy_(torch.arange(generator.num_embeddings, device="cpu"))     # the ids
    share = 0.02 if generator is None or generator.residual_proj is None else 0.02 * math.sqrt(0.5)
    deep = 0.02 / math.sqrt(2 * len(getattr(module, "layers", [0])))            # a generator alone has none
    names = {p: name for name, p in module.named_parameters(remove_duplicate=False)}    # tied: the head's
    for p, name in names.items():
        if p.ndim < 2 or p.is_meta:
            continue
        leaf, flax = name.removesuffix(".weight").rpartition(".")[2], p.shape[-1] ** -0.5
        std = dict(o_proj=deep, down_proj=deep, splines=0.1, codebooks=1, seed_proj=1, mode_proj=share * flax,
                   residual_proj=share * flax / 0.21).get(leaf, 0.02)           # 0.21: the spread of ẑ
        if leaf in ("mode_proj", "residual_proj") and not generator.centred:
            std = flax
        stream = zlib.crc32(f"{seed} {name.removeprefix('embed_tokens.')}".encode())
        noise = torch.empty(p.shape, dtype=torch.float32, device="cpu")         # whatever the default is
        p.data.copy_(noise.normal_(0, std, generator=torch.Generator().manual_seed(stream)))


def isoparametric_depth(config: Config) -> int:
    """Mechanism 3: the depth that makes a model as large as its untied twin, rounded down [P; floor R].

    What a generator saves buys depth; so does what tying saves, and that is the control for it [O].
    """
    with torch.device("meta"):
        embedding = LanguageModel(config).parameters_by_part()["embedding"]
        block = sum(p.numel() for p in Block(config).parameters())
    return config.n_layers + max(0, config.vocab_size * config.d_model - embedding) // block


# ---- the loss, whose logits are the largest thing in a training step [O] -------------------------------

LOGITS_AT_ONCE = {"cpu": 2**10, "other": 5 * 2**10}       # bytes a column: 512 and 2,560 rows of bfloat16


def softmax_(logits):
    """Rows of logits become their softmax. (n, V) -> their logsumexp (n, 1)"""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = x.amax(1, keepdim=True)
    x -= largest                                # in place, step by step: new memory is slow to come
    total = x.exp_().sum(1, keepdim=True)
    logits.copy_(x.div_(total))
    return largest + total.log()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`, of which only a chunk of rows ever exists.

    The loss is a sum over tokens, so gradients are formed at once, while a chunk's logits are at hand.
    Products are in autocast's dtype; softmax, loss and the weight's gradient are float32 at least.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, softmax):                         # (N, D), (V, D), (N)
        kind, V = hidden.device.type, len(weight)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide, w = torch.promote_types(dtype, torch.float32), weight.to(dtype)
        if kind != "cpu":                                   # a GPU wants rows of whole lines of memory
            w = F.pad(w, (0, 0, 0, -V % 64))
        chunk = LOGITS_AT_ONCE.get(kind, LOGITS_AT_ONCE["other"]) // w.element_size()       # rows of logits
        block = 8 if kind == "cpu" else 512         # of softmax: they fit a CPU's cache, a GPU's memory
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(w, dtype=wide)
        loss, buffer = w.new_zeros((), dtype=wide), w.new_empty(min(chunk, len(hidden)), len(w))
        for start in range(0, len(hidden), chunk):
            x, target = hidden[start:start + chunk].to(dtype), targets[start:start + chunk].unsqueeze(1)
            logits = torch.mm(x, w.T, out=buffer[:len(x)])                      # (chunk, V), filled up
            logits[:, V:] = -torch.inf
            own = logits[:, :V].gather(1, target).to(wide)      # not in softmax: torch 2.11 miscompiles it
            log_p = own - torch.cat([softmax(rows) for rows in logits.split(block)])
            loss -= log_p.sum()
            each = torch.arange(len(x), device=x.device).unsqueeze(1)           # scatter_ would be slow
            logits[each, target] = log_p.expm1().to(dtype)      # p - 1: the gradient of logits stands there
            if any(ctx.needs_input_grad):
                grad_hidden[start:start + chunk] = logits @ w
            if ctx.needs_input_grad[1]:                                         # a frozen head does not
                grad_weight.addmm_(logits.T, x) if dtype == wide else grad_weight.add_(logits.T @ x)
        ctx.grads = grad_hidden, grad_weight[:V]
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.grads is None or torch.is_grad_enabled():    # they are scaled in place, and have no graph
            raise RuntimeError("linear_cross_entropy goes backward once, and not with create_graph=True")
        grads, ctx.grads = ctx.grads, None
        return *(grad.mul_((grad_loss / len(grads[0])).to(grad.dtype)) for grad in grads), None, None


@torch.compiler.disable      # there is nothing to fuse across it
def linear_cross_entropy(hidden, weight, targets, softmax=softmax_):
    """Mean of -log softmax(hidden @ weight.T)[target]. (..., D), (V, D), (...) -> scalar, float32 at least"""
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden states {tuple(hidden.shape)}")
    if not torch.is_grad_enabled():         # of which needs_input_grad knows nothing
        hidden, weight = hidden.detach(), weight.detach()
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), softmax)


# ---- checkpoints, which train.py writes -----------------------------------------------------------------

def newest_checkpoint(path) -> Path:
    """The folder if it is a checkpoint, else the newest step-00000042 in it. Raises ValueError if none is."""
    found = (folder for folder in Path(path).glob("step-" + 8 * "[0-9]") if folder.is_dir())
    newest = max(found, default=Path(path))                                     # other names are a user's
    if not (newest / "model.pt").exists():
        raise ValueError(f"no checkpoint in {path}: name a folder that train.py has written")
    return newest


def load_tensors(path):
    """What torch.save wrote, without running code from it. Raises ValueError where a checksum differs."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():                          # torch looks at no checksum
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):                                      # which say what is wrong
        raise
    except Exception as error:                                                  # of any type, says torch
        reason = " ".join(str(error).split())[:300]
        if "allocate memory" in reason:
            raise MemoryError(f"{path} does not fit: {reason}") from error
        raise ValueError(f"{path} is missing or damaged ({reason}): take another checkpoint") from error


def load(path, device="cpu") -> LanguageModel:
    """The model of a checkpoint, or of the newest checkpoint in a run's folder. Raises ValueError."""
    folder = newest_checkpoint(path)
    weights = load_tensors(folder / "model.pt")
    try:
        config = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"])
        config.n_layers = min(config.n_layers, len(weights))                # which a damaged file may claim
        with torch.device("meta"):                                          # where sizes take no memory
            model = LanguageModel(config)
        model.load_state_dict(weights, assign=True)
        model.tie()
        with torch.no_grad():
            if not model(torch.zeros(1, 1, dtype=torch.long)).isfinite().all():     # whatever its tensors are
                raise ValueError("its logits are not finite")
    except Exception as error:                                              # of JSON, of Config, of shapes
        raise ValueError(f"{folder} holds no whole model ({' '.join(str(error).split())[:300]})") from error
    return model.to(device)
