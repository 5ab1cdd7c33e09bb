"""train.py: the same run on any layout, stopped in any way; what cannot be is one clear line."""
import errno
import io
import json
import os
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

import filelock
import pytest
import torch

import leviathan
import prepare_pile
import sample
import train
from kill_train import FLAGS, FULL, ROOT, finish, result, start
from leviathan import Config, LanguageModel, TokenGenerator, isoparametric_depth, load
from prepare_pile import Windows, read_meta, sealed
from train import Training, build, compile_parts, learning_rate, window_stream

SHAPE = dict(vocab_size=300, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=1)
EIGHT = "--steps 8 --save-every 4 --eval-every 4 --keep 9".split()


def loopback_works() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return bool(socket.create_connection(server.getsockname(), timeout=5).close() or True)
    except OSError:
        return False


needs_loopback = pytest.mark.skipif(not loopback_works(), reason="ranks talk over 127.0.0.1")


def run(out, data, *flags) -> dict:
    """train.main() as from the command line, but for the streams, which stay ours. -> result(out)"""
    torch.set_num_threads(1)                        # as start() has it: equal to the bit
    handlers = [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))]
    command = ["train.py", *FLAGS, "--data", str(data), "--out", str(out), *flags]
    with mock.patch.object(sys, "argv", command), mock.patch.object(os, "dup2"):
        try:
            train.main()
        finally:                                    # Jupyter's %run goes on after us
            assert handlers == [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))]
    return result(Path(out))


def during(number: int, action):
    """In this context a run does that within the step of this number, from 0."""
    def rate(step, t):
        if step == number:
            action()
        return learning_rate(step, t)
    return mock.patch.object(train, "learning_rate", rate)


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """On a disk that refuses fsync, as CIFS and some FUSE file systems do."""
    def fsync(number):
        raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Path:
    """An undisturbed run of EIGHT steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, tiny_data, *EIGHT)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_learning_rate_by_hand():
    t = Training(steps=12, warmup_steps=4, learning_rate=0.8, final_rate=0.5)
    expected = [0.2, 0.4, 0.6, 0.8, 0.8, 0.4 + 0.2 * (1 + 2**-0.5), 0.6, 0.4]   # cos of 0, π/4, π/2, π
    assert [learning_rate(step, t) for step in (0, 1, 2, 3, 4, 6, 8, 12)] == pytest.approx(expected)
    assert learning_rate(0, Training(warmup_steps=0, learning_rate=0.8)) == 0.8


def test_each_epoch_has_every_window_once(tiny_data):
    """In another order; and any number of ranks reads the same windows, here across the end of an epoch."""
    windows = Windows(tiny_data, "train", 32)
    n, in_file_order = len(windows), [windows[i].tolist() for i in range(len(windows))]
    stream = window_stream(windows, range(2 * n), seed=3)
    first, second = stream[:n].tolist(), stream[n:].tolist()
    assert sorted(first) == sorted(second) == sorted(in_file_order)
    assert first != second != in_file_order != first != window_stream(windows, range(n), seed=4).tolist()
    for own in (range(n - 4 + rank, n + 17, world) for world in (2, 3, 7) for rank in range(world)):
        assert (window_stream(windows, own, seed=3) == stream[own]).all()
    with mock.patch.object(train, "window_stream", wraps=window_stream) as reads:
        run("run", tiny_data, *EIGHT)
    assert [read.args[1] for read in reads.call_args_list[:8]] == [range(i, i + 8) for i in range(0, 64, 8)]


@needs_loopback
def test_any_layout_is_the_same_run(tmp_path, tiny_data):
    """Eight windows a step: at once, by 3, on 4 ranks by 1; on 2 that go on where the newest is damaged."""
    flags = [*EIGHT, "--dtype", "float64", "--micro-batch"]
    expected, *found = run("one", tiny_data, *flags, "8"), run("by 3", tiny_data, *flags, "3")
    shutil.copytree("one", "two")
    Path("two/step-00000008/model.pt").write_bytes(b"")
    for ranks, out, more in ((4, "four", ["1"]), (2, "two", ["3", "--resume"])):
        error = finish(start(tmp_path / out, tiny_data, *flags, *more, ranks=ranks))
        assert Path(out, "curves.png").exists(), error
        found.append(result(Path(out)))
    for other in found:
        assert other.keys() == expected.keys() and len(other["log"]) == 8       # no "module." before a name
        for ours, theirs in zip(expected["log"], other["log"]):
            assert ours == pytest.approx(theirs, rel=1e-10, abs=0)


@needs_loopback
def test_ranks_that_find_different_checkpoints_stop(tiny_data, whole, copy):
    """As where one node's disk shows an older listing; here each rank has a folder of its own."""
    shutil.rmtree(copy / "step-00000008")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shutil.copytree(whole, "first")
    processes = [subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--resume", "--data", tiny_data, "--out", out],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=os.environ | dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                              OMP_NUM_THREADS="1")) for rank, out in enumerate(("first", copy))]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert all(f"train.py: the ranks find different checkpoints in {out}" in error
               for error, out in zip(errors, ("first", copy)))


