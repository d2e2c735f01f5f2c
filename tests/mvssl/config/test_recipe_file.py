"""Recipe files in TOML and JSON: whole recipes, overrides of a base, and a clear error for every mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import mvssl
from mvssl.cli import train as train_cli
from mvssl.config.serialize import to_dict
from mvssl.recipes import all_recipes, get_recipe
from mvssl.recipes.files import is_recipe_file, resolve_recipe
from pipelines import InputError, ViewSpec, adapt_views
from pipelines.runtime import run_cli

WHOLE = """
name = "own"
epochs = 20
[backbone]
name = "resnet18"
[[views]]
name = "a"
task = "global"
is_target = true
area = "none"
[[views]]
name = "b"
task = "none"
is_target = true
jitter = [0, 0.5, 0, 0.1]
"""


def write(folder: Path, text: str, name: str = "own.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_print_config_writes_a_recipe_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cli.body([name, "--print-config"]) == 0
    assert mvssl.load_recipe(write(tmp_path, capsys.readouterr().out, "own.json")) == get_recipe(name)


def test_a_whole_recipe_in_toml(tmp_path: Path) -> None:
    recipe = mvssl.load_recipe(write(tmp_path, WHOLE))
    assert recipe == mvssl.Recipe(
        name="own",
        epochs=20,
        backbone=mvssl.Backbone(name="resnet18"),
        views=(
            ViewSpec(name="a", task="global", is_target=True, area=None),
            ViewSpec(name="b", task=None, is_target=True, jitter=(0.0, 0.5, 0.0, 0.1)),
        ),
    )


def test_a_base_is_overridden_field_by_field(tmp_path: Path) -> None:
    text = """
        base = "simsiam_resnet50_200ep"
        epochs = 100
        task_weights = {local = 1}
        optimizer = {base_lr = 1, weight_decay_end = 0.1}
        projector.hidden = [512]
    """
    base = mvssl.recipes.simsiam_resnet50_200ep()
    assert mvssl.load_recipe(write(tmp_path, text)) == dataclasses.replace(
        base,
        epochs=100,
        task_weights={"global": 1 / 3, "local": 1.0, "cutout": 1 / 3},
        optimizer=dataclasses.replace(base.optimizer, base_lr=1.0, weight_decay_end=0.1),
        projector=dataclasses.replace(base.projector, hidden=(512,)),
    )


def test_the_same_in_json(tmp_path: Path) -> None:
    text = '{"base": "byol_vits16_200ep", "optimizer": {"clip_grad_norm": null}}'
    base = mvssl.recipes.byol_vits16_200ep()
    assert mvssl.load_recipe(str(write(tmp_path, text, "own.JSON"))) == dataclasses.replace(
        base, optimizer=dataclasses.replace(base.optimizer, clip_grad_norm=None)
    )


def test_replacing_views_drops_the_weights_of_their_tasks(tmp_path: Path) -> None:
    views = WHOLE[WHOLE.index("[[views]]") :]
    recipe = mvssl.load_recipe(write(tmp_path, f'base = "simsiam_resnet50_200ep"\n{views}'))
    assert [view.name for view in recipe.views] == ["a", "b"]
    assert recipe.task_weights == {"global": 1 / 3}


def test_views_are_added(tmp_path: Path) -> None:
    text = """
        base = "demo"
        task_weights = {quarter = 0.5}
        [[add_views]]
        name = "quarter"
        task = "quarter"
        size = 16
        blur = 0
    """
    text += "[views.0]\n    size = 40\n    [views.local_1]\n    area = [0.1, 0.2]\n"
    base = mvssl.recipes.demo()
    first, second, local, *others = base.views
    changed = (dataclasses.replace(first, size=40), second, dataclasses.replace(local, area=(0.1, 0.2)), *others)
    quarter = ViewSpec(name="quarter", task="quarter", size=16, blur=0.0)
    assert mvssl.load_recipe(write(tmp_path, text)) == dataclasses.replace(
        base, views=(*changed, quarter), task_weights={"quarter": 0.5}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3", "neither base nor views is given"),
        ("views = []", "recipe lacks name: add"),
        (
            'base = "demo"\n[views.7]\nsize = 8',
            "views has the entry '7' but as a table may only have 0 to 4 or global_1, global_2",
        ),
        ('base = "demoo"', "base is 'demoo' but there is no recipe of that name: did you mean 'demo'"),
        ("base = 3", "base is 3 but must be the name of a recipe"),
        ('base = "demo"\nepoch = 3', "recipe has the unknown field 'epoch' .*: did you mean 'epochs'"),
        ('base = "demo"\noptimizer.base_rl = 3', "recipe.optimizer has the unknown field 'base_rl' .* 'base_lr'"),
        ('base = "demo"\nepochs = "3"', "recipe.epochs is '3' but must be a whole number: .* without quotation marks"),
        ('base = "demo"\nepochs = 3.5', "recipe.epochs is 3.5 but must be a whole number"),
        ('base = "demo"\nepochs = true', "recipe.epochs is True but must be a whole number"),
        ('base = "demo"\ntarget_decay = "fast"', "recipe.target_decay is 'fast' but must be a number"),
        ('base = "demo"\ntarget_decay = true', "recipe.target_decay is True but must be a number"),
        (f'base = "demo"\ntarget_decay = 1{"0" * 400}', "recipe.target_decay is 10*0 but must be a number"),
        ('base = "demo"\ncompile = "yes"', "recipe.compile is 'yes' but must be one of auto, on, off"),
        ('base = "demo"\ncuda_graph = "off"', "recipe has the unknown field 'cuda_graph'"),
        ('base = "demo"\nchannels_last = 1', "recipe.channels_last is 1 but must be true or false"),
        ('base = "demo"\nbackbone.name = 18', "recipe.backbone.name is 18 but must be a string"),
        ('base = "demo"\nbackbone = "resnet18"', "recipe.backbone is 'resnet18' but must be a table of Backbone's"),
        ('base = "demo"\nprecision = "fp8"', "recipe.precision is 'fp8' but must be one of auto, fp32, bf16, fp16"),
        ('base = "demo"\nprojector.hidden = 512', "recipe.projector.hidden is 512 but must be a list: .*brackets"),
        ('base = "demo"\nprojector.hidden = ["a"]', r"recipe.projector.hidden\[0\] is 'a' but must be a whole"),
        ('base = "demo"\noptimizer.betas = [0.9]', r"recipe.optimizer.betas is \[0.9\] but must be a list of 2"),
        ('base = "demo"\ntask_weights = 2', "recipe.task_weights is 2 but must be a table"),
        ('base = "demo"\ntask_weights.local = "2"', "recipe.task_weights.local is '2' but must be a number"),
        ('base = "demo"\ntask_weights.lokal = 2', "Recipe.task_weights is 'lokal' but must be a task"),
        ('base = "demo"\nbatch_size = 1', "Recipe.batch_size is 1 but must be at least 2"),
        ('base = "demo"\nviews = "a"', r"recipe.views is 'a' but must be a list: .*\[\[...\]\]"),
        (
            'base = "demo"\n[views]\nname = "a"',
            "views has the entry 'name' but as a table may only have 0 to 4 or .*: .* list of tables",
        ),
        ('base = "demo"\n[add_views]\nname = "a"', r"add_views is .* but must be a list of views: .*\[\[add_views\]\]"),
        ('base = "demo"\nadd_views = [3]', r"add_views\[0\] is 3 but must be a table of ViewSpec's fields"),
        ('base = "demo"\n[[add_views]]\nname = "a"', r"add_views\[0\] lacks task: add"),
        ('base = "demo"\n[[add_views]]\nname = "a"\ntask = "a"\nsize = 100', r"ViewSpec\('a'\).size is 100"),
        ('base = "demo"\n[[add_views]]\nname = "a"\ntask = "a"\nflips = 0', r"add_views\[0\] has .*'flips' .*'flip'"),
        ('base = "demo"\n[[add_views]]\nname = "local_1"\ntask = "a"\nblur = 0', "each name must be unique"),
        ('[[add_views]]\nname = "a"\ntask = "a"', "add_views is given without base"),
        ('base = "demo"\nepochs = = 3', r"is not valid TOML \(.*line 2, column 10\)"),
    ],
)
def test_errors_name_file_and_field(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as raised:
        mvssl.load_recipe(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("file", ["r.toml", "r.json"])
def test_files_as_windows_writes_them(tmp_path: Path, file: str, encoding: str) -> None:
    text = 'base = "demo"\r\nepochs = 3\r\n' if file == "r.toml" else '{"base": "demo",\r\n"epochs": 3}\r\n'
    (tmp_path / file).write_bytes(text.encode(encoding))
    assert mvssl.load_recipe(tmp_path / file) == dataclasses.replace(mvssl.recipes.demo(), epochs=3)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.toml: the recipe file cannot be read \(No such file or directory\)"):
        mvssl.load_recipe(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match=r"folder.toml: the recipe file cannot be read"):
        mvssl.load_recipe(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes('name = "\xfc"'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.toml: the recipe file is not UTF-8 text: line 1 .*\\xfc.*save"):
        mvssl.load_recipe(tmp_path / "latin.toml")
    with pytest.raises(InputError, match=r"own.json: the recipe file is not valid JSON \(.*line 2 column 1"):
        mvssl.load_recipe(write(tmp_path, '{"base":\n', "own.json"))
    with pytest.raises(InputError, match="must hold one JSON object"):
        mvssl.load_recipe(write(tmp_path, "[]", "own.json"))
    with pytest.raises(InputError, match=r"the ending is '.yaml' but must be .toml or .json"):
        mvssl.load_recipe(write(tmp_path, "", "own.yaml"))


def test_a_field_given_twice_in_json(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"base": "demo", "optimizer": {"eta": 1, "eta": 2}}')
    with pytest.raises(InputError, match=r"not valid JSON \('eta' is given twice\): correct it there"):
        mvssl.load_recipe(tmp_path / "own.json")


def test_a_recipe_is_given_by_name_or_file(tmp_path: Path) -> None:
    assert resolve_recipe("demo") == mvssl.recipes.demo()
    assert resolve_recipe(str(write(tmp_path, 'base = "demo"'))) == mvssl.recipes.demo()
    assert not is_recipe_file("demo")
    with pytest.raises(InputError, match=r"recipe is .*own.yaml' but must be .* ends in .toml or .json"):
        resolve_recipe(str(write(tmp_path, "", "own.yaml")))
    with pytest.raises(InputError, match="recipe is 'dmeo' but there is no recipe of that name"):
        resolve_recipe("dmeo")


def test_the_command_takes_a_file_and_overrides_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, 'base = "demo"\nepochs = 5\nbatch_size = 32\n'))
    assert train_cli.body([path, "--print-config", "--epochs", "7", "--views.4.flip", "0.25"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["epochs"], config["batch_size"], config["views"][4]["flip"]) == (7, 32, 0.25)
    assert config["optimizer"] == to_dict(mvssl.recipes.demo())["optimizer"]
    with pytest.raises(SystemExit) as exit_info:
        train_cli.body([path, "--help-all"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The recipe in " in text
    assert "(default: 32)" in text


def test_the_commands_error_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'base = "demo"\nepochs = "3"')
    with pytest.raises(SystemExit) as exit_info:
        run_cli(lambda: train_cli.body([str(path)]))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == (
        f"error: {path}: recipe.epochs is '3' but must be a whole number: "
        "write it without quotation marks and decimal point.\n"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.toml", 'base = "demo"\ncompile = "off"\nstep_mode = "per-view"\nchannels_last = true\n'),
        ("own.json", '{"base": "demo", "compile": "off", "step_mode": "per-view", "channels_last": true}'),
    ],
)
def test_how_steps_are_executed_is_an_option_that_a_file_may_set(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As files written before these were options of the run do."""
    path = str(write(tmp_path, text, name))
    parsed = train_cli.parse([path])
    assert parsed.recipe == mvssl.recipes.demo()
    assert (parsed.options.compile, parsed.options.step_mode, parsed.options.channels_last) == ("off", "per-view", True)
    assert train_cli.parse([path, "--compile", "on"]).options.compile == "on"
    assert train_cli.body([path, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert {"compile": "off", "step_mode": "per-view"}.items() <= json.loads(printed).items()
    assert train_cli.parse([str(write(tmp_path, printed, "again.json"))]) == parsed


def test_options_of_a_file_are_named_where_only_its_recipe_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 'base = "demo"\ncompile = "off"\nstep_mode = "joint"')
    assert mvssl.load_recipe(path) == mvssl.recipes.demo()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: compile is an option of the run and not of the recipe: give compile='off' to mvssl.train"
    ]


