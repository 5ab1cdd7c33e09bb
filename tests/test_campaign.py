"""lab/campaign.py: what it runs and what not, with a train.py that only pretends; then with the real one."""
import json
import os
import subprocess
import sys

import pytest
import torch

from lab import campaign
from leviathan import Config

TINY = ("--seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --tokens-per-step 256 "
        "--steps 4 --eval-every 2 --eval-tokens 512 --device cpu")
PRETENDER = """
import json, shutil, sys
given = dict(zip(sys.argv, sys.argv[1:]))
if "--clip" in given:
    sys.exit("train.py: --clip is refused")
shutil.copytree("{template}", given["--out"], dirs_exist_ok="--resume" in sys.argv)
about = json.load(open(given["--out"] + "/step-00000002/config.json"))
about["data"] = json.load(open(given["--data"] + "/meta.json"))["identity"]
about["training"].update(preset="nano", steps=3 if "--stop" in sys.argv else 2, tokens_per_step=100)
json.dump(about, open(given["--out"] + "/step-00000002/config.json", "w"))
open(given["--out"] + "/step-00000002/optimizer.pt", "w").close()
with open(given["--out"] + "/log.jsonl", "w") as log:
    for step in (1, 2):
        loss = 5 - step + int(given["--seed"]) + (given["--model"] == "leviathan") / 2
        print(json.dumps(dict(step=step, tokens=100 * step, val_loss=loss, tokens_per_second=50)), file=log)
"""


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lab.campaign", *map(str, args)])
    campaign.main()


@pytest.fixture
def ran(tmp_path, saved, tiny_data, monkeypatch):
    """Commands that a campaign has run so far, with the pretender in place of train.py."""
    config = Config(vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_seed=4, mode_width=1)
    saved(config, tmp_path / "template")
    (tmp_path / "pretender.py").write_text(PRETENDER.replace("{template}", str(tmp_path / "template")))
    monkeypatch.setattr(campaign, "TRAIN", tmp_path / "pretender.py")
    monkeypatch.setattr(campaign, "EXPERIMENTS", {
        "one": {"dense": "--model dense", "v1": "--model leviathan"}, "two": {"v1": "--model leviathan"},
        "rate": {"v1": "--model leviathan --learning-rate 1"}})
    ran, real = [], subprocess.run
    monkeypatch.setattr(campaign.subprocess, "run", lambda *a, **k: ran.append(a[0]) or real(*a, **k))
    return ran


def test_a_campaign_is_gone_on_with(ran, tmp_path, tiny_data, monkeypatch, capsys):
    """A variant of two experiments runs once; what is there is not run again; a sweep has one seed."""
    flags = ["--train", f"--data {tiny_data}", "--out", tmp_path / "out", "--experiments"]
    (tmp_path / "out").symlink_to("not yet there")
    for seeds, names, expected in ((1, "one two", 2), (1, "one", 2), (2, "one two", 4), (2, "rate", 5)):
        run(monkeypatch, *flags, *names.split(), "--seeds", seeds, "--jobs", 2)
        assert len(ran) == expected == len(list((tmp_path / "out/runs").glob("*.jsonl")))
    assert not [*tmp_path.glob("out/**/optimizer.pt")] and len([*tmp_path.glob("out/**/model.pt")]) == 5
    run(monkeypatch, *flags, "one", "two", "--seeds", 3, "--minutes", 0)
    assert len(ran) == 5 and "2 runs had no time: the same command goes on" in capsys.readouterr().out
    tables = (tmp_path / "out/tables.md").read_text()
    assert "one: nano, 2 steps of 100 tokens, shards" in tables
    assert "| dense | 0.00 | 0.00 | 3.500 ± 0.707 |  | 2 |" in tables
    assert "| v1 | 0.00 | 0.00 | 4.000 ± 0.707 | +0.500 ± 0.000 | 2 |" in tables
    assert (tmp_path / "out/one.png").stat().st_size > 10_000 and not (tmp_path / "out/rate.png").exists()
    (tmp_path / "out/runs/dense.seed-0.jsonl").write_text("{}")         # the other is there still
    run(monkeypatch, *flags, "one")
    assert len(ran) == 7
    assert "dense.seed-0.jsonl is missing, damaged or other data" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is of --train .*: change --out"):     # before what is missing runs
        run(monkeypatch, *flags, "one", "--seeds", 4, "--train", f"--data {tiny_data} --beta1 0.8")
    monkeypatch.setattr(campaign, "read_meta", lambda data: dict(identity="of other text"))
    with pytest.raises(ValueError, match="or of what was in .*/shards before: change --out"):
        run(monkeypatch, *flags, "one")
    monkeypatch.setitem(campaign.EXPERIMENTS, "capitals", {"v1": "--model Leviathan"})
    (tmp_path / "out/runs/leviathan.seed-0.jsonl").rename(tmp_path / "out/runs/eviathan.seed-0.jsonl")
    with pytest.raises(ValueError, match="change --out"):           # a file of that name, but of other flags
        run(monkeypatch, *flags, "capitals")
    assert len(ran) == 7