@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM", "SIGHUP", "pipe", "terminal"])
def test_a_stop_finishes_the_step_and_saves(tiny_data, whole, way):
    """A signal; `train.py 2>&1 | head -1`; a terminal that is gone and sends no signal."""
    if way in ("pipe", "terminal"):
        reader, writer = os.pipe() if way == "pipe" else os.openpty()
        process = start("run", tiny_data, *EIGHT, output=writer)
        os.close(writer), os.read(reader, 1), os.close(reader)
        assert process.wait(60) == 0
    else:
        before = signal.signal(number := getattr(signal, way), signal.SIG_DFL)      # nohup has it ignored
        with during(2, lambda: os.kill(os.getpid(), number)):
            run("run", tiny_data, *EIGHT)
        signal.signal(number, before)
    stopped = result(Path("run"))
    assert len(stopped["log"]) == int(stopped["step"][-1]) < 8
    assert run("run", tiny_data, *EIGHT, "--resume") == result(whole)


@pytest.mark.parametrize("file, left", [("model.pt", 1.0), ("optimizer.pt", 0.0), ("config.json", 0.5)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(copy, tiny_data, whole, capsys, file, left):
    """One bit is flipped in the middle; all of it is left, nothing or a half."""
    path = copy / "step-00000008" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:int(left * len(content))])
    assert run(copy, tiny_data, *EIGHT, "--resume") == result(whole)
    said = f"{path.parent} is damaged, so the one before it is looked for: "
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(said)]) == 1
    assert sorted(os.listdir(copy)) == sorted(os.listdir(whole))


def test_what_is_not_of_this_run_is_taken_for_damaged(copy, tiny_data, whole, capsys):
    """Moments of another width, which torch does not look at; a step, or a type, that cannot be."""
    folder = copy / "step-00000008"
    before = {name: (folder / name).read_bytes() for name in ("optimizer.pt", "config.json")}
    state = torch.load(folder / "optimizer.pt")
    state["state"][0] = {name: torch.zeros(3, 3) for name in state["state"][0]}
    torch.save(state, folder / "optimizer.pt")
    assert run(copy, tiny_data, *EIGHT, "--resume") == result(whole)
    for old, new in ((b'"step": 8', b'"step": 2'), (b'"steps": 8', b'"steps": "8"')):
        for name, content in before.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_bytes(before["config.json"].replace(old, new))
        assert run(copy, tiny_data, *EIGHT, "--resume") == result(whole)
    assert capsys.readouterr().out.count("is damaged, so the one before it is looked for: ") == 3


def test_where_no_checkpoint_is_whole(copy, tiny_data, whole):
    """Nothing is changed; but where there is none yet, as after an early SIGKILL, the run begins again."""
    for path in copy.glob("step-*/model.pt"):
        path.write_bytes(b"")
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint in .*copy is whole"):
        run(copy, tiny_data, *EIGHT, "--resume")
    assert sorted(copy.rglob("*")) == before
    shutil.rmtree(copy / "step-00000008")
    (copy / "step-00000004").rename(copy / "best")
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint in .*copy, but other files"):
        run(copy, tiny_data, *EIGHT, "--resume")
    (copy / "curves.png").unlink()          # which a run that was stopped early has not
    (copy / "best").rename(copy / ".partial")
    assert run(copy, tiny_data, *EIGHT, "--resume") == result(whole)
    assert sorted(os.listdir(copy)) == sorted(os.listdir(whole))


