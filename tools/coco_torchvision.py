"""Trains Mask R-CNN FPN on COCO's format from an exported ResNet, with torchvision (PAPER.md section 6).

    mvssl-export --run RUN --format torchvision --out backbone.pth
    python -m tools.coco_torchvision --weights backbone.pth --data coco --out runs/coco
    torchrun --nproc-per-node 8 -m tools.coco_torchvision --weights backbone.pth --data coco --out runs/coco

Needs torchvision and pycocotools (pip install 'mvssl[coco]'). The settings are MoCo's (He et al., arXiv 1911.05722,
section 4.2.2), those of tools/coco_detection.py, which uses Detectron2: FPN, BatchNorm fine-tuned and synchronised,
also in the FPN, the 1x (90,000 steps of 16 images) or 2x schedule, short sides of 640 to 800 pixels, horizontal flips;
running statistics are computed again on training images at the end (PreciseBN, Wu & Johnson, arXiv 2105.07576). What
differs is what the libraries do differently, such as the offsets of anchors and the sampling of proposals.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from pipelines.files import whole_file, write_whole
from pipelines.names import say
from pipelines.runtime import InputError, describe_os_error, invalid, parse_arguments, run_cli
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD
from tools.coco_data import CocoSplit, detections, flipped, score

STEPS = {"1x": 90_000, "2x": 180_000}
BLOCKS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}  # depth by stages
WARMUP = 1000  # steps of linear warm-up from a thousandth, as Detectron2
PRECISE = 200  # batches for running statistics, as Detectron2's TEST.PRECISE_BN


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train Mask R-CNN FPN on data in COCO's format and score it with pycocotools.

    Attributes:
        weights: file written by mvssl-export --format torchvision.
        data: folder with annotations/instances_NAME.json and NAME/ for the names below.
        out: folder for checkpoints and results.json.
        train: name of the training split.
        val: name of the split that is scored.
        schedule: 1x is 90,000 steps of 16 images, 2x twice as many.
        steps: number of steps instead, for data smaller than COCO; learning rates drop at 2/3 and 8/9 of them.
        batch_size: images per step over all processes; learning rate and schedule scale with it.
        base_lr: learning rate of a batch of 16.
        short_side: shortest and longest length of the short side in training; the longest one is used for scoring.
        amp: bfloat16 autocast.
        workers: processes that load images, for each training process.
        device: cuda or cpu; auto takes CUDA if available.
        seed: of the order, the flips and the new layers.
        save_every: steps between two checkpoints.
        resume: resume the run in `out` from its last checkpoint.
        overwrite: delete the results in `out` first.
    """

    weights: Path
    data: Path
    out: Path
    train: str = "train2017"
    val: str = "val2017"
    schedule: Literal["1x", "2x"] = "1x"
    steps: int | None = None
    batch_size: int = 16
    base_lr: float = 0.02
    short_side: tuple[int, int] = (640, 800)
    amp: bool = False
    workers: int = 4
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0
    save_every: int = 5000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("steps", 1), ("workers", 0), ("save_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise invalid(name, value, f"at least {least}", "give such a number")
        if not 0 < self.base_lr < math.inf:
            raise invalid("base_lr", self.base_lr, "above 0", "0.02 is Detectron2's")
        if not 16 <= self.short_side[0] <= self.short_side[1]:
            raise invalid(
                "short_side", self.short_side, "two lengths of at least 16, the smaller one first", "swap them"
            )

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; the schedule's images divided by the batch."""
        return self.steps or round(STEPS[self.schedule] * 16 / self.batch_size)

    def learning_rate(self, step: int) -> float:
        """Of a step from 0: linear in the batch (arXiv 1706.02677), warmed up, divided by ten at 2/3 and at 8/9."""
        total, scale = self.total_steps, self.batch_size / 16
        warm = min(WARMUP, total // 10)
        rate = self.base_lr * scale * 0.1 ** sum(step >= round(total * share) for share in (2 / 3, 8 / 9))
        return rate * (0.001 + 0.999 * step / warm) if step < warm else rate


def build(arguments: Arguments, classes: int, *, synchronised: bool) -> nn.Module:
    """Mask R-CNN FPN on the exported ResNet, with BatchNorm in backbone and FPN and nothing frozen.

    Args:
        arguments: weights, sizes and seed.
        classes: number of categories, without background.
        synchronised: batch statistics over all processes.
    """
    from torchvision.models import get_model
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    tensors = _read(arguments.weights)
    depth = _depth(tensors, arguments.weights)
    torch.manual_seed(arguments.seed)
    resnet: Any = get_model(f"resnet{depth}", weights=None)
    wanted = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    wrong = [n for n, v in wanted.items() if n not in tensors or tensors[n].shape != v.shape]
    if wrong:
        raise InputError(
            f"weights is {str(arguments.weights)!r}, which does not fit a ResNet-{depth} ({wrong[0]} is missing or of "
            "another shape): export it with mvssl-export --format torchvision."
        )
    resnet.load_state_dict({n: tensors[n] for n in wanted}, strict=False)
    backbone = _resnet_fpn_extractor(resnet, trainable_layers=5, norm_layer=nn.BatchNorm2d)
    low, high = arguments.short_side
    model: nn.Module = MaskRCNN(
        backbone,
        num_classes=classes + 1,
        min_size=tuple(range(low, high + 1, 32)),  # one is drawn for each batch; the last one is for scoring
        max_size=round(high * 1333 / 800),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model) if synchronised else model


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"weights is {str(path)!r} but {describe_os_error(error)}: run mvssl-export --format torchvision first."
        ) from error
    except Exception as error:  # torch raises many types for what it cannot read
        raise InputError(
            f"weights is {str(path)!r}, which torch cannot read ({str(error).splitlines()[0]}): write it with "
            "mvssl-export --format torchvision."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"weights is {str(path)!r}, which holds no tensors by name: export it with mvssl-export.")
    return tensors


def _depth(tensors: Mapping[str, Tensor], path: Path) -> int:
    one, two, three, four = (
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    depth = BLOCKS.get((one, two, three, four))
    if depth is None:
        raise InputError(
            f"weights is {str(path)!r}, whose stages have {one}, {two}, {three} and {four} blocks, but must be a "
            "ResNet-18, 34, 50, 101 or 152 of mvssl-export --format torchvision: choose a run with such a backbone."
        )
    # ResNet-34 has as many blocks as ResNet-50, of two convolutions instead of three.
    return 34 if depth == 50 and "layer1.0.conv3.weight" not in tensors else depth


class Batches:
    """Batches of images and instances for each step, a pure function of (seed, step), so that a run can be resumed.

    An epoch is a permutation; images of portrait and landscape format are batched apart, as both libraries do, so that
    padding stays small: each batch is filled from the permutation's next images of one format.
    """

    def __init__(self, split: CocoSplit, *, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        self._split, self._size, self._seed = split, batch_size, seed
        self._share = slice(rank, None, ranks)
        images = split.coco.imgs
        self._wide = [images[i].get("width", 1) >= images[i].get("height", 1) for i in split.ids]

    def epoch(self, number: int) -> list[list[tuple[int, bool]]]:
        """Index and flip of every image, by batch, in the order of steps; at least one batch."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        count = len(self._split)
        order = torch.randperm(max(count, self._size), generator=generator) % count
        flips = torch.rand(len(order), generator=generator) < 0.5
        waiting: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
        batches = []
        for index, flip in zip(order.tolist(), flips.tolist(), strict=True):
            held = waiting[self._wide[index]]
            held.append((index, flip))
            if len(held) == self._size:
                batches.append(held.copy())
                held.clear()
        if not batches:  # small data: formats are mixed
            batches.append([*waiting[True], *waiting[False]][: self._size])
        return batches

    def __call__(self, *, start: int, stop: int) -> Iterator[list[tuple[int, bool]]]:
        """This rank's share of each batch, from step `start` to `stop`."""
        step, epoch = 0, 0
        while step < stop:
            for batch in self.epoch(epoch):
                if start <= step < stop:
                    yield batch[self._share]
                step += 1
            epoch += 1


class _Drawn(torch.utils.data.Dataset[tuple[Tensor, dict[str, Any]]]):
    """A split indexed by (index, flip)."""

    def __init__(self, split: CocoSplit) -> None:
        self._split = split

    def __getitem__(self, drawn: tuple[int, bool]) -> tuple[Tensor, dict[str, Any]]:
        image, target = self._split[drawn[0]]
        return flipped(image, target) if drawn[1] else (image, target)


def _collate(items: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, targets = zip(*items, strict=True)
    return list(images), [{k: v for k, v in target.items() if k != "image_id"} for target in targets]


@dataclass(frozen=True, kw_only=True)
class World:
    """Place of this process among those of torchrun."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, arguments: Arguments) -> World:
        """Join the processes that torchrun started; alone without it."""
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        kind = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda but torch sees no GPU: choose --device cpu, or check the driver.")
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
        if arguments.batch_size % size:
            raise invalid("batch_size", arguments.batch_size, f"a multiple of the {size} processes", "change it")
        if size > 1:
            if kind == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(rank=rank, size=size, device=device)


def train(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Train and score; returns what results.json holds."""
    world = World.join(arguments)
    data = arguments.data
    splits = [
        CocoSplit(
            images=data / name,
            annotations=data / "annotations" / f"instances_{name}.json",
            only_annotated=name == first,
        )
        for first, name in ((arguments.train, arguments.train), ("", arguments.val))
    ]
    training, validation = splits
    if training.categories != validation.categories:
        raise InputError(
            f"the categories of {arguments.train} and {arguments.val} differ: give splits of one data set."
        )
    synchronised = world.size > 1 and world.device.type == "cuda"  # torch has it for CUDA only
    model = build(arguments, len(training.categories), synchronised=synchronised).to(world.device)
    wrapped = nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.base_lr, momentum=0.9, weight_decay=1e-4)
    path = arguments.out / "checkpoint.pt"
    start = _restore(path, model, optimizer, world.device) if arguments.resume and path.exists() else 0
    batches = Batches(training, batch_size=arguments.batch_size, seed=arguments.seed, rank=world.rank, ranks=world.size)
    _say(
        console,
        world,
        f"{len(training):,} images, {len(training.categories)} categories, {arguments.total_steps:,} "
        f"steps of {arguments.batch_size} from step {start}, scored on {len(validation):,} images, on {world.device}",
    )
    loader = partial(
        torch.utils.data.DataLoader,
        _Drawn(training),
        collate_fn=_collate,
        num_workers=arguments.workers,
        persistent_workers=False,
    )
    model.train()
    for step, (images, targets) in enumerate(
        loader(batch_sampler=list(batches(start=start, stop=arguments.total_steps))), start
    ):
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate(step)
        torch.manual_seed(arguments.seed * 1_000_003 + step * world.size + world.rank)  # sampling of proposals, sizes
        with _autocast(arguments, world):
            losses = wrapped(*_to(world.device, images, targets))
            loss: Tensor = sum(losses.values(), torch.zeros((), device=world.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = step + 1
        if done % max(1, min(50, arguments.total_steps // 10)) == 0 or done == arguments.total_steps:
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"the loss is {value} at step {done}: lower --base-lr, or resume with it lowered.")
            parts = ", ".join(f"{name.removeprefix('loss_')} {part.item():.3f}" for name, part in losses.items())
            rate = arguments.learning_rate(step)
            _say(console, world, f"step {done}/{arguments.total_steps}: loss {value:.3f} ({parts}), lr {rate:.2g}")
        if world.rank == 0 and (done % arguments.save_every == 0 or done == arguments.total_steps):
            with whole_file(path) as temporary:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, temporary)
    if world.rank == 0:  # each step's statistics are of few images
        precise = list(batches(start=0, stop=min(PRECISE, arguments.total_steps)))
        _recompute_statistics(model, loader(batch_sampler=precise), world.device)
    results = {}
    if world.rank == 0:
        results = {
            "results": _score(model, validation, world, arguments),
            "steps": arguments.total_steps,
            "batch_size": arguments.batch_size,
            "images": {arguments.train: len(training), arguments.val: len(validation)},
        }
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return results


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step: int = saved["step"]
    except Exception as error:  # a damaged file, or one of another model
        raise InputError(
            f"{path} cannot be resumed ({str(error).splitlines()[0]}): resume with the same options and data, or start "
            "again with --overwrite."
        ) from error
    return step


def _to(device: torch.device, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Any, Any]:
    return [i.to(device) for i in images], [{k: v.to(device) for k, v in t.items()} for t in targets]


def _autocast(arguments: Arguments, world: World) -> torch.autocast:
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=arguments.amp)


@torch.no_grad()
def _recompute_statistics(model: nn.Module, loader: Any, device: torch.device) -> None:
    """Set BatchNorm's running statistics to means over whole batches, with the weights at the end."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    model.train()
    for images, targets in loader:
        model(*_to(device, images, targets))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


@torch.no_grad()
def _score(model: nn.Module, split: CocoSplit, world: World, arguments: Arguments) -> dict[str, dict[str, float]]:
    model.eval()
    found = []
    loader = torch.utils.data.DataLoader(split, batch_size=None, num_workers=arguments.workers)
    for image, target in loader:
        with _autocast(arguments, world):
            (output,) = model([image.to(world.device)])
        found += detections(
            split,
            target["image_id"],
            {name: value.float() if value.is_floating_point() else value for name, value in output.items()},
        )
    return score(split, found)


def _say(console: Console, world: World, text: str) -> None:
    if world.rank == 0:
        say(console, text)


def body() -> None:
    """Run the command."""
    arguments = parse_arguments(Arguments, prog="python -m tools.coco_torchvision", args=sys.argv[1:])
    results = arguments.out / "results.json"
    rank0 = int(os.environ.get("RANK", 0)) == 0
    if rank0 and any((arguments.out / name).exists() for name in ("results.json", "checkpoint.pt")):
        if not arguments.resume and not arguments.overwrite:
            raise InputError(
                f"out is {str(arguments.out)!r}, which holds a run: add --resume or --overwrite, or name another one."
            )
        if arguments.overwrite:
            for name in ("results.json", "checkpoint.pt"):
                (arguments.out / name).unlink(missing_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    content = train(arguments, console)
    if rank0:
        write_whole(results, json.dumps(content, indent=2) + "\n")
        for kind, name in (("bbox", "boxes"), ("segm", "masks")):
            values = ", ".join(f"{metric} {value:.1f}" for metric, value in content["results"][kind].items())
            say(console, f"{name}: {values}")
        say(console, str(results))


if __name__ == "__main__":
    run_cli(body)
