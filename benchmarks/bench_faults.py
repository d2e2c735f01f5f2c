"""Kills, full disks and disks that go read-only, at every file operation of every command: is anything lost or blocked?

python -m benchmarks.bench_faults [--commands train knn ...] [--sample 5] [--out FILE]

A command runs once undisturbed, which counts its operations on files: opening for writing, creating, renaming,
removing, syncing. Then it runs once for each operation and each fault, in a process of its own, and again without a
fault: that run must end well, with the files and contents of the undisturbed one.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import say
from mvssl.cli import convert, eval, export, features, train
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.config.serialize import to_dict
from pipelines.runtime import parse_arguments, run_cli
from pipelines.views.presets import paper_views

PROG = "python -m benchmarks.bench_faults"
Fault = Literal["kill", "full", "readonly"]
FAULTS: dict[Fault, int | None] = {"kill": None, "full": errno.ENOSPC, "readonly": errno.EROFS}
"""What happens at an operation: a kill -9, or an error of it and of every later one that writes."""
PRELOADED = (
    *("mvssl.training.preflight", "mvssl.cli.evaluations", "mvssl.evaluate.knn"),
    *("mvssl.training.run", "mvssl.weights.export", "mvssl.monitor.report", "matplotlib.pyplot"),
)
"""What commands import when they need it; each fork would spend seconds on it."""
REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")  # work on a full disk, not on a read-only one
OPERATIONS = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.truncate", *REMOVALS)
IGNORED = (
    "train.log",
    "throughput.jsonl",
    "summary.json",
    "environment.json",
    "report.html",
    "losses.png",
    "speed.csv",
)
"""Files that hold times; of them only the names are compared, and of TensorBoard's not even these."""


SUMMARY = "summary"
"""summary.json is of the speed of training, which a run that was resumed when it had finished does not know."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command and the place it writes to.

    Attributes:
        main: entry point, called with the words in sys.argv.
        words: of the command line.
        place: folder or file below the working folder in which its files lie; all else is input.
        again: words of the command that is given after a fault; the same by default.
        copies: what lies there before the command, copied from the working folder.
    """

    main: Callable[[], None]
    words: tuple[str, ...]
    place: str
    again: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda words: words
    copies: str | None = None


