"""Train Leviathan or one of its dense twins: one straight script for a CPU, one GPU or many.

    python train.py --model leviathan                                    # on this Python's standard library
    python train.py --model dense-untied                                 # a twin: same blocks, data and order
    torchrun --nproc_per_node=8 train.py --preset 60m --data data/pile   # 8 GPUs
    python train.py --model leviathan --resume                           # go on where a stopped run was

A step is `tokens_per_step` tokens, the same ones for any number of GPUs and any micro-batch: so its number is
all that has to be remembered of the data. AdamW, clipping and the cosine are [P], their numbers [O].
"""
import argparse
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from leviathan import Block, Config, LanguageModel, Modes, isoparametric_depth, load, load_tensors
from prepare_pile import Windows, locked, prepare_stdlib, quiet, read_meta, tokenizer_from_json, written_whole
from sample import choose_device, stream_text

# ---- settings ------------------------------------------------------------------------------------------

PAPER = dict(seq_len=512, mode_width=64, tokens_per_step=262_144)
PRESETS = {     # shape, then recipe; warmup is a share of the steps. The first two are [O]; below, D is [P],
    # depth [R], the recipe [O] but for 512 x 512 tokens a step [P] and 20 tokens a parameter [R, from v2].
    "nano":  dict(d_model=128, n_layers=4, seq_len=128, mode_width=32,
                  learning_rate=6e-3, tokens_per_step=4_096, steps=300, warmup=0.4),
    "micro": dict(d_model=256, n_layers=6, seq_len=256, mode_width=32,
                  learning_rate=2e-3, tokens_per_step=32_768, steps=600, warmup=0.4),
    # When isoparametric 60m has 52 layers, 270m of V = 200,376 has 28; 1.2b sees 24.1B tokens [all P].
    "60m":   PAPER | dict(d_model=256, n_layers=6, learning_rate=1e-3, steps=4_600, warmup=0.1),
    "270m":  PAPER | dict(d_model=768, n_layers=12, learning_rate=6e-4, steps=20_600, warmup=0.05),
    "410m":  PAPER | dict(d_model=1024, n_layers=12, learning_rate=5e-4, steps=31_300, warmup=0.03),
    "1.2b":  PAPER | dict(d_model=2048, n_layers=12, learning_rate=3e-4, steps=92_000, warmup=0.01),
}
MAY_CHANGE = {"data", "out", "device", "dtype", "compile", "micro_batch",   # on --resume
              "eval_every", "eval_tokens", "save_every", "keep"}
ZERO_OR_MORE = {"seed", "warmup_steps", "weight_decay", "final_rate", "beta1", "beta2"}


