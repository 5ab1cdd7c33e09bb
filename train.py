"""Train Leviathan or one of its dense twins: one straight script for a CPU, one GPU or many.

    python train.py                                                           # on this Python's standard library
    python train.py --model dense --out out/twin --seed 0                     # its twin: same blocks, same data, same order
    torchrun --nproc_per_node=8 train.py --preset 60m --data data/pile        # 8 GPUs
    python train.py --resume                                                  # go on where a stopped run was

A step is `tokens_per_step` tokens, the same ones whatever the number of GPUs and the size of a micro-batch (`shards.batches`):
so the step's number is all that has to be remembered of the data. All hyperparameters here are [O] but for AdamW, clipping and
the cosine [P].
"""
import argparse
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import addresses
from checkpoints import check_tensors, load_tensors, save_checkpoint
from common import InputError, check_types, choose_device, command_line, read_json, written_whole
from leviathan import PRESETS, Config, LanguageModel, isoparametric_depth
from loss import LinearCrossEntropy
from prepare_pile import overlap_warning, prepare_stdlib
from sample import stream_text
from shards import Windows, batches, read_meta
from tokenizer import tokenizer_from_json

DEFAULT_DATA = "data/stdlib"
SPIKE_WINDOW, SPIKE_SIGMAS = 100, 6         # a loss so many standard deviations above the mean of so many before it is marked
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}   # dense bf16
MAY_CHANGE = {"data", "out", "device", "dtype", "compile", "micro_batch", "eval_every", "eval_tokens", "save_every", "keep"}


