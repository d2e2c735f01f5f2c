"""bench_step: the same work from the same weights, FLOP as counted by hand, and a complete result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step
from benchmarks.bench_step import ORDER, Arguments, builds_of, measure, predicted
from benchmarks.harness.processes import Memory, Trial
from benchmarks.harness.trials import Outcome
from benchmarks.implementations.steps import OURS, PEAK, PLAIN, WITH_LOADER, Setup, flops_per_image
from benchmarks.report import tables
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.runs.environment import environment
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views
from tests.benchmarks.conftest import Bench

TINY = Recipe(
    name="tiny",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="test_vit"),
    projector=Head(hidden=(32,), out=16),
    predictor=Head(hidden=(24,), out=16),
    optimizer=Optimizer(base_lr=1.0, warmup_epochs=0),
    batch_size=4,
    evaluation=Evaluation(resize=32, crop=32),
)


@pytest.mark.slow
def test_all_modes_do_the_same_and_the_result_is_complete(folder: Path, tiny_recipe_file: Path, bench: Bench) -> None:
    contenders = ("captured", PLAIN, "grouped", "view by view")  # compiling takes minutes
    command = ["--recipes", tiny_recipe_file, "--contenders", *contenders, "--steps", "2", "--repeats", "1"]
    result, said = bench(bench_step, *command, "--data", folder)
    assert "--contenders captured 'plain step' grouped" in result["environment"]["command"]
    assert (result["benchmark"], result["partial"], result["device"]) == ("step", False, "cpu")
    (measured,) = result["recipes"]
    rows = measured["contenders"]
    assert set(rows) == {*contenders} - {"captured"}
    assert "no CUDA graphs" in measured["left_out"]["captured"]
    for name, row in rows.items():
        assert row["first_loss"] == pytest.approx(rows[PLAIN]["first_loss"], abs=1e-4)
        assert row["host_milliseconds"] > 0
        assert row["first_step_seconds"] > 0
        assert (row["launches"], row["kernels"], row["busy_milliseconds"]) == (None, None, None)
        assert row["tflops"] == pytest.approx(row["images_per_second"] * measured["gflops_per_image"] / 1e3)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / measured["matrix_product"]["tflops"])
        assert 0 < row["share_of_peak"] < 1
        loaded = measured["with_loader"][name]
        ratio = loaded["images_per_second"] / row["images_per_second"]
        assert loaded["over_alone"]["median"] == pytest.approx(ratio)
    ratio = rows["grouped"]["images_per_second"] / rows[PLAIN]["images_per_second"]
    assert measured["times_plain"]["grouped"]["median"] == pytest.approx(ratio)
    for line in ("building grouped ...", "built grouped after", "warm-up of grouped:", "trial 1 of 1 of grouped:"):
        assert line in said
    lines = tables.step({"step_cpu": result})
    assert sum(line.startswith("| CPU | demo, batch 4 |") for line in lines) == 3


def test_operations_are_counted_as_by_hand() -> None:
    """A vision transformer's, multiplied out: 2 operations a weight and token, 3 times that with the backward."""
    from mvssl.models.encoder import build_networks

    online, target = build_networks(TINY)
    vit: Any = online.backbone
    tokens = {32: 0, 16: 0}
    for size in tokens:
        patch = vit.patch_embed.patch_size[0]
        tokens[size] = (size // patch) ** 2
    width, depth = int(vit.embed_dim), len(vit.blocks)

    def products(network: Any, size: int, *, skip: str = "") -> float:
        """Multiplications and additions of a forward of one view."""
        patches = tokens[size]
        length = patches + int(vit.num_prefix_tokens)
        total = 0.0
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2 or name.startswith("predictors") or "embed" in name.partition("patch_embed")[0]:
                continue
            if "token" in name:
                continue
            rows = patches if "patch_embed" in name else length if "blocks" in name else 1
            total += 2 * parameter.numel() * rows
        return total + depth * 2 * 2 * length * length * width  # queries by keys, weights by values

    predictor = sum(p[0].numel() for n, p in online.predictors.named_parameters() if p.dim() == 3)
    views = [spec.size for spec in TINY.views]
    first = sum(2 * vit.patch_embed.proj.weight.numel() * tokens[size] for size in views)  # no gradient for pixels
    trained = sum(3 * (products(online, size) + 2 * predictor) for size in views) - first
    targets = sum(products(target, spec.size) for spec in TINY.views if spec.is_target)
    # Attention's backward computes its weights anew in fused kernels: one product more.
    assert flops_per_image(TINY) == pytest.approx(trained + targets, rel=0.06)


def trial(seconds: float, **more: Any) -> Trial:
    report = {"images": 40, "seconds": seconds, "steps": 10, "host_milliseconds": 5.0, **more}
    return Trial(report=report, memory=Memory(rss=2e3, pss=1e3))


def test_a_gpus_numbers_fill_the_table() -> None:
    profiled = {"launches": 1, "kernels": 2400, "busy_milliseconds": 90.0, "first_loss": 1.0, "device_mib": 2e4}
    plain = profiled | {"launches": 9000, "busy_milliseconds": 120.0}
    peak = Trial(report={"tflops": 500.0, "side": 8192, "dtype": "torch.bfloat16"}, memory=Memory())
    outcome = Outcome(
        trials={
            "captured": [trial(1.0, **profiled), trial(1.0, **profiled)],
            PLAIN: [trial(4.0, **plain), trial(2.0, **plain)],
            "captured" + WITH_LOADER: [trial(1.25, **profiled), trial(1.25, **profiled)],
            PEAK: [peak],
        },
        failed={"compiled": "out of memory"},
    )
    prediction = {"batch_size": 4, "megabytes_per_image": 1400.0, "launches": 1279, "predicted_milliseconds": 63.4}
    measured = bench_step.summary(outcome, recipe=TINY, flops=lambda: 2.5e12, prediction=prediction)
    result = {
        "benchmark": "step",
        "partial": False,
        "device": "cuda",
        "steps": 10,
        "recipes": [measured],
        "environment": environment() | {"gpus": ["NVIDIA H100"], "command": "made up"},
    }
    headline = tables.headlines({"step_cuda": result})[2]
    assert headline.endswith("| not measured yet | 3.00 times (captured) |")
    lines = tables.step({"step_cuda": result})
    rows = {line.split(" | ")[2]: line for line in lines if line.startswith("| GPU |")}
    dash = "\N{EN DASH}"
    expected = (
        f"40.0 (40.0{dash}40.0) | 3.00 (2.00{dash}4.00) | 1 | 2,400 | 1,279 | 1,400 | 5.00 | 90.0 of 100 | 63.4 | 100 "
        "| 20.0 % | 80.0 % |"
    )
    assert expected in rows["captured"]
    assert "| 9,000 | 2,400 | | | 5.00 | 120 of 300 | |" in rows[PLAIN], "the prediction is of the compiled step"
    assert "| failed |" in rows["compiled"]
    lines = [line for line in lines if "step_cuda" in line]
    assert "NVIDIA H100" in lines[-1]
    assert (
        "10 steps a trial, median of 2 trials, peak 500 TFLOP/s: a product of matrices of 8,192 x 8,192 in bfloat16"
        in (lines[-1])
    )


def test_a_prediction_is_of_the_recipe_and_the_kind_of_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"recipe": "tiny", "target": "sm_90", "launches": 1279, "predicted_milliseconds": None, "kernels": []}
    compiled = tmp_path / "compile.jsonl"
    compiled.write_text(json.dumps(found | {"megabytes_per_image": 1400.0}) + "\n")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert predicted("tiny", device="cuda", compiled=compiled) == {"megabytes_per_image": 1400.0, "launches": 1279}
    assert predicted("other", device="cuda", compiled=compiled) is None
    assert predicted("tiny", device="cuda", compiled=tmp_path / "none.jsonl") is None
    assert predicted("tiny", device="cpu", compiled=compiled) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert predicted("tiny", device="cuda", compiled=compiled) is None