def test_a_damaged_checkpoint_is_not_among_those_to_keep(copy, tiny_data, whole):
    (copy / "step-00000008/model.pt").write_bytes(b"")
    with during(5, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(ValueError, match="damaged"):
        run(copy, tiny_data, *EIGHT, "--resume", "--keep", "1", "--save-every", "1")    # reads the newest
    assert [path.name for path in sorted(copy.glob("step-*"))] == ["step-00000006", "step-00000008"]
    assert run(copy, tiny_data, *EIGHT, "--resume") == result(whole)


@pytest.mark.parametrize("error, seen", [
    (PermissionError(13, "Permission denied"), PermissionError),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), MemoryError)])
def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(copy, tiny_data, monkeypatch, error, seen):
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    with pytest.raises(seen):
        run(copy, tiny_data, *EIGHT, "--resume")


def test_a_run_into_a_link_that_dangles(tiny_data, whole):
    os.symlink("elsewhere/there", "run")
    assert run("run", tiny_data, *EIGHT) == result(whole) == result(Path("elsewhere/there"))


@pytest.mark.parametrize("damage", [
    '{"step": 3, "to', '[1]\n7\n{}\n{"step": 1}\n{"step": "3"}\n\x80', "[" * 100_000,
    '{"step": 3, "tokens": {}, "loss": 1}\n{"step": 3, "tokens": 1, "loss": []}', None])
def test_a_damaged_log_is_survived(copy, tiny_data, whole, damage):
    """Behind its second line, or all of it lost; of a finished run, and of one that is not."""
    expected, path = result(whole)["log"], copy / "log.jsonl"
    for step in (8, 4):
        path.unlink()
        kept = [] if damage is None else expected[:2]
        if damage is not None:
            path.write_text("\n".join([*map(json.dumps, kept), damage]), encoding="latin-1")
        assert run(copy, tiny_data, *EIGHT, "--resume")["log"] == kept + expected[step:]
        shutil.rmtree(copy / "step-00000008")