@dataclass
class Training:
    """Everything but the model's shape. None means: from the preset, or to fit. Raises ValueError."""
    preset: str = "nano"                # nano, micro, 60m, 270m, 410m or 1.2b
    isoparametric: bool = False         # deepen to the size of the untied dense twin [P]
    data: str = "data/stdlib"           # a folder that prepare_pile.py has written; this one is made
    out: str | None = None              # folder of the run; out/<model>-<preset> if left out
    start: str | None = None            # a file of tensors to start from, such as lab.addresses writes
    seed: int = 0                       # of the initial weights and of the order of the data
    steps: int | None = None            # optimizer steps, and the length of the cosine
    tokens_per_step: int | None = None  # over all ranks and micro-batches; a multiple of seq_len
    learning_rate: float | None = None  # at the end of the warm-up
    warmup_steps: int | None = None     # of linear rise: a short one hurts, tables most (results/README.md)
    final_rate: float = 0.1             # share of the learning rate that the cosine ends at
    weight_decay: float = 0.1           # of matrices; norms, codebooks and splines have none
    beta1: float = 0.9                  # AdamW's momentum
    beta2: float = 0.95                 # AdamW's second moment
    clip: float = 1.0                   # largest norm of the gradient
    micro_batch: int | None = None      # windows a device takes at once: lower it when memory runs out
    eval_every: int | None = None       # steps between evaluations; a fifth of the run if left out
    eval_tokens: int = 65_536           # of validation, evenly spaced and always the same
    save_every: int | None = None       # steps between checkpoints; a tenth of the run if left out
    keep: int = 2                       # newest checkpoints to keep
    device: str | None = None           # cpu, cuda or mps; the best there is if left out
    dtype: str | None = None            # float32, bfloat16 (autocast) or float64; the faster if left out
    compile: bool | None = None         # torch.compile what repeats; on CUDA if left out

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            kind = kind | int if isinstance(0.0, kind) else kind            # an int will do for a float
            if value == "" or not isinstance(value, kind):
                raise ValueError(f"--{field.name.replace('_', '-')} cannot be {value!r}")
        for name, known in (("preset", PRESETS), ("dtype", (None, "float32", "bfloat16", "float64"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is unknown: choose from "
                                 f"{', '.join(filter(None, known))}")
        recipe = PRESETS[self.preset]
        steps = recipe["steps"] if self.steps is None else self.steps
        usual = recipe | dict(warmup_steps=int(recipe["warmup"] * steps), eval_every=max(1, steps // 5),
                              save_every=max(1, steps // 10))
        for name, value in vars(self).items():
            if value is None:
                setattr(self, name, value := usual.get(name))
            least = 0 if name in ZERO_OR_MORE else 1e-12
            most = dict(final_rate=1, beta1=1, beta2=1, tokens_per_step=2**27).get(name, 2**63 - 1)
            if type(value) in (int, float) and not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be "
                                 f"{'at least 0' if least == 0 else 'above 0'} and at most {most:g}")


def only(settings: type, given: dict) -> dict:
    """Those of the given that are fields of `settings`."""
    return {field.name: given[field.name] for field in fields(settings) if field.name in given}


def preset(name: str, **overrides) -> Config:
    """The shape called `name`, with any field overridden."""
    return Config(**only(Config, PRESETS[name]) | overrides)


def parse_arguments() -> dict:
    """The flags given: one for each field of Config and Training, with the comment beside it as its help."""
    parser = argparse.ArgumentParser(description="Train Leviathan or one of its dense twins.",
                                     usage="%(prog)s [--resume] [--FLAG VALUE ...]; --help lists them",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    for settings, title in ((Config, "model; numbers from the preset"), (Training, "training")):
        group = parser.add_argument_group(title)
        comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(settings), re.MULTILINE))
        for field in fields(settings):
            kind, *_ = get_args(field.type) or [field.type]         # int of int | None
            how = dict(type=kind, metavar="X")
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            chosen = field.default is None or field.name in ("vocab_size", *PRESETS["nano"])
            shown = "" if chosen else f" [{field.default}]"
            group.add_argument(f"--{field.name.replace('_', '-')}", help=comments[field.name] + shown, **how)
    return vars(parser.parse_args())


def learning_rate(step: int, t: Training) -> float:
    """Linear warm-up, then a cosine from learning_rate to final_rate of it; step counts from 0."""
    if step < t.warmup_steps:
        return t.learning_rate * (step + 1) / t.warmup_steps
    progress = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
    return t.learning_rate * (t.final_rate + (1 - t.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


# ---- the order of the data -----------------------------------------------------------------------------

@lru_cache(maxsize=2)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def window_stream(windows: Windows, positions, seed: int) -> np.ndarray:
    """The windows at these positions of an endless stream, each epoch of which has every window once.

    (n) -> (n, seq_len + 1). A position is all the state there is: any can be reached at once, on any rank.
    """
    places = (divmod(position, len(windows)) for position in positions)
    return np.stack([windows[int(shuffled(len(windows), seed, epoch)[i])] for epoch, i in places])


# ---- models and their checkpoints ----------------------------------------------------------------------

def build(config: Config, t: Training) -> LanguageModel:
    """The model at its start. A file decides n_coords, base and d_seed too: by the shape of its codebooks."""
    try:
        given = load_tensors(t.start) if t.start else {}
        whose = given.pop("tokenizer", None)            # of what lab.addresses writes
        if whose and whose != read_meta(t.data)["tokenizer"]["sha256"]:
            raise ValueError(f"it was made for another tokenizer than that of {t.data}")
        if t.start and not (given and all(x.isfinite().all() for x in given.values())):
            raise ValueError("it is empty, or its numbers are not finite")
        if config.model == "leviathan" and "embed_tokens.codebooks" in given:
            n_coords, base, d_seed = given["embed_tokens.codebooks"].shape
            config = replace(config, n_coords=n_coords, base=base, d_seed=d_seed)
        if t.isoparametric:
            config = replace(config, n_layers=isoparametric_depth(config))
        torch.manual_seed(t.seed)           # for what a generator of one's own draws as it is built
        model = LanguageModel(config, seed=t.seed)
        if strange := model.load_state_dict(given, strict=False).unexpected_keys:
            raise ValueError(f"--model {config.model} has no {min(strange)}")
        if (a := given.get("embed_tokens.addresses")) is not None:
            room = model.embed_tokens.base ** model.embed_tokens.n_coords
            if a.is_floating_point() or len(a.unique()) < len(a) or not 0 <= a.min() <= a.max() < room:
                raise ValueError(f"addresses must be different integers in 0 ... {room - 1:,}")
        return model
    except Exception as error:          # of whatever the file holds
        if not t.start:
            raise
        raise ValueError(f"--start {t.start} does not fit here: {' '.join(str(error).split())}") from error


def checkpoints(out: Path) -> list[Path]:
    """Those of a run, oldest first. Names must match exactly: a user's copies are none."""
    return sorted(path for path in out.glob("step-" + 8 * "[0-9]") if path.is_dir())


def save_tensors(content, path: Path):
    """What load_tensors reads; the file takes its name when it is whole. Raises OSError."""
    with written_whole(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:       # torch.save's own, in place of the disk's
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save(out: Path, step: int, model, optimizer, about: dict, tokenizer: dict, keep: int):
    """Write `out/step-…` aside and rename it when whole; then delete all but the newest `keep`."""
    folder, partial = out / f"step-{step:08d}", out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)          # of a run that was killed as it saved
    try:
        partial.mkdir()
        for name, content in (("config.json", dict(step=step) | about), ("tokenizer.json", tokenizer)):
            with written_whole(partial / name) as path:
                path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name, part in (("model.pt", model), ("optimizer.pt", optimizer)):
            save_tensors(part.state_dict(), partial / name)
        shutil.rmtree(folder, ignore_errors=True)       # one that was found damaged
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"step {step} could not be saved in {out} ({error}): once that is mended, --resume "
                         "goes on from the checkpoint before") from error
    for old in [path for path in checkpoints(out) if path <= folder][:-keep]:       # later ones are damaged
        shutil.rmtree(old, ignore_errors=True)          # a link, or what somebody reads or protects, stays


def newest_whole(out: Path, say) -> tuple[dict, LanguageModel, dict]:
    """config.json, model and optimizer's state of the newest checkpoint that is not damaged."""
    for folder in reversed(checkpoints(out)):
        try:
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            Training(**only(Training, about["training"]))
            if about["step"] != int(folder.name[5:]) or not about["data"]:
                raise ValueError(f"{folder}: config.json lacks what train.py writes")
            model, moments = load(folder), load_tensors(folder / "optimizer.pt")
            optimizer = torch.optim.AdamW(model.decay_groups(0))
            optimizer.load_state_dict(moments)
            if any(own[name].shape != p.shape for p, own in optimizer.state.items()
                   for name in ("exp_avg", "exp_avg_sq")):      # which torch trusts
                raise ValueError(f"{folder}: optimizer.pt is of another model")
            return about, model, moments
        except (PermissionError, MemoryError):
            raise                           # it may be whole
        except Exception as error:          # of whatever a file holds
            say(f"{folder} is damaged, so the one before it is looked for: {error}")
    raise ValueError(f"nothing to resume: no checkpoint in {out} is whole")


def compile_parts(module):
    """torch.compile in place what repeats: once for all blocks, once for all chunks of ids, or of logits."""
    for part in module.modules():
        if isinstance(part, (Block, Modes)):
            part.compile(dynamic=True if isinstance(part, Modes) else None)
        elif isinstance(part, LanguageModel):
            part.softmax = torch.compile(part.softmax)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has instructions for it, as torch knows; elsewhere float32 is as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(there for name, there in known.items() if "bf16" in name)


def plot_curves(log: list[dict], unigram: float, title: str, path: Path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*((line["tokens"], line["loss"]) for line in log)), lw=0.8, alpha=0.6, label="training")
    scored = [(line["tokens"], line["val_loss"]) for line in log if "val_loss" in line]
    tokens, losses = zip(*scored or [(0, math.nan)])            # a log may have been lost
    axes.plot(tokens, losses, "o-", ms=4, label=f"validation ({losses[-1]:.3f} at the end)")
    axes.axhline(unigram, ls="--", lw=1, color="gray", label=f"a unigram model ({unigram:.3f})")
    axes.set(xlabel="training tokens", ylabel="loss, nats per token", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    with ExitStack() as held:               # the folder's lock, and what signals did before
        run(held)


def run(held: ExitStack):
    # ---- what to run: the flags, or a checkpoint's settings --------------------------------------------
    given = parse_arguments()
    resume = given.pop("resume", False)
    rank, local_rank, world = (int(os.environ.get(name) or default)
                               for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank}, WORLD_SIZE {world}: unset them, or let torchrun set them")
    stop = False

    def say(text: str):
        nonlocal stop
        try:
            if rank == 0:
                tqdm.write(text)
                sys.stdout.flush()
        except OSError:         # the terminal or the pipe is gone: finish the step and save, but say no more
            stop = True
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    out = Path(given.get("out", f"out/{given.get('model', 'leviathan')}-{given.get('preset', 'nano')}"))
    if resume and not out.is_dir():
        raise ValueError(f"nothing to resume: there is no {out}; name the run's folder with --out")
    inside = {*os.listdir(out)} - {".lock", "lost+found"} if out.exists() else set()
    if inside and not resume:
        raise ValueError(f"{out} is not empty: go on with --resume, or name another folder with --out")
    if resume and not checkpoints(out) and inside - {"log.jsonl", ".log.jsonl.tmp", ".partial"}:
        raise ValueError(f"nothing to resume: no checkpoint in {out}, but other files; name the run's folder")
    if resume and rank == 0:
        held.enter_context(locked(out))     # before anything is read
    settings, about = given, None
    if resume and checkpoints(out):         # else it was stopped before its first: begin again
        about, model, moments = newest_whole(out, say)
        say(f"resumed  after step {about['step']:,} of {out}")
        settings = about["config"] | about["training"]
        for name in given.keys() - MAY_CHANGE:
            if given[name] != settings.get(name):
                raise ValueError(f"--{name.replace('_', '-')} is {given[name]}, but the run in {out} has "
                                 f"{settings.get(name)}: start another run with --out")
        settings |= given
    t, shape = Training(**only(Training, settings)), only(Config, settings)
    config = preset(t.preset, **shape)      # raises before any data is prepared
    device = choose_device(t.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # ---- data ------------------------------------------------------------------------------------------
    if rank == 0 and t.data == Training.data:
        prepare_stdlib(t.data)
    if world > 1:
        dist.barrier()
    meta = read_meta(t.data)
    tokenizer = tokenizer_from_json(meta["tokenizer"])
    if about and about["data"] != meta["identity"]:
        raise ValueError(f"{t.data} is not what the run in {out} was trained on: name that with --data")
    if shape.setdefault("vocab_size", tokenizer.n_vocab) != tokenizer.n_vocab:
        raise ValueError(f"--vocab-size {shape['vocab_size']}: leave it out, for {t.data} has a tokenizer of "
                         f"{tokenizer.n_vocab:,} ids, or prepare data with another one")

    # ---- model -----------------------------------------------------------------------------------------
    if not about:
        model = build(preset(t.preset, **shape), t)
    config = model.config
    dtype = t.dtype or ("bfloat16" if multiplies_bfloat16(device) else "float32")
    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    optimizer = torch.optim.AdamW(model.decay_groups(t.weight_decay), lr=t.learning_rate,
                                  betas=(t.beta1, t.beta2), fused=device.type != "mps")
    if about:
        optimizer.load_state_dict(moments)

    # ---- layout: windows of a step -> ranks -> micro-batches -------------------------------------------
    train_windows, val_windows = (Windows(t.data, split, config.seq_len) for split in ("train", "val"))
    per_step = t.tokens_per_step // config.seq_len
    if t.tokens_per_step % config.seq_len or per_step < world:
        raise ValueError(f"--tokens-per-step {t.tokens_per_step}: it must be a multiple of --seq-len "
                         f"{config.seq_len} that gives each of {world} ranks a window at least")
    activations = 26 * config.d_model * config.n_layers * config.seq_len * (2 if dtype == "bfloat16" else 4)
    room = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 2**31
    micro_batch = t.micro_batch or max(1, min(-(-per_step // world), room // activations))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    compiled = device.type == "cuda" if t.compile is None else t.compile
    if compiled:                            # in place, so that no parameter's name gains a prefix
        compile_parts(model)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    # ---- what was chosen -------------------------------------------------------------------------------
    sizes = model.parameters_by_part()
    size = f"{sum(sizes.values()) / 1e6:.2f} M parameters"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"model    {config.model}, {config.n_layers} layers of width {config.d_model} ({t.preset}): {size}, "
        + ", ".join(f"{n / 1e6:.2f} in its {part}" for part, n in sizes.items()))
    say(f"data     {t.data}: {meta['train']['tokens']:,} training tokens, {tokenizer.n_vocab:,} ids; "
        f"a unigram model's validation loss is {meta['unigram_val_loss']:.3f}")
    say(f"steps    {t.steps:,}, {t.warmup_steps:,} of warm-up, of {per_step} windows of {config.seq_len}: "
        f"{t.steps * per_step / len(train_windows):.2f} epochs, {micro_batch} at once on {world} rank(s)")
    say(f"device   {device.type} ({name}), torch {torch.__version__}, {dtype}{', compiled' * compiled}"
        + " (the hardware multiplies in it; --dtype float32 does without)" * (dtype == "bfloat16"))

    # ---- one evaluation, over windows that never change ------------------------------------------------
    def total(*values):
        """Sums over all ranks."""
        values = torch.tensor(values, dtype=torch.float64, device=device if world > 1 else "cpu")
        if world > 1:
            dist.all_reduce(values)
        return values.tolist()

    n_eval = min(len(val_windows), max(1, t.eval_tokens // config.seq_len))
    own = np.linspace(0, len(val_windows) - 1, n_eval).astype(int)[rank::world].tolist()

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def evaluate() -> float:
        loss, at_once = 0.0, 4 * micro_batch            # without gradients more fit
        for i in range(0, len(own), at_once):
            batch = torch.from_numpy(np.stack([val_windows[n] for n in own[i:i + at_once]])).to(device)
            with autocast:
                loss += model(batch[:, :-1], batch[:, 1:]).item() * len(batch)
        return total(loss)[0] / n_eval

    # ---- the loop --------------------------------------------------------------------------------------
    step = about["step"] if about else 0
    if total(step)[0] != world * step:
        raise ValueError(f"the ranks find different checkpoints in {out}: give all of them the same folder")
    about = dict(config=asdict(config), data=meta["identity"], torch=torch.__version__,
                 training=asdict(t) | shape)        # the shape as given: --isoparametric deepens it
    log_path, log = out / "log.jsonl", []
    if rank == 0:
        if not resume:                      # now that all else is known to be right
            Path(os.path.realpath(out)).mkdir(parents=True, exist_ok=True)      # what a link points to
            held.enter_context(locked(out))
            if log_path.exists():
                raise ValueError(f"another run has written {out} meanwhile: name another folder with --out")
        else:                               # a new run's log begins with its first step
            for line in log_path.read_text(errors="replace").splitlines() if log_path.exists() else ():
                try:
                    entry = json.loads(line)
                    known = math.isfinite(entry["tokens"] + entry["loss"] + entry.get("val_loss", 0))
                    log += [entry] * (known and entry["step"] <= step)
                except Exception:           # of whatever it holds
                    say(f"{log_path}: a damaged line is left out")
            with written_whole(log_path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in log))

    def finish_step(*_):                    # and then stop; Ctrl-C again stops at once
        nonlocal stop
        stop = True
        if signal.getsignal(signal.SIGINT) is finish_step:      # what was ignored, stays so
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) and signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            held.callback(signal.signal, number, signal.signal(number, finish_step))

    def diverged(step: int, what: str) -> ValueError:
        return ValueError(f"step {step}: {what}. Try a lower --learning-rate or more --warmup-steps; last "
                          f"saved: {max(checkpoints(out), default='nothing')}")

    def read(step: int):
        """This rank's windows of a step, whose order depends on nothing but its number."""
        positions = range(step * per_step + rank, (step + 1) * per_step, world)
        return torch.from_numpy(window_stream(train_windows, positions, t.seed))

    bar = tqdm(initial=step, total=t.steps, unit="step", disable=rank > 0 or quiet())
    reader, started, stops = ThreadPoolExecutor(1), time.perf_counter(), False
    ahead = reader.submit(read, step)
    while step < t.steps and not stops:
        windows, ahead = ahead.result().to(device), reader.submit(read, step + 1)
        loss, rate, parts = 0.0, learning_rate(step, t), windows.split(micro_batch)
        for i, batch in enumerate(parts):
            with nullcontext() if world == 1 or i == len(parts) - 1 else wrapped.no_sync():
                with autocast:              # forward alone: else the generator would go backward in bfloat16
                    part = wrapped(batch[:, :-1], batch[:, 1:]) * (len(batch) / per_step)
                (part * world).backward()   # DDP averages over ranks, each of which has a share of the mean
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip).item()
        loss, stops = total(loss.item(), float(stop))
        if not math.isfinite(loss + norm):
            raise diverged(step + 1, f"the loss is {loss}, the gradient's norm {norm}")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        speed = t.tokens_per_step / (time.perf_counter() - started)
        step += 1
        line = dict(step=step, tokens=step * t.tokens_per_step, loss=loss, lr=rate, grad_norm=norm,
                    tokens_per_second=speed)
        if step % t.eval_every == 0 or step == t.steps:
            if not math.isfinite(val_loss := evaluate()):
                raise diverged(step, f"the validation loss is {val_loss}")
            line["val_loss"] = val_loss
            say(f"step {step:>6,}  loss {loss:.4f}  validation {val_loss:.4f}  {speed:,.0f} tokens/s")
        if rank == 0:
            log.append(line)
            with open(log_path, "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
            bar.update()
            if step % t.save_every == 0 or step == t.steps or stops:
                save(out, step, model, optimizer, about, meta["tokenizer"], t.keep)
        started = time.perf_counter()
    bar.close()

    # ---- what came out ---------------------------------------------------------------------------------
    if step < t.steps:
        say(f"stopped after step {step}, saved in {out}; to go on, give the same command with --resume")
    elif rank == 0:
        plot_curves(log, meta["unigram_val_loss"], f"{config.model}, {t.preset}: {size}", out / "curves.png")
        with torch.compiler.set_stance("force_eager"):
            text = stream_text(model, tokenizer, [meta["end_of_text"]], 120, temperature=0.8, top_k=50)
            say("a sample:\n\n" + "".join(piece for piece, in text))
        say(f"\ncurves in {out / 'curves.png'}; more text: python sample.py {out}")
    if world > 1:
        del wrapped     # first: DDP as the last owner of a gloo group can wait for ever (torch 2.13)
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))   # >&-
    if hasattr(sys.stdout, "reconfigure"):              # not in a notebook
        sys.stdout.reconfigure(errors="replace")        # where a character is lacking, "?"
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    except (RuntimeError, MemoryError) as error:        # of torch.compile, CUDA, the CPU's allocator, numpy
        if re.search(r"C(\+\+)? compiler", str(error)):
            sys.exit("train.py: torch.compile finds no C++ compiler: install one, or give --no-compile")
        if not re.search("(of|enough|allocate) memory|MemoryError|overflow", repr(error)):
            raise
        sys.exit(f"train.py: out of memory ({error!r:.300}): lower --micro-batch, or take a smaller model")
