"""bench.py and lab.growth at tiny sizes; who takes turns, what is timed, who is left out."""
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import train
from budgets import ROOT
from lab import growth
from leviathan import Config, TokenGenerator

TINY = "--vocab-size 300 --tokens 64 --seq-len 32 --shape 32x1 --rounds 1".split()
CPU = torch.device("cpu")


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def refused(done, *words) -> bool:
    """One line on standard error, exit status 1."""
    line, *others = done.stderr.splitlines()
    return done.returncode == 1 and not others and all(word in line for word in words)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(bench, "TURN_SECONDS", 0)


# ---- end to end --------------------------------------------------------------------------------------------

def test_bench(tmp_path):
    """A row for each model, in which the parts of a step add up; a figure; and neither is overwritten."""
    command = ["bench.py", *TINY, "--device", "cpu", "--no-compile", "--sections", "models",
               "--json", tmp_path / "rows.json", "--plot", tmp_path / "models.png"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    more = [", bfloat16"] * train.multiplies_bfloat16(CPU)
    expected = {name + also for name in bench.MODELS for also in ["", *more]} - {"hf-llama, bfloat16"}
    assert expected - {"hf-llama"} <= rows.keys() <= expected
    assert {row["dtype"] for name, row in rows.items() if "bfloat16" not in name} == {"float32"}
    assert ("hf-llama" in rows) == ("hf-llama is left out: ModuleNotFoundError" not in done.stdout)
    for name, row in rows.items():
        assert f"\n| {name} | {row['tokens_per_second']:,.0f} |" in done.stdout
        assert sum(row[part] for part in bench.PARTS) == pytest.approx(row["seconds"])
        assert min(row[part] for part in bench.PARTS) > 0 and row["rounds"] == [row["seconds"]]
        assert row["tokens_per_second"] == 64 / row["seconds"]
        assert 2**26 < row["peak_bytes"] < 2**33
    blocks = 16 * 32**2 + 3 * 32
    assert rows["dense"]["parameters"] == blocks + 300 * 32
    for name in {"dense-untied", "hf-llama"} & rows.keys():
        assert rows[name]["parameters"] == blocks + 2 * 300 * 32
    assert rows["leviathan lev, width 64"]["config"]["generator"] == "lev"
    assert rows["leviathan v1, width 64"]["embedding"] > 5 * rows["dense"]["embedding"]
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
    assert refused(run(*command), "bench.py: ", "rows.json is there already")


def test_pieces(monkeypatch, capsys, hurried):
    monkeypatch.setattr(bench, "PIECES", [("plain generator", "generator", "table"),
                                          ("plain head", "head", "compiled head")])
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, "--device", "cpu", "--sections", "pieces"])
    bench.main()
    printed = capsys.readouterr().out
    assert "to plain generator, float32 |" in printed and "to plain head, float32 |" in printed
    assert all(f"\n| {kind}, float32 | " in printed for kinds in bench.PIECES for kind in kinds)
    assert ("| head, bfloat16 | " in printed) == train.multiplies_bfloat16(CPU) and "left out" not in printed


@pytest.mark.skipif(not bench.CUDA, reason="needs a GPU")
def test_bench_on_a_gpu(tmp_path):
    done = run("bench.py", *TINY, "--no-compile", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows.keys() >= {*bench.MODELS, "generator, float32", "head, bfloat16"} - {"hf-llama"}
    assert rows["dense"]["dtype"] == "bfloat16"
    assert all(0 < row["seconds"] < 10 and 0 < row["peak_bytes"] < 2**31 for row in rows.values())


def test_growth(tmp_path, monkeypatch, capsys, hurried):
    """Three axes of two points each, of which they share one: four contests of four embeddings."""
    axes = dict(tokens=(1, 2), vocab_size=(1,), mode_width=(1, 1 / 64), d_model=(1, 2))
    monkeypatch.setattr(growth, "AXES", axes)
    flags = ("--axes tokens d_model mode_width --tokens 512 --vocab-size 300 --mode-width 2 --d-model 16 "
             "--rounds 1")
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "growth.png")]
    monkeypatch.setattr(sys, "argv", ["lab.growth", *flags.split(), "--device", "cpu", *files])
    growth.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["tokens"], r["config"]["d_model"]) for r in rows[:12:4]] == [(512, 16), (1024, 16), (512, 32)]
    assert [r["name"] for r in rows] == 4 * list(growth.EMBEDDINGS) and rows[3]["parameters"] == 300 * 16
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("v1, width 1 0.") == 4
    assert refused(run("-m", "lab.growth", *files), "lab.growth: ", "rows.json is there already")


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    """By bench.py of the first contest, by lab.growth of the first point."""
    def second_is_stopped(*_):
        if taken:
            raise KeyboardInterrupt
        taken.append(1)
        return [dict.fromkeys("seconds peak_bytes tokens_per_second first_step parameters".split(), 1)
                | dict(name="table", rounds=[1])]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png"), "--device", "cpu"]
    for script, flags in (bench, [*TINY, "--shape", "8x1", "16x1"]), (growth, ["--axes", "d_model"]):
        taken = []
        monkeypatch.setattr(script, "contest", second_is_stopped)
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags, *files])
        with pytest.raises(KeyboardInterrupt):
            script.main()
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1
        (tmp_path / "rows.json").unlink()