def test_what_was_ignored_stays_ignored(tiny_data):
    """As in the background of a shell: SIGTERM stops the run; Ctrl-C, meant for others, still does not."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with during(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            run("run", tiny_data, *EIGHT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_runs_in_one_folder_are_refused(tiny_data, whole):
    """While a run is in a step another is started there, anew and with --resume."""
    def others():
        for flags, message in (([], "run is not empty: go on with --resume"), (["--resume"], "another run")):
            with pytest.raises(ValueError, match=message):
                run("run", tiny_data, *EIGHT, *flags)
    with during(5, others):
        assert run("run", tiny_data, *EIGHT) == result(whole)
    os.mkdir("new")                                                     # and where no log is begun yet
    with train.locked(Path("new")), pytest.raises(ValueError, match="another run is writing new"):
        run("new", tiny_data, *EIGHT)

    def overtaken(out):                                                 # after the folder was looked at
        Path(out, "log.jsonl").touch()
        return nullcontext()
    with mock.patch.object(train, "locked", overtaken), pytest.raises(ValueError, match="meanwhile"):
        run("new", tiny_data, *EIGHT)


def test_a_disk_without_locks(tiny_data, whole, monkeypatch, capsys):
    """NFS without its lock daemon: the run goes on, and says so."""
    refuse = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert run("run", tiny_data, *EIGHT) == result(whole)
    assert capsys.readouterr().err.startswith("run cannot be locked (No locks available): let nothing else")


def test_nothing_is_written_beside_the_data(tiny_data):
    """It may lie on a disk that can only be read."""
    def seen():
        return [(path, path.stat().st_mtime_ns) for path in sorted(tiny_data.parent.rglob("*"))]
    before = seen()
    run("run", tiny_data, *EIGHT)
    assert seen() == before


def test_without_streams(tiny_data, whole):
    """As a daemon may start it: standard output and error are closed."""
    command = [sys.executable, ROOT / "train.py", *FLAGS, *EIGHT, "--data", tiny_data, "--out", "run"]
    subprocess.run(f"{shlex.join(map(str, command))} >&- 2>&-", shell=True, check=True,
                   env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert result(Path("run")) == result(whole)


def test_ctrl_c_before_the_first_step(tiny_data, monkeypatch):
    monkeypatch.setattr(prepare_pile, "read_meta", mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--data", str(tiny_data), "--out", "run"])
    with pytest.raises(SystemExit, match=r"^train\.py: stopped before the first step$"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert not os.path.exists("run")


def test_a_users_copies_are_neither_deleted_nor_resumed(copy, tiny_data):
    names = ["step-00000004-good1", "step-00000004.bak", "step-99999999-mine", "step-mine.partial"]
    for name in names:
        shutil.copytree(copy / "step-00000004", copy / name)
    shutil.rmtree(copy / "step-00000008")
    (copy / "step-00000001").symlink_to(copy / names[0])        # moved elsewhere
    (copy / "step-12345678").write_text("a file")
    names += ["step-12345678", "step-00000001"]
    assert len(run(copy, tiny_data, *EIGHT, "--resume", "--keep", "2", "--save-every", "1")["log"]) == 8
    assert {path.name for path in copy.glob("step-*")} == {*names, "step-00000007", "step-00000008"}


def test_a_disk_that_fills_while_saving(tiny_data, whole):
    """The line says what happened; the checkpoint before stays, and the run goes on from it."""
    none, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with during(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, most))):
        with pytest.raises(ValueError, match=r"^step 8 could not be saved in run \(.*too large\)[^\n]*$"):
            run("run", tiny_data, *EIGHT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (none, most))
    assert sorted(os.listdir("run")) == [".lock", "log.jsonl", "step-00000004"]
    assert run("run", tiny_data, *EIGHT, "--resume") == result(whole)


@pytest.mark.parametrize("flags, message", [
    ("--steps 9", "--steps is 9, but the run in .*copy has 8"), ("--seed 1", "--seed is 1, but"),
    ("--model dense", "--model is dense, but"), ("--no-centred", "--centred is False, but"),
    ("--data other", "other is not what the run in .*copy was trained on")])
def test_model_schedule_and_data_may_not_change(copy, tiny_data, flags, message):
    shutil.copytree(tiny_data, "other")
    Path("other/meta.json").write_text(json.dumps(sealed(read_meta(tiny_data) | dict(identity="another's"))))
    with pytest.raises(ValueError, match=message):
        run(copy, tiny_data, *EIGHT, "--resume", *flags.split())


CODEBOOKS = {"embed_tokens.codebooks": TokenGenerator(300, 32, n_coords=2, base=20, d_seed=4).codebooks.data}
ADDRESSES = {"embed_tokens.addresses": torch.arange(300).flip(0)}
TABLE = {"embed_tokens.weight": torch.ones(300, 32)}


def test_start_from_a_file():
    """Codebooks of another base, addresses; a table for the twins. Blocks and head are as without."""
    tied = {"lm_head.weight": TABLE["embed_tokens.weight"]}
    for settings, given, head in (
            ({}, CODEBOOKS | ADDRESSES, {}), ({"generator": "lev"}, ADDRESSES, {}),
            ({"model": "dense-untied"}, TABLE, {}), ({"model": "dense"}, TABLE, tied)):
        torch.save(given, "start.pt")
        config = Config(**SHAPE | settings)
        model = build(config, Training(start="start.pt")).state_dict()
        others = LanguageModel(config).state_dict()
        expected = {name: x for name, x in others.items() if "embed" not in name} | given | head
        assert all(torch.equal(model[name], x) for name, x in expected.items())
    torch.save(CODEBOOKS, "start.pt")
    deep, base = build(Config(**SHAPE), Training(start="start.pt", isoparametric=True)).config, dict(base=20)
    assert deep.n_layers == isoparametric_depth(Config(**SHAPE | base | dict(n_coords=2, d_seed=4)))


@pytest.mark.parametrize("flags, n_layers", [
    ("--start a.pt --n-coords 4", 1), ("--isoparametric --d-model 4 --n-heads 1 --n-modes 1 --n-knots 3", 4)])
def test_the_same_command_goes_on(tiny_data, flags, n_layers):
    """Though the file decides the shape, or the twin's size, for 1 + (1,200 - 308) // 264 layers."""
    torch.save(CODEBOOKS | ADDRESSES, "a.pt")
    expected = run("run", tiny_data, *EIGHT, *flags.split())
    assert load("run").config.n_layers == n_layers
    shutil.rmtree("run/step-00000008")
    assert run("run", tiny_data, *EIGHT, *flags.split(), "--resume") == expected


@pytest.mark.parametrize("what", [dict(start=""), dict(steps=1.5), dict(keep="2"), dict(device=3)])
def test_settings_of_another_type(what):
    """Such as an empty $START, or a config.json that was changed by hand."""
    name, value = *what, *what.values()
    with pytest.raises(ValueError, match=f"--{name} cannot be {value!r}"):
        Training(**what)