def test_the_important_ones_come_first() -> None:
    arguments = Arguments(recipes=("demo", "laptop"), batch_sizes=(8, 16))
    assert [(r.name, r.batch_size) for r in arguments.planned()] == [
        ("demo", 8),
        ("laptop", 8),
        ("demo", 16),
        ("laptop", 16),
    ]
    assert [r.batch_size for r in dataclasses.replace(arguments, batch_sizes=None).planned()] == [64, 64]
    builds = builds_of(Setup(recipe=TINY, device="cpu", steps=1), ("grouped", PLAIN, "captured"))
    assert list(builds) == ["captured", PLAIN, "grouped", PEAK]
    assert set(ORDER) == {*OURS, PLAIN}


def test_without_time_everything_is_left_out_with_a_reason(tmp_path: Path) -> None:
    result = measure(Arguments(recipes=("demo",), seconds=0.0), command="")
    (measured,) = result["recipes"]
    assert measured["contenders"] == {}
    assert set(measured["left_out"]) == {*ORDER, PEAK}
    assert set(measured["left_out"].values()) == {"no time was left of the 0 s (--seconds)"}


def test_invalid_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="contenders is 'gruoped' but must be some of captured, plain step"):
        Arguments(contenders=("gruoped",))
    with pytest.raises(InputError, match="recipes is empty"):
        Arguments(recipes=())
    with pytest.raises(InputError, match=r"batch_sizes is \(64, 0\) but must be 1 or more"):
        Arguments(batch_sizes=(64, 0))
    with pytest.raises(InputError, match="laptpo"):
        measure(Arguments(recipes=("laptpo",)), command="")
    with pytest.raises(InputError, match="only 12 images"):
        measure(Arguments(recipes=("demo",), data=folder), command="")
