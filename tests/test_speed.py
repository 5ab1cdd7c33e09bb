"""Every fast path equals the slow one; what materialize() promises; bench.py at a tiny size."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import bench
from common import InputError
from leviathan import Config, LanguageModel, TokenGenerator
from test_leviathan import TINY, loopback_works, slow_generator, tiny_generator

HERE = Path(__file__).parent.parent
ID_LISTS = {"one": [5], "repeated": [7, 96, 7, 0, 7], "all": list(range(97)), "none": []}


def rough(g: TokenGenerator) -> TokenGenerator:
    """Splines of both signs, some factors exactly 0 whatever the coordinate."""
    with torch.no_grad():
        g.splines.normal_(0, 1, generator=torch.Generator().manual_seed(0))
        g.splines[2, :, :, 0] = 0
    return g


def values_and_gradients(g, ids, compute=None, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        e = g(ids) if compute is None else compute(ids)
    weights = torch.linspace(-1, 1, e.numel()).bfloat16().to(e.dtype).view(e.shape)     # the same in every precision
    return e.detach(), *torch.autograd.grad((e * weights).sum(), list(g.parameters()))


@pytest.mark.parametrize("ids", ID_LISTS.values(), ids=ID_LISTS)
@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_any_ids_and_factors_of_any_sign(generator, ids):
    """In float64, where only the order of operations differs."""
    g, ids = rough(tiny_generator(generator=generator)), torch.tensor(ids, dtype=torch.long)
    fast = values_and_gradients(g, ids)
    if not len(ids):
        assert fast[0].shape == (0, 8) and not any(gradient.any() for gradient in fast[1:])
        return
    for a, b in zip(fast, values_and_gradients(g, ids, lambda ids: slow_generator(g, ids))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_modes_at_knots_half_knots_and_both_ends(dtype, rtol):
    """Where the nearest knot changes, and where knots are missing. A factor errs by a few eps, a product of 12 by 12 times that."""
    g = rough(tiny_generator(generator="lev", n_knots=5)).to(dtype)
    places = torch.tensor([i / 8 for i in range(9)] + [1e-9, 1 - 1e-9, 0.3], dtype=dtype)
    latent = places[torch.randint(len(places), (40, 2, 12), generator=torch.Generator().manual_seed(0))]
    dense = latent.double().requires_grad_()
    t = (dense.unsqueeze(-1) - torch.linspace(0, 1, 5, dtype=torch.float64)).abs() * 4
    B = torch.where(t < 0.5, 0.75 - t**2, torch.where(t < 1.5, (1.5 - t)**2 / 2, 0))
    slow = torch.einsum("updn,dpnc->updc", B / B.sum(-1, keepdim=True), g.splines.double()).prod(2).flatten(1)
    fast = g.modes(latent.requires_grad_())
    slope = torch.randn(slow.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (fast_latent, fast_splines), (slow_latent, slow_splines) = (
        torch.autograd.grad((modes.double() * slope).sum(), [leaf, g.splines]) for modes, leaf in ((fast, latent), (slow, dense)))
    for a, b in [(fast, slow), (fast_latent, slow_latent), (fast_splines, slow_splines)]:
        torch.testing.assert_close(a.double(), b.double(), rtol=10 * rtol, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_low_precision_costs_one_rounding(generator):
    """Parameters of bfloat16: the method runs in float32, and only results are rounded, to 8 bits. Autocast: not even these."""
    g, ids = rough(tiny_generator(generator=generator)), torch.arange(97)
    g.bfloat16()
    low = values_and_gradients(g, ids)
    exact = values_and_gradients(g.double(), ids, lambda ids: slow_generator(g, ids))
    assert all(x.dtype == torch.bfloat16 for x in low)
    for a, b in zip(low, exact):
        assert (a.double() - b).norm() < 2**-8 * b.norm()
    single = values_and_gradients(g.float(), ids)
    for a, b in zip(values_and_gradients(g, ids, autocast=True), single):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_compiled_generator(generator):
    """With as many distinct ids as it comes: one compilation must do for all, or training would compile without end."""
    g = rough(tiny_generator(generator=generator))
    compiled = torch.compile(g)
    for n in (5, 31, 97, 1):
        ids = torch.arange(97)[:n].repeat(2)
        for a, b in zip(values_and_gradients(g, ids, compiled), values_and_gradients(g, ids)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_a_gpu_computes_the_same_and_is_waited_for_once(generator):
    """In float64; and of a micro-batch only the number of distinct ids comes back to the host."""
    model = LanguageModel(Config(**TINY | dict(generator=generator))).double()
    ids = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(0))
    model(ids[:, :-1], ids[:, 1:]).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model, ids = model.cuda(), ids.cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids[:, :-1], ids[:, 1:]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1
    for a, p in zip(expected, model.parameters()):
        torch.testing.assert_close(p.grad.cpu(), a, rtol=1e-9, atol=1e-12)


def gradients_of_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = LanguageModel(Config(**TINY)).double()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    batches = torch.randint(97, (4, 3, 17), generator=torch.Generator().manual_seed(0))[rank::2]
    with wrapped.no_sync():
        (wrapped(batches[0, :, :-1], batches[0, :, 1:]) / 2).backward()
    (wrapped(batches[1, :, :-1], batches[1, :, 1:]) / 2).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    del wrapped         # as in train.py
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not loopback_works(), reason="ranks talk over 127.0.0.1, which is not reachable here")
def test_ranks_with_other_ids_and_accumulation(tmp_path, monkeypatch):
    """Two ranks of two micro-batches each, all of different ids, have the gradients of one batch of all, in float64."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(gradients_of_rank, (str(tmp_path),), nprocs=2)
    model = LanguageModel(Config(**TINY)).double()
    batches = torch.randint(97, (4, 3, 17), generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    model(batches[:, :-1], batches[:, 1:]).backward()
    for rank in (0, 1):
        for a, p in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters()):
            torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("twin", [dict(generator="v1"), dict(generator="lev"), dict(model="dense")], ids=str)