# ---- a contest ---------------------------------------------------------------------------------------------

def stub(contestant, config, windows, dtype, how: str):
    """Works; fails as it is built, or at its second step; or is killed there, as for want of memory."""
    if how == "built":
        raise ImportError("no module\nof that name")
    taken = []

    def step():
        taken.append(1)
        if how == "killed" and len(taken) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "second" and len(taken) == 2:
            raise RuntimeError("out of luck")
        contestant.mark("all")
    return step, torch.nn.Linear(2, 3)


def settings(*names) -> dict:
    given = dict(config=Config(), windows=torch.zeros(2, 9, dtype=torch.long), dtype="float32")
    return {name: given | dict(how=name) for name in names}


def test_who_fails_is_named_and_left_out(capsys, hurried):
    rows = bench.contest(stub, settings("built", "works", "second", "killed", "works too"), CPU, rounds=3)
    assert [(r["name"], len(r["rounds"]), r["parameters"], r["tokens"]) for r in rows] == [
        ("works", 3, 9, 16), ("works too", 3, 9, 16)]
    printed = capsys.readouterr().out
    assert "built is left out: ImportError: no module of that name\n" in printed
    assert "second is left out: RuntimeError: out of luck\n" in printed
    assert "killed is left out: BrokenProcessPool: " in printed
    with pytest.raises(ValueError, match="nothing could be measured"):
        bench.contest(stub, settings("built"), CPU, rounds=1)


def test_parts_are_told_apart(monkeypatch):
    """A part has what passed since the mark before, whenever it comes again; the median is over steps."""
    now, pauses = 0, [30, 1, 2, 1]

    def build(contestant):
        def step():
            nonlocal now
            pause = pauses.pop(0)
            for part, seconds in (("a", pause), ("b", 5), ("a", pause)):
                now += seconds
                contestant.mark(part)
        return step, torch.nn.Linear(1, 1)

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now))
    times = bench.Contestant(build, {}, CPU).turn(limit=75)     # steps begin at 0, 65 and 72, not at 81
    assert (times["a"], times["b"], times["seconds"]) == (4, 5, 9)


@pytest.mark.parametrize("centred", [True, False])
def test_the_plain_generator_is_the_same_method(centred):
    """What the bench calls plain must compute the same, or the comparison means nothing."""
    how = dict(d_seed=12, n_modes=2, mode_width=3, n_knots=5, centred=centred)
    ids, found = torch.tensor([[3, 96, 3], [0, 41, 3]]), []
    for cls in (bench.PlainGenerator, TokenGenerator):
        generator = cls(97, 8, **how).double()
        e = generator(ids)
        slopes = torch.linspace(-1, 1, e.numel(), dtype=torch.float64).view_as(e)
        found.append([e, *torch.autograd.grad((e * slopes).sum(), list(generator.parameters()))])
    for plain, ours in zip(*found):
        torch.testing.assert_close(plain, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("flags, message", [
    ("--tokens 100", "--tokens is 100: it must be a multiple of 512"),
    ("--tokens 0", "--tokens is 0"),
    ("--shape 256x6 256", "--shape 256: write width x layers, such as 256x6"),
    ("--shape 250x6", "d_model 250 must be"),
    ("--vocab-size 0", "vocab_size is 0"),
    ("--rounds 0", "--rounds must be at least 1"),
    ("--json nowhere/rows.json", "nowhere.rows.json is there already, or its folder is not"),
    ("--plot speed.pdf", "--plot a .png"),
    ("--plot speed.png --sections pieces", "draws the section models"),
])
def test_refuses_before_it_measures(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "contest", None)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(ValueError, match=message):
        bench.main()
    assert not list(tmp_path.iterdir())