def test_a_run_that_fails_or_stops_is_one_clear_line(ran, tmp_path, tiny_data, monkeypatch, capsys):
    flags = ["--experiments", "one", "--seeds", 1, "--out", tmp_path / "out", "--train"]
    with pytest.raises(ValueError, match="'--model dense' of seed 0 failed: train.py: --clip is refused"):
        run(monkeypatch, *flags, f"--data {tiny_data} --clip 2")
    monkeypatch.setitem(campaign.EXPERIMENTS, "half", {"dense": "--model dense", "v1": "--model v1 --clip 2"})
    half = ["--experiments", "half", "--seeds", 1, "--out", tmp_path / "half", "--train"]
    with pytest.raises(ValueError, match="no run of half: v1: the same command tries again"):
        run(monkeypatch, *half, f"--data {tiny_data}")      # when the others have gone on
    assert "lab.campaign: the run '--model v1 --clip 2' of seed 0 failed" in capsys.readouterr().err
    assert "| dense | " in (table := (tmp_path / "half/tables.md").read_text()) and "v1" not in table
    with pytest.raises(ValueError, match="'--model dense' of seed 0 was stopped: the same command goes on"):
        run(monkeypatch, *flags, f"--data {tiny_data} --stop")
    assert not list((tmp_path / "out/runs").glob("*.jsonl"))
    with pytest.raises(ValueError, match="unknown start {vectors}: choose from table, learned, fine"):
        campaign.campaign({"one": {"v1": "--model leviathan --start {vectors}"}}, f"--data {tiny_data}", 1,
                          tmp_path / "unknown")
    with campaign.locked(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing"):
        run(monkeypatch, *flags, f"--data {tiny_data}")
    run(monkeypatch, *flags, f"--data {tiny_data}")             # goes on where they were stopped
    assert all(command[-1] == "--resume" for command in ran[-2:])
    assert len(list((tmp_path / "out/runs").glob("*.jsonl"))) == 2


def test_differences_are_paired_by_seed():
    def runs(losses):
        return [dict(seed=seed, parameters=dict(embedding=10**6, head=10**6),
                     log=[dict(val_loss=loss, tokens=10, tokens_per_second=5)])
                for seed, loss in losses.items()]
    table = campaign.as_table({"a": runs({0: 1.0, 1: 3.0}), "b": runs({1: 2.0, 2: 9.0})})
    assert "| b | 2.00 | 1.00 | 5.500 ± 4.950 | -1.000 | 2 |" in table


def test_with_train_itself(tiny_data, tmp_path, monkeypatch):
    """A variant that starts from a file, which is made on the way, of the width that the flags say."""
    monkeypatch.setattr(campaign, "EXPERIMENTS", {"one": {"learned": "--model leviathan --start {learned}"}})
    flags = f"{TINY} --data {tiny_data}"
    run(monkeypatch, "--experiments", "one", "--seeds", 1, "--train", flags, "--out", tmp_path)
    head, *log = map(json.loads, next(tmp_path.glob("runs/*.jsonl")).read_text().splitlines())
    assert head["config"]["base"] == 256 and head["parameters"]["embedding"] > 3 * 256 * 8
    assert [line["step"] for line in log if "val_loss" in line] == [2, 4]
    identity = campaign.read_meta(tiny_data)["identity"]
    start = torch.load(tmp_path / f"starts/shards-{identity[:8]}-learned-v1-8-32.pt", weights_only=True)
    trained = campaign.load(tmp_path / "runs/leviathan-start-learned.seed-0").embed_tokens
    assert torch.equal(trained.addresses, start["embed_tokens.addresses"])
    assert (tmp_path / "one.png").stat().st_size > 10_000
    own, smaller = (campaign.ready(f"--preset micro --data {tiny_data} --start {start}".split(), tmp_path)[-1]
                   for start in ("{table}", "{table@0.25}"))
    own, smaller = (torch.load(path)["embed_tokens.weight"] for path in (own, smaller))
    assert own.shape == (300, 256)
    torch.testing.assert_close(own * 0.5, smaller)
    for kind, rows in ("v1", 16), ("lev", 8 * 16):
        paced = torch.load(campaign.ready(f"--generator {kind} --d-seed=16 --d-model 8 --data {tiny_data} "
                                          "--start {pace@0.5,0.2}".split(), tmp_path)[-1])
        assert paced["embed_tokens.seed_proj.weight"].shape == (rows, 16)
        assert [x.std().item() for x in paced.values()] == pytest.approx([0.5, 0.2], rel=0.15)


@pytest.mark.parametrize("main, status, said", [
    ("lambda: print('±')", 0, "?"), ("lambda: 1 / 0", 1, "ZeroDivisionError"),
    ("lambda: int('x')", 1, "lab.x: invalid literal"),
    ("lambda: torch.empty(2**60)", 1, "lab.x: out of memory")])
def test_how_the_lab_ends(main, status, said):
    code = f"import torch, lab\nlab.command('lab.x', {main})"
    done = subprocess.run([sys.executable, "-c", code], cwd=campaign.ROOT, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert done.returncode == status and said in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == ("Zero" in said)