@dataclass
class Training:
    """Everything but the model. None means: from the preset (steps, tokens, rate) or to fit the machine."""
    preset: str = "nano"                # nano, micro, 60m, 270m, 410m or 1.2b
    isoparametric: bool = False         # deepen Leviathan to the size of its untied dense twin
    data: str = DEFAULT_DATA            # a folder that prepare_pile.py has written; the default is made when missing
    out: str | None = None              # folder of the run; None: out/<model>-<preset>
    addresses: str | None = None        # learned (addresses.py), id [P], shuffled, frequency; None: learned, with --paper id
    start: str | None = None            # vectors (of addresses.py: codebooks, or a table) or noise; None: vectors with learned
    seed: int = 0                       # of the initial weights and of the order of the data
    steps: int | None = None            # optimizer steps, and the length of the cosine
    tokens_per_step: int | None = None  # over all ranks and micro-batches; a multiple of seq_len
    learning_rate: float | None = None  # at the end of the warm-up
    warmup_steps: int | None = None     # None: a tenth of the steps, at most 1,000
    final_rate: float = 0.1             # share of the learning rate that the cosine ends at
    weight_decay: float = 0.1           # of matrices; norms, codebooks and splines have none
    decay_splines: bool = False         # decay codebooks and splines too, to see what it does: products of 128 then shrink
    beta1: float = 0.9                  # AdamW's momentum
    beta2: float = 0.95                 # AdamW's second moment
    clip: float = 1.0                   # largest norm of the gradient
    micro_batch: int | None = None      # windows that one device takes at once; the flag to lower when memory runs out
    eval_every: int | None = None       # steps between evaluations; None: a tenth of the run
    eval_tokens: int = 65_536           # of validation, evenly spaced and always the same
    save_every: int | None = None       # steps between checkpoints; None: a tenth of the run
    keep: int = 2                       # newest checkpoints to keep
    device: str | None = None           # cpu, cuda or mps; None: the best there is
    dtype: str | None = None            # float32, bfloat16 (autocast) or float64; None: bfloat16 on CUDA where supported
    compile: bool | None = None         # torch.compile blocks and modes; None: on CUDA

    def __post_init__(self):
        check_types(self)
        for name, choices in (("preset", PRESETS), ("addresses", addresses.ADDRESSES), ("start", addresses.STARTS)):
            if getattr(self, name) not in (None, *choices):
                raise InputError(f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in ("steps", "tokens_per_step", "learning_rate"):
            setattr(self, name, PRESETS[self.preset][name] if getattr(self, name) is None else getattr(self, name))
        self.warmup_steps = min(1_000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        self.eval_every = self.eval_every or max(1, self.steps // 10)
        self.save_every = self.save_every or max(1, self.steps // 10)
        for name in ("steps", "tokens_per_step", "learning_rate", "clip", "micro_batch", "eval_every", "eval_tokens",
                     "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be positive")
        for name, most in (("seed", 2**63), ("warmup_steps", 2**63), ("weight_decay", 2**63), ("final_rate", 1), ("beta1", 1),
                           ("beta2", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most or value == 1 and name.startswith("beta"):
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be at least 0"
                                 + (" and below 1" if name.startswith("beta") else " and at most 1") * (most == 1))


def parse_arguments() -> dict:
    """The flags that were given: one for each field of Config and Training, with the comment beside it as its help."""
    parser = argparse.ArgumentParser(description="Train Leviathan or one of its dense twins.", allow_abbrev=False,
                                     usage="%(prog)s [--resume] [--FLAG VALUE ...]; --help lists them",
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    for cls, title in ((Config, "model (defaults: the preset's)"), (Training, "training")):
        group = parser.add_argument_group(title)
        comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), flags=re.MULTILINE))
        for field in fields(cls):
            kind = next(t for t in get_args(field.type) or (field.type,) if t is not NoneType)
            default = "" if field.default is None or field.name in {*PRESETS["nano"], "vocab_size"} else f" [{field.default}]"
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
            group.add_argument(f"--{field.name.replace('_', '-')}", help=(comments[field.name] + default).replace("%", "%%"), **how)
    return vars(parser.parse_args())


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """What the device multiplies at best, for MFU; None where it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)), None)


def activation_bytes(config: Config, dtype: str) -> int:
    """What backward needs of one token, roughly: 26 D values in each block [O, counted from the block's operations]."""
    return 26 * config.d_model * config.n_layers * (2 if dtype == "bfloat16" else 4)


def expected_memory(model: LanguageModel, tokens: int, device: torch.device, dtype: str) -> int:
    """Bytes of a step, roughly: weights, gradients and AdamW's moments, a chunk of logits, activations, the libraries."""
    c = model.config
    logits = min(tokens * c.vocab_size, LinearCrossEntropy.logits_per_chunk(device.type))
    return 16 * model.n_parameters() + 4 * c.vocab_size * c.d_model + 8 * logits + tokens * activation_bytes(c, dtype) + 2**28


def learning_rate(step: int, t: Training) -> float:
    """Linear warm-up, then a cosine from learning_rate to final_rate of it; step counts from 0."""
    if step < t.warmup_steps:
        return t.learning_rate * (step + 1) / t.warmup_steps
    progress = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
    return t.learning_rate * (t.final_rate + (1 - t.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


class Checkpoint:
    """What a run goes on from, checked throughout. Raises InputError.

    Of the optimizer's state only the moments are taken; its settings are those of the run.
    """
    def __init__(self, folder: Path):
        about = read_json(folder / "config.json")
        try:
            _, training = Config(**about["config"]), Training(**about["training"])
            self.settings, self.step, self.data = about["config"] | about["training"], about["step"], about["data"]
            assert type(self.step) is int and self.step > 0, self.step
        except (KeyError, TypeError, AssertionError, InputError) as error:
            raise InputError(f"{folder / 'config.json'} does not describe a run ({error!r})") from error
        self.folder, self.model = folder, LanguageModel.from_checkpoint(folder)
        saved, where = load_tensors(folder / "optimizer.pt"), f"{folder / 'optimizer.pt'} is not of this model"
        params = [p for group in self.model.decay_groups(0, training.decay_splines) for p in group["params"]]
        self.moments = saved.get("state") if isinstance(saved, dict) else None
        if not isinstance(self.moments, dict) or self.moments.keys() != {*range(len(params))}:
            raise InputError(f"{where}: it does not hold the moments of {len(params)} parameters")
        for i, p in enumerate(params):
            check_tensors(self.moments[i], dict(step=torch.tensor(0.0), exp_avg=p, exp_avg_sq=p), where)

    @classmethod
    def newest(cls, out: Path, say) -> tuple["Checkpoint | None", list[Path]]:
        """The newest whole one, and those after it that are damaged. Raises InputError where there are only damaged ones."""
        damaged, first = [], None
        for folder in sorted(out.glob("step-*[0-9]"), reverse=True):
            try:
                return cls(folder), damaged
            except InputError as error:
                say(f"{error}")
                damaged.append(folder)
                first = first or error
        if damaged:
            raise InputError(f"no checkpoint in {out} is whole: {first}")
        return None, []


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; a last one that has no end is left out. Raises InputError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    try:
        log = [json.loads(line) for line in lines if line.endswith("\n")]
        assert all(type(line["step"]) is int and type(line["loss"]) is float for line in log)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}): mend it, or move it away") from error
    return log


def plot_curves(out: Path, unigram: float, title: str):
    """OUT/curves.png from OUT/log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = read_log(out / "log.jsonl")
    evaluated = [line for line in log if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot([line["tokens"] for line in log], [line["loss"] for line in log], lw=0.8, alpha=0.6, label="training, one step")
    axes.plot([line["tokens"] for line in evaluated], [line["val_loss"] for line in evaluated], "o-", ms=4,
              label=f"validation ({evaluated[-1]['val_loss']:.3f} at the end)")
    axes.axhline(unigram, ls="--", lw=1, color="gray", label=f"a unigram model ({unigram:.3f})")
    axes.set(xlabel="training tokens", ylabel="loss, nats per token", title=title)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


def main():
    # ---- what to run: the flags, or a checkpoint's settings ----------------------------------------------------------
    given = parse_arguments()
    resume = given.pop("resume", False)
    rank, local_rank, world = (int(os.environ.get(name, default))
                               for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    say = print if rank == 0 else lambda *_: None
    device = choose_device(given.get("device"), local_rank)
    settings = {"preset": "nano"} | given
    out = Path(given.get("out") or f"out/{given.get('model', 'leviathan')}-{settings['preset']}")
    checkpoint, damaged = None, []
    if resume and not out.is_dir():
        raise InputError(f"nothing to resume: there is no {out}; name the run's folder with --out")
    if resume:
        checkpoint, damaged = Checkpoint.newest(out, say)
    if checkpoint:
        settings = checkpoint.settings
        for name in given.keys() - MAY_CHANGE:
            if given[name] != settings.get(name):
                raise InputError(f"--{name.replace('_', '-')} is {given[name]}, but the run in {out} has {settings.get(name)}: "
                                 "model, data and schedule cannot change on --resume; start another run with --out")
        settings |= given
    first_step = checkpoint.step if checkpoint else 0
    t = Training(**{field.name: settings[field.name] for field in fields(Training) if field.name in settings})
    shape = {field.name: settings[field.name] for field in fields(Config) if field.name in settings}
    Config.from_preset(t.preset, **shape | dict(vocab_size=1))          # names and shapes, before anything is prepared
    if rank == 0 and not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty: go on with --resume, or name another folder with --out")

    # ---- data --------------------------------------------------------------------------------------------------------
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1))     # rank 0 learns the addresses while the others wait
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0 and t.data == DEFAULT_DATA and not Path(t.data).exists():
        prepare_stdlib(Path(t.data))
    if world > 1:
        dist.barrier()
    meta = read_meta(Path(t.data))
    tokenizer = tokenizer_from_json(meta["tokenizer"])
    if settings.setdefault("vocab_size", tokenizer.n_vocab) != tokenizer.n_vocab:
        raise InputError(f"vocab_size is {settings['vocab_size']:,}, but the tokenizer of {t.data} has {tokenizer.n_vocab:,} ids: "
                         "leave --vocab-size out, or prepare the data with another tokenizer")
    identity = dict(tokenizer=meta["tokenizer"]["fingerprint"], train=meta["train"]["tokens"], val=meta["val"]["tokens"])
    if checkpoint and checkpoint.data != identity:
        raise InputError(f"{t.data} is not the data that the run in {out} was trained on: name that with --data")

    # ---- model -------------------------------------------------------------------------------------------------------
    config = Config.from_preset(t.preset, **shape | dict(vocab_size=tokenizer.n_vocab))
    t.addresses = t.addresses or ("learned" if config.model == "leviathan" and not config.paper else "id")
    t.start = t.start or ("vectors" if config.model == "leviathan" and t.addresses == "learned" else "noise")
    if "base" not in settings and (t.addresses == "learned" or config.model != "leviathan"):      # a twin: the same file of vectors
        config = replace(config, base=addresses.learned_base(config.vocab_size, config.n_coords))
    if t.isoparametric and config.model != "leviathan":
        raise InputError("--isoparametric deepens Leviathan; its twin for comparison is --model dense-untied without it")
    if t.isoparametric and not checkpoint:
        config = replace(config, n_layers=isoparametric_depth(config))
    train_windows, val_windows = (Windows(t.data, split, config.seq_len) for split in ("train", "val"))
    if rank == 0 and not checkpoint:
        addresses.learn_where_needed(config, t.data, t.addresses, t.start)
    if world > 1:
        dist.barrier()
    dtype = t.dtype or ("bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise InputError(f"--dtype {dtype}: choose float32, bfloat16 or float64")
    model = checkpoint.model if checkpoint else addresses.new_model(config, t.seed, t.data, t.addresses, t.start)
    model = model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    optimizer = torch.optim.AdamW(model.decay_groups(t.weight_decay, t.decay_splines), lr=t.learning_rate, betas=(t.beta1, t.beta2),
                                  fused=device.type != "mps")
    if checkpoint:
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=checkpoint.moments))

    # ---- layout: windows of a step -> ranks -> micro-batches ---------------------------------------------------------
    windows_per_step = t.tokens_per_step // config.seq_len
    if t.tokens_per_step % config.seq_len or windows_per_step < world:
        raise InputError(f"--tokens-per-step {t.tokens_per_step}: it must be a multiple of --seq-len ({config.seq_len}) that gives "
                         f"each of {world} ranks at least one window")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    per_window = activation_bytes(config, dtype) * config.seq_len
    room = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 2**31
    per_rank = -(-windows_per_step // world)
    micro_batch = min(per_rank, t.micro_batch or max(1, room // per_window))
    compiled = t.compile if t.compile is not None else device.type == "cuda"
    if compiled:        # in place, so that no parameter's name gains a prefix
        model.compile_parts()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model
    peak = peak_flops(device, dtype)

    # ---- what was chosen and why -------------------------------------------------------------------------------------
    size, n_train = model.n_parameters(), identity["train"]
    method = (f", {config.generator} of mode width {config.mode_width}, {t.addresses} addresses ({config.n_coords} digits of base "
              f"{config.base})" if config.model == "leviathan" else "") + f", start from {t.start}"
    parts = " + ".join(f"{part} {n / 1e6:.2f}" for part, n in model.parameters_by_part().items())
    expected = expected_memory(model, micro_batch * config.seq_len, device, dtype)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    say(f"model    {config.model}{method}, {config.n_layers} layers of width {config.d_model} ({t.preset}): {parts} "
        f"= {size / 1e6:.2f} M parameters")
    say(f"data     {t.data}: {n_train:,} training tokens, {tokenizer.name} of {tokenizer.n_vocab:,} ids; "
        f"a unigram model's validation loss is {meta['unigram_val_loss']:.3f}")
    if meta.get("overlap"):
        say(f"NOTE     {overlap_warning(meta)}")
    say(f"steps    {t.steps:,} of {t.tokens_per_step:,} tokens = {windows_per_step} windows of {config.seq_len}, "
        f"{micro_batch} at once on {world} rank{'s' * (world > 1)}; {t.steps * windows_per_step / len(train_windows):.2f} epochs")
    say(f"device   {device.type} ({machine}), torch {torch.__version__}, {dtype}"
        f"{'' if dtype == 'bfloat16' else ' (bfloat16 pays only where the hardware multiplies in it)'}, "
        f"compile {'on' if compiled else 'off (a CPU gains little and waits for the compiler; --compile turns it on)'}")
    say(f"memory   about {expected / 1e9:.1f} GB for weights, gradients, AdamW, a chunk of logits, and activations "
        "(--micro-batch lowers these)")

    # ---- one evaluation, over windows that never change --------------------------------------------------------------
    def total(*values):
        """Sums over all ranks."""
        values = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        if world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def micro_batches(windows: torch.Tensor):
        for part in windows.split(micro_batch):
            yield part.to(device, non_blocking=True)

    n_eval = min(len(val_windows), max(1, t.eval_tokens // config.seq_len))
    eval_indices = np.linspace(0, len(val_windows) - 1, n_eval).astype(int)[rank::world]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def evaluate() -> float:
        loss = 0.0
        if len(eval_indices):
            for batch in micro_batches(torch.from_numpy(np.stack([val_windows[i] for i in eval_indices.tolist()]))):
                with autocast:
                    loss += model(batch[:, :-1], batch[:, 1:]).item() * len(batch)
        return total(loss)[0] / n_eval

    # ---- the loop ----------------------------------------------------------------------------------------------------
    description = dict(config=asdict(config), embedding=type(model.embed_tokens).__name__, training=asdict(t), data=identity,
                       provenance=dict(torch=torch.__version__, python=platform.python_version(), command=sys.argv))
    log_path, recent = out / "log.jsonl", deque(maxlen=SPIKE_WINDOW)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob("*.partial"):
            shutil.rmtree(leftover)
        kept = [line for line in read_log(log_path) if line["step"] <= first_step] if log_path.exists() else []
        with written_whole(log_path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        recent.extend(line["loss"] for line in kept)
        for folder in damaged:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if damaged:
            say(f"going on from {checkpoint.folder}; what is damaged is kept as {damaged[-1].name}.damaged")

    requested = stop = False                # a rank's own wish, and what all ranks agreed on at the end of a step

    def request_stop(number, frame):        # once: after this step; twice: at once
        nonlocal requested
        requested = True
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)

    save = lambda: save_checkpoint(out, step, model, optimizer, description, meta["tokenizer"], t.keep)      # noqa: E731
    model.train()
    bar = tqdm(initial=first_step, total=t.steps, disable=rank > 0, dynamic_ncols=True, unit="step", mininterval=0.5)
    step, last_saved, started = first_step, checkpoint and checkpoint.folder, time.perf_counter()
    for windows in batches(train_windows, windows_per_step, range(first_step, t.steps), t.seed, rank, world, device.type == "cuda"):
        rate = learning_rate(step, t)
        loss = 0.0
        for i, batch in enumerate(micro_batches(windows)):
            last = (i + 1) * micro_batch >= len(windows)
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast:                  # forward alone: else the generator would go backward in bfloat16
                    part = wrapped(batch[:, :-1], batch[:, 1:]) * (len(batch) / windows_per_step)
                (part * world).backward()       # DDP averages over ranks, each of which has a share of the mean
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        loss, any_stop = total(loss.item(), float(requested))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(f"step {step + 1}: the loss is {loss}, the gradient's norm {norm.item()}. The last good checkpoint is "
                             f"{last_saved or 'none yet'}. Try a lower --learning-rate or a longer --warmup-steps")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, stop = step + 1, any_stop > 0

        speed = t.tokens_per_step / (time.perf_counter() - started)
        line = dict(step=step, tokens=step * t.tokens_per_step, loss=loss, lr=rate, grad_norm=norm.item(), tokens_per_second=speed)
        if step % t.eval_every == 0 or step == t.steps:
            line["val_loss"] = evaluate()
        if len(recent) >= SPIKE_WINDOW // 5 and loss > np.mean(recent) + SPIKE_SIGMAS * np.std(recent):
            line["spike"] = True
            if rank == 0:
                tqdm.write(f"step {step:>6,}  the loss has jumped to {loss:.3f}, from {np.mean(recent):.3f} on average before")
        recent.append(loss)
        if rank == 0:
            with open(log_path, "a") as log:
                log.write(json.dumps(line) + "\n")
            if "val_loss" in line:
                tqdm.write(f"step {step:>6,}  validation loss {line['val_loss']:.4f}")
            mfu = {"MFU": f"{speed * model.flops_per_token() / (peak * world):.1%}"} if peak else {}
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", tokens_per_s=f"{speed:,.0f}", **mfu, refresh=False)
            bar.update()
            if step % t.save_every == 0 or step == t.steps or stop:
                last_saved = save()
        if stop:
            break
        started = time.perf_counter()
    bar.close()

    # ---- what came out -----------------------------------------------------------------------------------------------
    if step < t.steps:
        say(f"stopped after step {step}, saved in {last_saved}; to go on, give the same command with --resume")
    elif rank == 0:
        plot_curves(out, meta["unigram_val_loss"], f"{config.model}, {t.preset}: {size / 1e6:.1f} M parameters")
        print(f"a sample of {last_saved}:\n")
        with torch.compiler.set_stance("force_eager"):
            for text, in stream_text(model, tokenizer, [meta["end_of_text"]], 120, temperature=0.8, top_k=50, seed=t.seed):
                print(text, end="", flush=True)
        print(f"\n\ncurves in {out / 'curves.png'}; more text: python sample.py {out}")
    if world > 1:
        del wrapped     # first: DDP as the last owner of a gloo group can wait for ever for the group's thread (torch 2.13)
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        command_line(main)
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit(f"train.py: out of memory ({first}): lower --micro-batch, then --preset")
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            sys.exit(f"train.py: rank {os.environ.get('RANK')} has lost another one, which may have said why ({first}): go on with "
                     "--resume")
        raise
