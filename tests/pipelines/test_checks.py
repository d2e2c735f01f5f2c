"""Public functions and dataclasses name an argument of another kind in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mvssl
from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, asymmetric, byol_views, draw, paper_views
from pipelines.checks import typed

SPECS = paper_views(size=32, local_size=16, blur_kernel=5)
IMAGES = [np.zeros((9, 9, 3), dtype=np.uint8)]
BATCH = DecodedBatch.from_images(IMAGES, index=[0])
PARAMS = draw(SPECS, BATCH.sizes, seed=0, epoch=0, index=[0])


def anything(value: Any) -> Any:
    """Hide a type from mypy: the calls below are wrong on purpose."""
    return value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: anything(paper_views)(num_local="2"), "num_local is '2' but must be a whole number"),
        (lambda: anything(paper_views)(2), r"paper_views cannot be called .*too many positional.*num_local=\.\.\."),
        (
            lambda: anything(paper_views)(num_locals=2),
            "unexpected keyword argument 'num_locals'.*did you mean num_local",
        ),
        (lambda: anything(byol_views)(size=32.0), "size is 32.0 but must be a whole number"),
        (lambda: anything(asymmetric)(None), "views is None but must be a list of ViewSpecs"),
        (lambda: anything(asymmetric)([1, 2]), r"views is \[1, 2\] but must be a list of ViewSpecs"),
        (lambda: anything(draw)(SPECS), "missing a required argument: 'sizes'.*call it as draw"),
        (lambda: anything(draw)(SPECS[0], BATCH.sizes, seed=0, epoch=0, index=[0]), "specs is ViewSpec"),
        (lambda: anything(draw)(SPECS, "abc", seed=0, epoch=0, index=[0]), "sizes is 'abc' but must be"),
        (lambda: anything(draw)(SPECS, BATCH.sizes, seed="0", epoch=0, index=[0]), "seed is '0' but must be a whole"),
        (lambda: anything(draw)(SPECS, BATCH.sizes, seed=0, epoch=0, index="a"), "index is 'a' but must be"),
        (lambda: anything(ViewEngine)(), "ViewEngine cannot be called"),
        (lambda: anything(ViewEngine)(None), "specs is None but must be a list of ViewSpecs"),
        (lambda: ViewEngine(SPECS, device="gpu"), "device is 'gpu' but must be a device of torch: give cpu"),
        (lambda: anything(ViewEngine)(SPECS, device=None), "device is None but must be a string or a torch.device"),
        (lambda: anything(ViewEngine(SPECS))(BATCH, None), "params is None but must be a ViewParams"),
        (lambda: anything(ViewEngine(SPECS))(IMAGES, PARAMS), "batch is .* but must be a DecodedBatch"),
        (lambda: anything(DecodedBatch.from_images)(IMAGES), "missing a required argument: 'index'"),
        (lambda: anything(DecodedBatch.from_images)(["a.jpg"], index=[0]), r"images\[0\] is of type str but must be"),
        (lambda: DecodedBatch.from_images(IMAGES, index=[0], device="gpu"), "device is 'gpu'"),
        (lambda: anything(DecodedBatch.packed)(None, sizes=1, index=2), "pixels is None but must be a torch.Tensor"),
        (lambda: anything(ViewSpec)(name=3, task=None), r"name is 3 but must be a string"),
        (lambda: anything(ViewSpec)(name="a", task="t", flip="0.5"), "flip is '0.5' but must be a number"),
        (lambda: anything(ViewSpec)(name="a", task="t", area=("a", "b")), "area is .* but must be two fractions"),
        (lambda: anything(mvssl.Head)(hidden=4096), "Head.hidden is 4096 but must be a list"),
        (lambda: anything(mvssl.Optimizer)(base_lr="0.1"), "Optimizer.base_lr is '0.1' but must be a number"),
        (lambda: anything(mvssl.Evaluation)(k=5), "Evaluation.k is 5 but must be a list"),
        (lambda: anything(mvssl.load_recipe)(None), "path is None but must be a string or a path"),
        (lambda: dataclasses.replace(mvssl.recipes.demo(), epochs=anything("3")), "Recipe.epochs is '3' but must be"),
        (lambda: dataclasses.replace(mvssl.recipes.demo(), views=anything([1])), r"Recipe.views is \[1\] but must be"),
        (lambda: dataclasses.replace(mvssl.recipes.demo(), optimizer=anything("sgd")), "optimizer is 'sgd' but must"),
    ],
)
def test_arguments_of_another_kind_are_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_what_has_always_been_accepted_still_is() -> None:
    listed = DecodedBatch.from_images(anything(np.zeros((2, 9, 9, 3), dtype=np.uint8)), index=np.arange(2).tolist())
    assert len(listed) == 2
    assert len(draw(list(SPECS), [[9, 9]], seed=int(np.int64(0)), epoch=0, index=[0]).flip) == len(SPECS)
    assert ViewSpec(name="a", task="t", flip=1, blur=np.float32(0.5).item()).flip == 1
    assert list(mvssl.Head(hidden=anything([8, 8])).hidden) == [8, 8]


def test_a_function_keeps_its_errors_and_its_name() -> None:
    @typed
    def fails(number: int) -> None:
        """Words."""
        raise TypeError(f"own {number}")

    assert (fails.__name__, fails.__doc__) == ("fails", "Words.")
    with pytest.raises(TypeError, match="own 3"):
        fails(3)