def resumed(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a training that resumes if there is something to be resumed."""
    return (*words, "--resume") if Path("work/run/config.json").exists() else words


COMPUTE = ("--device", "cpu", "--decoder", "pillow")
COMMANDS: dict[str, Command] = {
    "convert": Command(main=convert.main, words=("base", "work/shards", "--shard-size", "0.004"), place="work"),
    "convert to beton": Command(main=convert.main, words=("base", "work/beton", "--format", "beton"), place="work"),
    "train": Command(
        main=train.main,
        words=("recipe.json", "--data", "base", "--out", "work/run", *COMPUTE, "--log", "csv"),
        place="work",
        again=resumed,
    ),
    "train with tensorboard": Command(
        main=train.main,
        words=("recipe.json", "--data", "base", "--out", "work/run", *COMPUTE, "--save-every-steps", "1"),
        place="work",
        again=resumed,
    ),
    "train over a run": Command(
        main=train.main,
        words=(
            "recipe.json",
            "--data",
            "base",
            "--out",
            "work/run",
            *COMPUTE,
            "--log",
            "csv",
            "--overwrite",
            "--seed",
            "3",
        ),
        place="work",
        copies="run",
    ),
    "knn": Command(
        main=eval.main,
        words=("knn", "--run", "run", "--data", "base", "--out", "work/eval", "--k", "3", *COMPUTE),
        place="work",
    ),
    "features": Command(main=features.main, words=("base/train", "work/f.npy", "--run", "run", *COMPUTE), place="work"),
    "export": Command(main=export.main, words=("--run", "run", "--out", "work/backbone.safetensors"), place="work"),
    "export a folder": Command(
        main=export.main, words=("--run", "run", "--out", "work/backbone", "--format", "timm-folder"), place="work"
    ),
    "neighbours": Command(
        main=eval.main,
        words=("neighbours", "--run", "run", "--data", "base", "--out", "work/pages", *COMPUTE),
        place="work",
    ),
    "attention": Command(
        main=eval.main,
        words=("attention", "--run", "run", "--data", "base", "--out", "work/pages", *COMPUTE),
        place="work",
    ),
    "report": Command(main=train.main, words=("report", "run", "--out", "work/report.html"), place="work"),
    "report of two": Command(
        main=train.main, words=("report", "run", "other", "--out", "work/report.html"), place="work"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Disturb commands at their file operations.

    Attributes:
        commands: names of the commands; all by default.
        faults: what happens at the operations.
        sample: operations per command and fault, evenly spread, others for each fault; None tries all.
        out: JSON file.
    """

    commands: tuple[str, ...] = tuple(COMMANDS)
    faults: tuple[Fault, ...] = tuple(FAULTS)
    sample: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "sample")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: exit code (negative: signal), what it printed, and the operations it did."""

    code: int
    text: str
    operations: list[str]


def run_disturbed(command: Command, words: Sequence[str], *, fault: Fault | None = None, at: int = -1) -> Ended:
    """Run a command in a fork of this process, with a fault from operation number `at` on."""
    with tempfile.TemporaryDirectory() as folder:
        printed, log = Path(folder) / "printed", Path(folder) / "operations"
        child = os.fork()
        if child == 0:
            try:
                _become(command, words, printed, log, fault, at)
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        return Ended(
            code=os.waitstatus_to_exitcode(status),
            text=printed.read_text(errors="replace") if printed.exists() else "",
            operations=log.read_text().splitlines() if log.exists() else [],
        )


def _become(command: Command, words: Sequence[str], printed: Path, log: Path, fault: Fault | None, at: int) -> None:
    """In the fork: run the command and exit with its code."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    operations = log.open("w", buffering=1)
    place, count = os.path.abspath(command.place), 0

    def count_operation(name: str, path: str) -> None:
        nonlocal count
        number, count = count, count + 1
        print(name, os.path.relpath(path, place), file=operations)
        if fault is None or number < at:
            return
        error = FAULTS[fault]
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault != "full" or name not in REMOVALS:
            raise OSError(error, os.strerror(error), path)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writes else []
        else:
            paths = (
                [part for part in arguments[:2] if isinstance(part, str | os.PathLike)] if event in OPERATIONS else []
            )
        for path in paths:
            if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(place + os.sep):
                count_operation(event, os.path.abspath(path))
                break

    fsync = os.fsync

    def counting_fsync(file: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        if (path + os.sep).startswith(place + os.sep):
            count_operation("fsync", path)
        fsync(file)

    os.fsync = counting_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    sys.argv = ["command", *words]
    try:
        command.main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 98
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def contents(place: Path) -> dict[str, str]:
    """Every file in a place, and the hash of what must be the same in every undisturbed run; "" for what need not."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if "tensorboard" in name or SUMMARY in path.name or not path.is_file():
            continue
        found[name] = "" if path.name in IGNORED else hashlib.sha256(_essence(path)).hexdigest()
    return found


def _essence(path: Path) -> bytes:
    """The content of a file without the times and versions of its run."""
    content = path.read_bytes()
    if path.suffix == ".json":
        plain = json.loads(content)
        if isinstance(plain, dict):
            for key in ("environment", "options", "sha256", "checksum", "versions"):
                plain.pop(key, None)
            content = json.dumps(plain, sort_keys=True).encode()
    if path.suffix == ".safetensors":  # writes its metadata in no order
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        content = json.dumps(header, sort_keys=True).encode() + content[8 + size :]
    if path.suffix == ".pt":
        return b""  # checkpoint.json and the metrics tell; the archive holds times
    return content


def write_inputs(place: Path) -> None:
    """Images and a recipe in the working folder."""
    write_images(place)
    (place / "recipe.json").write_text(json.dumps(to_dict(tiny_recipe())))


def write_images(place: Path) -> None:
    """A few small images of two classes in base/train and base/val."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in "ab":
            folder = place / "base" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def tiny_recipe() -> Recipe:
    """Two epochs of two steps on these images, in a second."""
    return Recipe(
        name="faults",
        views=paper_views(num_local=1, num_cutout=1, size=32, local_size=16, blur_kernel=5),
        backbone=Backbone(name="test_resnet"),
        projector=Head(hidden=(16,), out=8),
        predictor=Head(hidden=(16,), out=8),
        optimizer=Optimizer(kind="lars", base_lr=3.0, warmup_epochs=1),
        epochs=2,
        batch_size=8,
        evaluation=Evaluation(every_epochs=1, resize=32, crop=32, k=(3,)),
    )


def disturb(name: str, faults: Iterable[Fault], *, sample: int | None) -> dict[str, Any]:
    """Try the faults on a command; its row of the result."""
    command, place = COMMANDS[name], Path(COMMANDS[name].place)

    def fresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if command.copies is not None:
            shutil.copytree(command.copies, place / command.copies, symlinks=True)

    fresh()
    undisturbed = run_disturbed(command, command.words)
    if undisturbed.code:
        raise RuntimeError(f"{name} fails without a fault: {undisturbed.text[-2000:]}")
    expected, total = contents(place), len(undisturbed.operations)
    row: dict[str, Any] = {"command": name, "operations": total, "faults": {}, "failures": []}
    faults = tuple(faults)
    for position, fault in enumerate(faults, start=1):
        share = position / (len(faults) + 1)  # each fault comes at operations of its own
        numbers = range(total) if sample is None else sorted({int((n + share) * total / sample) for n in range(sample)})
        failures = []
        for at in numbers:
            fresh()
            ended = run_disturbed(command, command.words, fault=fault, at=at)
            again = run_disturbed(command, command.again(command.words))
            problem = _problem(fault, ended, again, expected, contents(place))
            if problem:
                failures.append({"fault": fault, "at": at, "operation": undisturbed.operations[at], "problem": problem})
                say(f"{name}, {fault} at {at} ({undisturbed.operations[at]}): {problem}")
        row["faults"][fault] = {"tried": len(numbers), "failed": len(failures)}
        row["failures"] += failures
        say(f"{name}: {fault} at {len(numbers)} of {total} operations, {len(failures)} failures")
    return row


def _problem(fault: Fault, ended: Ended, again: Ended, expected: dict[str, str], found: dict[str, str]) -> str:
    """What is wrong after a fault and a second run; "" if nothing."""
    last = (ended.text.strip().splitlines() or ["nothing was printed"])[-1]
    if fault != "kill" and ("Traceback" in ended.text or ended.code not in (0, 1)):
        return f"the command ends with code {ended.code} and no sentence: {last}"
    if fault != "kill" and ended.code == 1 and "error: " not in ended.text:
        return f"the command fails without a reason: {last}"
    if again.code and "which exists: add --overwrite" in again.text and found == expected:
        return ""  # the fault came when all was done
    if again.code:
        return f"the command given again fails: {(again.text.strip().splitlines() or [''])[-1]}"
    if found.keys() != expected.keys():
        return f"other files: {sorted(found.keys() ^ expected.keys())}"
    differ = [name for name in expected if found[name] != expected[name]]
    return f"other contents: {differ}" if differ else ""


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    for name in PRELOADED:
        importlib.import_module(name)
    rows: list[dict[str, Any]] = []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write_inputs(Path())
            trained = run_disturbed(COMMANDS["train"], COMMANDS["train"].words)
            if trained.code:
                raise RuntimeError(trained.text)
            shutil.move("work/run", "run")
            shutil.copytree("run", "other", symlinks=True)
            for name in arguments.commands:
                rows.append(disturb(name, arguments.faults, sample=arguments.sample))
        finally:
            os.chdir(before)
    return {"benchmark": "faults", "sample": arguments.sample, "commands": rows, **measured_by(command)}


def body(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG, args=list(words))
    result = measure(arguments, command=command_of(PROG, words))
    write_result(arguments.out, result)
    return finish(result, None, failed=any(row["failures"] for row in result["commands"]))


if __name__ == "__main__":
    run_cli(lambda: body(sys.argv[1:]))