@pytest.mark.parametrize("model, content", [
    ("leviathan", {"embed_tokens.codebooks": torch.ones(3, 2, 8)}), ("leviathan", {"size": torch.ones(1)}),
    ("leviathan", {"embed_tokens.addresses": torch.zeros(300).long()}),
    ("leviathan", {"embed_tokens.addresses": torch.arange(300) - 1}),
    ("leviathan", {"embed_tokens.addresses": torch.arange(300) + 44}),      # 7 ** 3 are there
    ("leviathan", {"embed_tokens.addresses": torch.arange(300.0)}), ("leviathan", [1]), ("leviathan", None),
    ("leviathan", {}), ("dense", {"lm_head.weight": torch.full((300, 32), torch.nan)}),
    ("dense", CODEBOOKS), ("dense-untied", {"embed_tokens.weight": torch.ones(9, 32)})])
def test_a_start_that_does_not_fit(tiny_data, model, content):
    Path("start.pt").write_text("text") if content is None else torch.save(content, "start.pt")
    with pytest.raises(ValueError, match=r"^[^\n]*start\.pt[^\n]*$"):
        run("run", tiny_data, *EIGHT, "--model", model, "--start", "start.pt")
    assert os.listdir() == ["start.pt"]


def test_a_start_for_another_tokenizer(tiny_data):
    """Of as many ids; a file that does not say whose it is, such as a user's own, is taken as it is."""
    whose = read_meta(tiny_data)["tokenizer"]["sha256"]
    torch.save(TABLE | dict(tokenizer=whose), "own.pt")
    torch.save(TABLE | dict(tokenizer=whose[::-1]), "other.pt")
    run("run", tiny_data, *EIGHT, "--model", "dense-untied", "--start", "own.pt")
    with pytest.raises(ValueError, match=r"^--start other\.pt does not fit .*: it was made for another tok"):
        run("other", tiny_data, *EIGHT, "--model", "dense-untied", "--start", "other.pt")


def test_bfloat16_trains_alike(tiny_data, whole):
    logs = run("run", tiny_data, *EIGHT, "--dtype", "bfloat16")["log"], result(whole)["log"]
    ours, theirs = ([line["loss"] for line in log] for log in logs)
    assert ours == pytest.approx(theirs, rel=5e-3) and ours != theirs
    assert {w.dtype for w in load("run").parameters()} == {torch.float32}


def test_compiled_parts_compute_the_same(monkeypatch):
    """Without graph breaks, and without a prefix to any name; aot_eager needs no C++."""
    how = dict(fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, **how))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **how))
    model, compiled = LanguageModel(Config(**SHAPE)), LanguageModel(Config(**SHAPE))
    compile_parts(compiled)
    for m in (model, compiled):
        m(torch.arange(32).view(2, 16), torch.arange(32).view(2, 16)).backward()
    torch.testing.assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (model, compiled)))


def test_a_generator_of_ones_own_is_gone_on_with(tiny_data, monkeypatch):
    """Also where codebooks are frozen, so that they have no moments, and where torch draws a bias."""
    class Frozen(TokenGenerator):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.codebooks.requires_grad_(False)
            self.residual_proj = torch.nn.Linear(self.d_seed, self.embedding_dim)
    monkeypatch.setitem(leviathan.GENERATORS, "v1", Frozen)
    run("run", tiny_data, *EIGHT)
    expected = result(Path("run"))
    shutil.rmtree("run/step-00000008")
    assert run("run", tiny_data, "--resume") == expected == run("again", tiny_data, *EIGHT)