def test_materialized_is_the_untied_twin(twin):
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (2, 16))
    before = model(ids).detach()
    assert model.materialize() is model
    torch.testing.assert_close(model(ids), before, rtol=1e-12, atol=1e-14)
    if model.config.model == "dense":       # had a table already, and can still be trained
        model(ids, ids).backward()
        return
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    dense = LanguageModel(model.config).double()
    assert dense.config.model == "dense-untied" and dense.parameters_by_part() == model.parameters_by_part()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense(ids), before, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert model.train()(ids, ids).isfinite()
    for training, targets in ((True, None), (False, ids)):
        with pytest.raises(InputError, match="a materialized model has lost its generator"):
            model.train(training)(ids, targets)


# ---- bench.py --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_the_plain_generator_is_the_same_method(generator):
    """What the bench calls plain must compute the same, or the comparison means nothing."""
    g = rough(tiny_generator(generator=generator))
    plain = bench.PlainGenerator(97, 8, generator, d_seed=12, mode_width=3, n_modes=2).double()
    plain.load_state_dict(g.state_dict())
    ids = torch.tensor([[3, 96, 3], [0, 41, 3]])
    for a, b in zip(values_and_gradients(g, ids), values_and_gradients(plain, ids)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bench_speed(tmp_path):
    small = "--vocab-size 300 --tokens 64 --seq-len 32 --shapes 32x1 --rounds 1 --device cpu --sections models pieces".split()
    command = [sys.executable, HERE / "bench.py", "speed", *small, "--json", tmp_path / "rows.json", "--plots", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    models = {row["name"]: row for row in rows if row["section"] == "models"}
    assert set(bench.MODELS) - {"hf-llama"} <= set(models)
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 2**20
        assert (row["generator"] is None) == (row["mode_width"] is None)
    assert models["dense"]["generator"] is None and models["leviathan lev, width 64"]["generator"] == "lev"
    assert models["dense"]["parameters"] == {"table": 0, "blocks": 16 * 32**2 + 3 * 32, "head": 300 * 32}
    assert all(f"| {name} |" in done.stdout for name in models)
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_bench_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "POINT", dict(tokens=64, vocab_size=300, mode_width=2, d_model=16))
    monkeypatch.setattr(bench, "GROWTH", dict(tokens=[64, 128], vocab_size=[300], mode_width=[2], d_model=[16]))
    flags = "--sections growth --seq-len 32 --rounds 1 --device cpu".split()
    files = ["--json", str(tmp_path / "rows.json"), "--plots", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", "speed", *flags, *files])
    bench.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * len(bench.EMBEDDINGS) and {row["tokens"] for row in rows} == {64, 128}
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, message", [
    (["--tokens", "100"], "--tokens 100 must be a multiple of --seq-len 512"),
    (["--shapes", "256"], "--shapes 256: write width x layers, like 256x6"),
    (["--shapes", "250x6"], "d_model 250 is not divisible by n_heads 3"),
    (["--json", "nowhere/rows.json"], "--json nowhere.rows.json: there is no folder nowhere"),
    (["--device", "cuda:7"], "--device cuda:7: there is none here"),
])
def test_bench_refuses(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "speed", *flags])
    with pytest.raises(InputError, match=message):
        bench.main()