def test_a_view_preset_adapts_the_views_of_the_base_and_not_those_added(tmp_path: Path) -> None:
    added = '[[add_views]]\nname = "more"\ntask = "more"\nrotate = 15\nrotate_fill = [255, 0, 9.5]\nblur = 0.0\n'
    recipe = mvssl.load_recipe(write(tmp_path, f'base = "demo"\nview_preset = "aerial"\n{added}'))
    base = get_recipe("demo")
    more = ViewSpec(name="more", task="more", rotate=15.0, rotate_fill=(255.0, 0.0, 9.5), blur=0.0)
    assert recipe == dataclasses.replace(base, views=(*adapt_views(base.views, "aerial"), more))
    assert mvssl.load_recipe(write(tmp_path, json.dumps(to_dict(recipe)), "own.json")) == recipe
    assert mvssl.load_recipe(write(tmp_path, 'base = "demo"\nview_preset = "none"\n')) == base


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('base = "demo"\nview_preset = "areal"', "view_preset is 'areal' but must be one of .*did you mean 'aerial'"),
        ('base = "demo"\nview_preset = 3', "view_preset is 3 but must be one of"),
        (f'view_preset = "aerial"\n{WHOLE}', "view_preset is given without base"),
        (f'base = "demo"\nview_preset = "aerial"\n{WHOLE}', "view_preset and views are both given"),
    ],
)
def test_view_presets_that_cannot_be(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        mvssl.load_recipe(write(tmp_path, text))


def test_a_rotation_in_a_file_is_a_number_or_a_range(tmp_path: Path) -> None:
    for text, rotate in (("15", 15.0), ("[-5, 30]", (-5.0, 30.0)), ('"none"', None)):
        view = f'base = "demo"\n[[add_views]]\nname = "more"\ntask = "more"\nblur = 0.0\nrotate = {text}\n'
        assert mvssl.load_recipe(write(tmp_path, view)).views[-1].rotate == rotate
    for text, words in (
        ("[1, 2, 3]", "rotate is .* but must be a list of 2"),
        ("400", "rotate is 400.0 but must be degr"),
    ):
        view = f'base = "demo"\n[[add_views]]\nname = "more"\ntask = "more"\nrotate = {text}\n'
        with pytest.raises(InputError, match=words):
            mvssl.load_recipe(write(tmp_path, view))