def test_after_a_first_step_that_fails_the_same_command_runs(tiny_data, whole, monkeypatch):
    """Such as for want of memory, where it is told to lower --micro-batch."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", mock.Mock(side_effect=RuntimeError("out of memory")))
        run("run", tiny_data, *EIGHT)
    assert os.listdir("run") == [".lock"]
    assert run("run", tiny_data, *EIGHT) == result(whole)


@pytest.mark.parametrize("error, message", [
    ("CUDA out of memory. Tried to allocate", "lower --micro-batch, or take a smaller model"),
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "lower --micro-batch"),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate", "lower --micro-batch"),
    ("Failed to find C compiler. Please specify via CC", "give --no-compile"),
    ("InvalidCxxCompiler: No working C++ compiler found in", "give --no-compile"),
    ("CUDA error: an illegal memory access was encountered", None)])
def test_what_a_crash_is_called(tiny_data, monkeypatch, error, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--data", str(tiny_data), "--out", "run"])
    monkeypatch.setattr(prepare_pile, "read_meta", mock.Mock(side_effect=RuntimeError(error)))
    with pytest.raises(SystemExit if message else RuntimeError, match=message or error):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_the_default_data_is_made_once(tiny_data, monkeypatch):
    """And gone on with where that was stopped."""
    def prepare(files, out, **_):
        made.append(shutil.copytree(tiny_data, out, dirs_exist_ok=True))
    made, unfinished = [], sealed(read_meta(tiny_data) | dict(finished=False))
    monkeypatch.setattr(prepare_pile, "prepare", prepare)
    os.makedirs("data/stdlib")
    Path("data/stdlib/meta.json").write_text(json.dumps(unfinished))
    run("one", "data/stdlib", "--steps", "1"), run("two", "data/stdlib", "--steps", "1")
    assert made == ["data/stdlib"]


@pytest.mark.parametrize("terminal, disable, seen", [(1, "", True), (1, "1", False), (0, "", False)])
def test_the_bar_is_for_terminals(tiny_data, monkeypatch, terminal, disable, seen):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: terminal
    monkeypatch.setenv("TQDM_DISABLE", disable)
    run("run", tiny_data, *EIGHT)
    assert ("8/8" in sys.stderr.getvalue()) == seen == (sys.stderr.getvalue() != "")


def test_a_loss_that_is_not_finite(copy, tiny_data):
    shutil.rmtree(copy / "step-00000008")
    with mock.patch.object(train, "learning_rate", lambda *_: float("nan")), \
            pytest.raises(ValueError, match=r"^step 6: the loss is nan.*learning-rate.*copy/step-00000004$"):
        run(copy, tiny_data, *EIGHT, "--resume")
    with mock.patch.object(train, "learning_rate", lambda step, t: 1e-3 if step < 7 else 1e30), \
            pytest.raises(ValueError, match="^step 8: the validation loss is nan.*run/step-00000004$"):
        run("run", tiny_data, *EIGHT)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sample.choose_device(None, 1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="there are 2 GPUs here: lower --nproc_per_node"):
        sample.choose_device("cuda", 2)


@pytest.mark.parametrize("flags, message", [
    ("--preset huge", "--preset huge .* 60m, 270m,"), ("--dtype float8", "--dtype float8 .* float32, bf"),
    ("--model gpt", "unknown model 'gpt': .* dense,"), ("--generator v3", "unknown generator 'v3': .* lev"),
    ("--eval-every 0", "--eval-every is 0: .* above 0"), ("--save-every 0", "--save-every is 0: .* above 0"),
    ("--seed -1", "--seed is -1: .* at least 0"), (f"--seed {2**70}", "--seed is 1180591620717411303424: "),
    ("--learning-rate nan", "--learning-rate is nan"), ("--beta1 1.5", "--beta1 is 1.5: .*at most 1"),
    ("WORLD_SIZE=2 RANK=1", "MASTER_ADDR expected"), ("RANK=1", "RANK is 1, WORLD_SIZE 1: unset them"),
     ("--n-layers 0", "n_layers is 0"), ("--base 2", "of base 2"),
    ("--d-model 30 --n-heads 4", "d_model 30 must"), ("--device tpu", "--device tpu: there is none here"),
    ("--data nowhere", "no prepared data in nowhere"), ("--data unfinished", "unfinished is unfinished"),
    ("--vocab-size 299", "--vocab-size 299: .* 300"), ("--tokens-per-step 100", "a multiple of --seq-len 32"),
    ("--seq-len 99968 --tokens-per-step 99968", "shorter than one window of"), ("--start no.pt", "no.pt"),
    ("--n-knots 2000000000 --mode-width 4096", "out of memory .* smaller model"),
    ("--resume", "there is no run")])
def test_what_cannot_be_is_one_line_and_leaves_nothing(tiny_data, monkeypatch, flags, message):
    """As a user sees it, with exit status 1. WORLD_SIZE: a rank that nobody has told where the others are."""
    os.mkdir("unfinished")
    Path("unfinished/meta.json").write_text(json.dumps(sealed(read_meta(tiny_data) | dict(finished=False))))
    command = ["train.py", *FLAGS, "--data", str(tiny_data), "--out", "run", *flags.split()]
    monkeypatch.setattr(sys, "argv", [part for part in command if "=" not in part])
    for name, _, value in (part.partition("=") for part in flags.split() if "=" in part):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=rf"^train\.py: [^\n]*{message}[^\n]*$"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert not os.path.exists("run")
