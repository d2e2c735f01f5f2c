"""Recipe files that are to exhaust memory, time or the stack: refused in one sentence with file, field and limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mvssl
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from pipelines import InputError
from pipelines.view_sheet import Options, run

HUGE = 10**9


def refused(path: Path, content: str) -> str:
    """The sentence with which a recipe file is refused."""
    path.write_text(content)
    with pytest.raises(InputError) as error:
        mvssl.load_recipe(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < 2000
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 10_000 + "]" * 10_000,
        "a = " + "{a = " * 10_000 + "1" + "}" * 10_000,
        "a." * 10_000 + "a = 1",
        "[" + "a." * 10_000 + "a]\nb = 1",
        "[[" + "a." * 200 + "a]]\nb = 1",
        'base = "demo"\n[optimizer]\nbase_lr = ' + "[" * 300 + "]" * 300,
    ],
)
def test_toml_that_is_nested_too_deep(content: str, tmp_path: Path) -> None:
    assert "nested" in refused(tmp_path / "deep.toml", content)


@pytest.mark.parametrize(
    "content", ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 900 + "]" * 900]
)
def test_json_that_is_nested_too_deep(content: str, tmp_path: Path) -> None:
    assert "nested" in refused(tmp_path / "deep.json", content)


def with_value(field: str, value: Any) -> str:
    """A whole recipe with another value of a dotted field; numbers in the dots are positions."""
    plain: dict[str, Any] = to_dict(mvssl.recipes.demo())
    inner: Any = plain
    *before, last = field.split(".")
    for part in before:
        inner = inner[int(part) if part.isdigit() else part]
    inner[last] = value
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("views.0.size", HUGE, "4,096"),
        ("views.0.size", 4104, "4,096"),
        ("views.0.blur_kernel", HUGE + 1, "at most"),
        ("views.0.name", "a" * 10**6, "200"),
        ("evaluation.k", [HUGE], "1,000,000"),
        ("evaluation.k", list(range(1, 200)), "100"),
        ("evaluation.resize", HUGE, "4,096"),
        ("evaluation.crop", HUGE, "4,096"),
        ("evaluation.max_train", 10**400, "at most"),
        ("evaluation.every_epochs", 10**400, "at most"),
        ("projector.hidden", [HUGE], "131,072"),
        ("projector.hidden", [100_000, 100_000], "4,294,967,296"),
        ("predictor.hidden", [4096] * 65, "64"),
        ("predictor.hidden", [16] * 100_000, "1,000"),
        ("predictor.out", HUGE, "131,072"),
        ("batch_size", HUGE, "1,048,576"),
        ("epochs", HUGE, "100,000,000"),
        ("epochs", 10**400, "100,000,000"),
        ("order_window", 10**400, "at most"),
        ("order_chunk", 10**30, "at most"),
        ("seed", 10**400, "2**63"),
        ("optimizer.base_lr", float("inf"), "above 0"),
        ("optimizer.base_lr", float("nan"), "above 0"),
        ("optimizer.base_lr", 10**400, "a number"),
        ("optimizer.betas", [float("nan"), 0.9], "[0, 1)"),
        ("task_weights", {"global": float("inf")}, "0 or more"),
        ("temperature", float("inf"), "above 0"),
        ("views.0.area", [float("nan"), 1.0], "fractions"),
        ("views.0.blur_sigma", [1.0, float("inf")], "finite"),
        ("views.0.jitter", [float("nan")] * 4, "in [0, 1]"),
    ],
)
def test_values_beyond_all_use_are_refused_with_the_limit(field: str, value: Any, named: str, tmp_path: Path) -> None:
    message = refused(tmp_path / "huge.json", with_value(field, value))
    assert named in message
    assert field.rpartition(".")[2].replace("0.", "") in message


def test_a_million_views_are_refused_before_they_are_built(tmp_path: Path) -> None:
    view: dict[str, Any] = to_dict(mvssl.recipes.demo())["views"][0]
    assert "1,000" in refused(tmp_path / "many.json", with_value("views", [{}] * 1_000_000))
    many = [{**view, "name": str(number)} for number in range(257)]
    assert "at most 256" in refused(tmp_path / "some.json", with_value("views", many))


@pytest.mark.parametrize("number", ["1" * 5000, "0x" + "f" * 5000, "1e999", "-inf", "nan", "1979-05-27"])
@pytest.mark.parametrize("field", ["epochs", "seed", "optimizer.base_lr", "evaluation.k", "name"])
def test_numbers_that_no_type_holds(field: str, number: str, tmp_path: Path) -> None:
    value = f"[{number}]" if field.endswith("k") else number
    refused(tmp_path / "numbers.toml", f'base = "demo"\n{field} = {value}\n')


def test_a_recipe_file_that_is_none(tmp_path: Path) -> None:
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(InputError, match=r"sparse\.json: .*4,194,304"):
        mvssl.load_recipe(tmp_path / "sparse.json")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"device\.toml: .*no regular file"):
        mvssl.load_recipe(tmp_path / "device.toml")


def test_the_sheet_of_views_reads_hostile_recipes(tmp_path: Path) -> None:
    """`python -m pipelines.view_sheet --views FILE`."""
    for content in (
        "[" * 5000,
        '{"views": [{"name": 5, "task": 3}]}',
        '{"views": [{"name": "a", "task": "b", "size": 1e999}]}',
    ):
        (tmp_path / "views.json").write_text(content)
        with pytest.raises(InputError):
            run(Options(data=tmp_path / "none", out=tmp_path / "o.png", views=tmp_path / "views.json"))


def test_large_real_recipes_are_taken() -> None:
    """DINO's head of 65,536 outputs, a batch of 65,536 and VICReg's expander."""
    demo = mvssl.recipes.demo()
    plain = to_dict(demo)
    plain |= {"batch_size": 65_536, "epochs": 1_000_000}
    for head in ("projector", "predictor"):
        plain[head] |= {"hidden": [8192, 8192], "out": 65_536}
    plain["views"][0]["size"] = 1024
    assert isinstance(mvssl.config.serialize.from_dict(plain), Recipe)
