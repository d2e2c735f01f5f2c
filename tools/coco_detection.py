"""Trains Mask R-CNN FPN on COCO from an exported ResNet, with Detectron2 (PAPER.md section 6).

    mvssl-export --run RUN --format detectron2 --out backbone.pkl
    DETECTRON2_DATASETS=DATASETS python -m tools.coco_detection --weights backbone.pkl --out coco

Needs Detectron2 and COCO 2017 in DATASETS/coco, in the layout of Detectron2's documentation. The settings are MoCo's
(He et al., arXiv 1911.05722, section 4.2.2): FPN, BatchNorm fine-tuned and synchronised, also in the FPN, the 1x
(90,000 steps of 16 images) or 2x schedule; images are RGB, normalised as for ImageNet.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.runtime import InputError, invalid, parse_arguments, run_cli
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD

BASE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@dataclass(frozen=True, kw_only=True)
class CocoArguments:
    """Train Mask R-CNN FPN on COCO 2017 and evaluate it.

    Attributes:
        weights: file written by mvssl-export --format detectron2.
        out: folder for checkpoints and results.
        schedule: 1x is 90,000 steps, 2x twice as many.
        depth: of the ResNet.
        batch_size: images per step over all GPUs; learning rate and schedule scale with it.
        gpus: processes on this machine.
        resume: resume the run in `out`.
    """

    weights: Path
    out: Path
    schedule: Literal["1x", "2x"] = "1x"
    depth: Literal[50, 101] = 50
    batch_size: int = 16
    gpus: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "gpus"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1", "give a positive number")


def settings(arguments: CocoArguments) -> dict[str, Any]:
    """Differences from Detectron2's own configuration, by key."""
    scale = arguments.batch_size / 16  # linear scaling (Goyal et al., arXiv 1706.02677)
    factor = {"1x": 1, "2x": 2}[arguments.schedule] / scale
    norm = "SyncBN" if arguments.gpus > 1 else "BN"
    return {
        "MODEL.WEIGHTS": str(arguments.weights),
        "MODEL.PIXEL_MEAN": [255 * value for value in IMAGENET_MEAN],
        "MODEL.PIXEL_STD": [255 * value for value in IMAGENET_STD],
        "INPUT.FORMAT": "RGB",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": arguments.depth,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FPN.NORM": norm,
        "SOLVER.IMS_PER_BATCH": arguments.batch_size,
        "SOLVER.BASE_LR": 0.02 * scale,
        "SOLVER.MAX_ITER": round(90_000 * factor),
        "SOLVER.STEPS": (round(60_000 * factor), round(80_000 * factor)),
        "TEST.PRECISE_BN.ENABLED": True,
        "OUTPUT_DIR": str(arguments.out),
    }


def _train(arguments: CocoArguments) -> None:
    """Train in one process."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer, default_setup
    from detectron2.evaluation import COCOEvaluator

    class Trainer(DefaultTrainer):  # type: ignore[misc]
        @classmethod
        def build_evaluator(cls, config: Any, dataset_name: str) -> Any:
            return COCOEvaluator(dataset_name, output_dir=config.OUTPUT_DIR)

    config = get_cfg()
    config.merge_from_file(model_zoo.get_config_file(BASE))
    config.merge_from_list([item for pair in settings(arguments).items() for item in pair])
    config.freeze()
    default_setup(config, None)
    trainer = Trainer(config)
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()


def body() -> None:
    """Run the command."""
    arguments = parse_arguments(CocoArguments, prog="python -m tools.coco_detection", args=sys.argv[1:])
    if importlib.util.find_spec("detectron2") is None:
        raise InputError(
            "Detectron2 is not installed: install it by its own instructions (github.com/facebookresearch/detectron2)."
        )
    if not arguments.weights.is_file():
        raise InputError(f"weights is {str(arguments.weights)!r} but there is no such file: run mvssl-export first.")
    from detectron2.engine import launch

    launch(_train, num_gpus_per_machine=arguments.gpus, dist_url="auto", args=(arguments,))


if __name__ == "__main__":
    run_cli(body)
