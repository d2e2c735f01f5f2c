"""The tables of the READMEs match the results; new results fill them; anything broken changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_train, bench_views
from benchmarks.harness.processes import Memory, Trial
from benchmarks.harness.trials import peak_memory, rates, ratios
from benchmarks.implementations.training import OURS, OURS_SYNTHETIC, PLAIN, PLAIN_SYNTHETIC
from benchmarks.report import data_tables, tables
from benchmarks.report.markdown import fill, percent, scientific, significant, with_spread
from benchmarks.report.origins import FOLDER, MADE_BY, command, load, machine, origin
from benchmarks.tables import COMMAND, TABLES, render, update
from mvssl.runs.environment import environment
from pipelines.runtime import InputError

ROOT = Path(__file__).resolve().parents[2]
GPU = environment() | {
    "gpus": ["NVIDIA H100"],
    "cores": 16,
    "processor": "Xeon",
    "command": "python -m benchmarks.made_up",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The READMEs and the results in a folder of their own."""
    for file in TABLES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / FOLDER, tmp_path / FOLDER)
    update(tmp_path, check=False)
    return tmp_path


def texts(tree: Path) -> list[str]:
    return [(tree / file).read_text() for file in TABLES]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cells(lines: list[str], *first: str) -> list[str]:
    """The cells after the first of the one row that begins with these."""
    start = "".join(f"| {cell} " for cell in first) + "|"
    (row,) = [line for line in lines if line.startswith(start)]
    return [cell.strip() for cell in row.removeprefix(start).removesuffix("|").split("|")]


def trial(images_per_second: float, **report: float) -> Trial:
    return Trial(report={"images": images_per_second, "seconds": 1.0, **report}, memory=Memory(rss=2e3, pss=1234.0))


def views_result(dtype: str) -> dict[str, Any]:
    """What bench_views writes, with numbers that are made up."""
    trials = {
        name: [Trial(report={"images": 100, "seconds": each, "host_seconds": 0.5 * each}) for each in seconds]
        for name, seconds in {"fused": [0.01, 0.02, 0.04], "torchvision": [1.0, 1.0, 1.0]}.items()
    }
    faster = ratios(trials, "torchvision")
    contenders = {
        name: bench_views.summary(own, views=5)
        | {
            "times_torchvision": faster.get(name),
            "difference_from_torchvision_cpu": {"normalised": 0.0312, "levels": 1.8, "mean_levels": 0.1},
        }
        for name, own in trials.items()
    }
    shared = {"device": "cuda", "dtype": dtype, "threads": 8, "mean_megapixels": 0.1875}
    return shared | {"contenders": contenders, "failed": {"compiled": "RuntimeError: no"}, "environment": GPU}


def loader_result() -> dict[str, Any]:
    """What bench_loader writes, as far as the tables need it."""
    trials = {
        "folder + auto": [trial(4321.0), trial(4400.0)],
        "shards + dali, kept": [trial(3200.0), trial(3520.0)],
        "DataLoader": [trial(400.0), trial(440.0)],
    }
    contenders = {
        name: rates(own, views=5) | peak_memory(own) | {"device_mib": 77.7, "cached_share_before_turns": 0.021}
        for name, own in trials.items()
    }
    shared = {
        "device": "cuda",
        "cold": False,
        "disk": "",
        "images": 512,
        "mean_kilobytes": 61.2,
        "times_dataloader": ratios(trials, "DataLoader"),
    }
    return shared | {"contenders": contenders, "failed": {}, "environment": GPU}


def train_result() -> dict[str, Any]:
    """What bench_train writes, as far as the tables need it."""
    speeds = {OURS: 970.0, OURS_SYNTHETIC: 1000.0, PLAIN: 250.0, PLAIN_SYNTHETIC: 500.0}
    trials = {
        name: [trial(speed, steps=8, data_wait=0.0123, device_idle=0.0456, launching=0.0333, device_mib=54321.0)]
        for name, speed in speeds.items()
    }
    return {
        "device": "cuda",
        "recipe": {"name": "byol_resnet50_200ep", "backbone": {"name": "resnet50"}, "batch_size": 128},
        "contenders": {name: bench_train.summary(taken, views=5) for name, taken in trials.items()},
        "loaded_over_synthetic": bench_train.ratio(trials, OURS, OURS_SYNTHETIC),
        "plain_loaded_over_synthetic": bench_train.ratio(trials, PLAIN, PLAIN_SYNTHETIC),
        "times_plain_with_dataloader": bench_train.ratio(trials, OURS, PLAIN),
        "failed": {},
        "environment": GPU,
    }


def test_the_readmes_are_up_to_date() -> None:
    """Fails after a number was edited by hand or a result changed: run python -m benchmarks.tables."""
    assert update(ROOT, check=True) == {}


def test_every_result_that_is_there_is_shown_with_its_command() -> None:
    results = load(ROOT)
    lines = tables.overview(results)
    assert {"views_cpu", "loader_cpu", "paper_small_cpu", "compile_laptop_sm90"} <= results.keys()
    for name, result in results.items():
        file = result.get("file", f"{name}.json")
        label = name if file == "compile.jsonl" else file
        assert cells(lines, f"[`{label}`](results/{file})")[-1] == f"`{command(result)}`"
        module = re.match(r"python -m benchmarks\.(\w+)", command(result))
        assert module is not None
        assert (ROOT / f"benchmarks/{module[1]}.py").exists(), "commands have their names of today"
    for name in MADE_BY.keys() - results.keys():
        assert cells(lines, f"`{name}`")[0] == "not measured yet"


def test_no_result_at_all_still_gives_every_table() -> None:
    for rendered in render({}).values():
        for name, lines in rendered.items():
            assert any("not measured yet" in line for line in lines), name
            heights = {line.count("|") for line in lines if line.startswith("|")}
            assert len(heights) == 1, f"{name} has rows of different lengths"


def test_generating_again_changes_nothing(tree: Path) -> None:
    before = texts(tree)
    assert update(tree, check=False) == {}
    assert texts(tree) == before


def test_a_number_edited_by_hand_is_found_and_put_right(tree: Path) -> None:
    before = texts(tree)
    views = data_tables.views(load(tree))
    row = next(line for line in views if line.startswith("| native |"))
    edit(tree / "benchmarks/MEASURED.md", row, row.replace("| native | ", "| native | 9"))
    edit(tree / "benchmarks/README.md", "| columns | 1,789 |", "| columns | 1,788 |")
    after = texts(tree)
    with pytest.raises(InputError) as caught:
        update(tree, check=True)
    assert str(caught.value) == (
        "Tables do not match benchmarks/results (views in benchmarks/MEASURED.md; kernels in "
        "benchmarks/README.md): run python -m benchmarks.tables."
    )
    assert texts(tree) == after, "--check must not write"
    assert update(tree, check=False) == {"benchmarks/MEASURED.md": ["views"], "benchmarks/README.md": ["kernels"]}
    assert texts(tree) == before


def test_text_outside_the_tables_is_untouched() -> None:
    text = "# A\n\n<!-- table: one -->\nold\n<!-- end -->\n\u2028kept\x0c\n`<!-- table: two -->` in a sentence\n"
    expected = text.replace("old", "\n| new |\n")
    assert fill(text, {"one": ["| new |"]}, file="A.md") == (expected, ["one"])
    assert fill(expected, {"one": ["| new |"]}, file="A.md") == (expected, [])


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (
            r"<!-- table: train -->(.*?)<!-- end -->",
            r"\1",
            r"\.md has no marker of the table 'train': put a line <!-- table: train --> and a line <!-- end -->",
        ),
        (
            r"(<!-- table: train -->.*?)<!-- end -->",
            r"\1",
            r"MEASURED\.md, line \d+: the table 'train' has no end: put a line <!-- end --> below it\.",
        ),
        (
            r"(<!-- table: linear -->.*?)<!-- end -->",
            r"\1",
            r"MEASURED\.md, line \d+: the table 'linear' has no end: put a line <!-- end --> below it\.",
        ),
        (
            r"<!-- table: views -->",
            "",
            r"MEASURED\.md, line \d+ has an <!-- end --> without a table before it: put <!-- table: NAME --> above",
        ),
        (
            r"<!-- table: train -->",
            "<!-- table: trian -->",
            r"MEASURED\.md, line \d+ has a marker of the table 'trian', but the tables there are views, .*: correct",
        ),
    ],
    ids=["no marker", "no end", "no end at the end", "no begin", "unknown name"],
)
@pytest.mark.parametrize("check", [False, True])
def test_a_wrong_marker_is_named_and_nothing_is_written(
    tree: Path, pattern: str, replacement: str, message: str, check: bool
) -> None:
    edit(tree / "benchmarks/README.md", "| columns | 1,789 |", "| columns | 1,788 |")  # would be rewritten
    text = (tree / "benchmarks/MEASURED.md").read_text()
    (tree / "benchmarks/MEASURED.md").write_text(re.sub(pattern, replacement, text, count=1, flags=re.DOTALL))
    before = texts(tree)
    with pytest.raises(InputError, match=message) as caught:
        update(tree, check=check)
    assert "\n" not in str(caught.value)
    assert texts(tree) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"device": "cpu", ', r"cannot be read as JSON \(.*line 1 column"),
        ("\udcff", r"cannot be read as JSON \(.*can't decode byte 0xff"),
        ("[]", "does not hold a JSON object"),
        ("{}", r"does not hold the values of the table '[\w-]+' \(it lacks '\w+'\)"),
        ('{"contenders": 3}', r"does not hold the values of the table '[\w-]+' \(TypeError"),
    ],
    ids=["cut short", "not text", "a list", "empty", "other values"],
)
def test_a_broken_result_is_named_and_nothing_is_written(tree: Path, content: str, message: str) -> None:
    (tree / FOLDER / "loader_cpu.json").write_text(content, errors="surrogateescape")
    before = texts(tree)
    ending = "restore it with git checkout, or measure it again with python -m benchmarks.bench_loader"
    with pytest.raises(InputError, match=rf"^benchmarks/results/loader_cpu\.json {message}.*: {ending}") as caught:
        update(tree, check=False)
    assert "\n" not in str(caught.value)
    assert texts(tree) == before


def test_an_unknown_result_is_shown_or_named(tree: Path) -> None:
    path = tree / FOLDER / "new.json"
    path.write_text(json.dumps({"environment": GPU}))
    assert update(tree, check=False) == {"benchmarks/README.md": ["overview"]}
    path.write_text("{}")
    with pytest.raises(InputError, match=r"results/new\.json does not hold .* git checkout, or remove it\."):
        update(tree, check=False)


def test_made_up_gpu_results_fill_the_tables(tree: Path) -> None:
    made_up = {
        "views_cuda_bfloat16": views_result("bfloat16"),
        "views_cuda_float32": views_result("float32"),
        "loader_cuda": loader_result(),
        "loader_tiny_cuda": loader_result(),
        "train_cuda": train_result(),
    }
    for name, result in made_up.items():
        (tree / FOLDER / f"{name}.json").write_text(json.dumps(result))
    assert update(tree, check=False) == {
        "README.md": ["headlines"],
        "benchmarks/MEASURED.md": ["views", "loader", "train"],
        "benchmarks/README.md": ["overview", "views-details"],
    }
    headlines, readme, details = (
        (tree / file).read_text().splitlines()
        for file in ("README.md", "benchmarks/MEASURED.md", "benchmarks/README.md")
    )
    dash = "\N{EN DASH}"
    assert cells(readme, "fused")[3:] == [f"5,000 (2,500{dash}10,000)", "25,000", f"50.0 (25.0{dash}100)"]
    assert cells(readme, "torchvision")[3:] == [f"100 (100{dash}100)", "500", "1"]
    assert cells(readme, "compiled")[3:] == ["failed", "", ""]
    assert cells(readme, "native")[3:] == ["", "", ""], "it runs on the CPU only"
    assert cells(headlines, "the five views of photos, against torchvision")[1] == "50.0 times"
    loading = "reading, decoding and views of photos, against a DataLoader with torchvision"
    assert cells(headlines, loading)[1] == "10.4 times (folder + auto)", "what is there is shown by its name"
    assert cells(headlines, "the same from the second epoch on, with `--cache`")[1] == "8.00 times"
    assert cells(headlines, "the same of 64-pixel images")[1] == "8.00 times (shards + dali)"
    assert cells(details, "GPU, float32", "fused")[-3:] == ["50.0 %", "3e-2", "2e0"]
    assert cells(readme, "GPU", "folder + auto") == [
        f"4,360 (4,320{dash}4,400)",
        "21,800",
        "1,230 + 77.7 on the GPU",
        f"10.4 (10.0{dash}10.8)",
    ]
    assert cells(readme, "GPU", OURS) == ["970", "1.2 %", "4.6 %", "3.3 %", "1,230 + 54,300 on the GPU"]
    assert any(
        line.startswith("Loaded over synthetic input: ")
        and all(words in line for words in ("GPU 0.970", "DataLoader: ", "GPU 0.500", "GPU 3.88"))
        for line in readme
    )
    versions = f"torch {GPU['packages']['torch']}"
    (train_line,) = [line for line in readme if "results/train_cuda.json)" in line]
    assert train_line.startswith(f"- [GPU](results/train_cuda.json): NVIDIA H100, 16 cores (Xeon), {versions}")
    assert train_line.endswith("`byol_resnet50_200ep`, resnet50, batch 128, one trial: `python -m benchmarks.made_up`")


def test_cpu_results_that_are_measured_now_fill_the_tables() -> None:
    cpu = {"device": "cpu", "environment": GPU | {"gpus": []}}
    trained = train_result() | cpu
    for contender in trained["contenders"].values():
        del contender["device_idle"], contender["launching"], contender["device_mib"]
    lines = tables.train({"train_cpu": trained})
    assert cells(lines, "CPU", OURS) == ["970", "1.2 %", "", "", "1,230"]
    assert cells(lines, "GPU")[0] == "not measured yet"
    cold = loader_result() | cpu | {"cold": True, "disk": "100 reads a second", "more": "fields"}
    lines = data_tables.loader_cold({"loader_cold_cpu": cold})
    assert cells(lines, "CPU", "DataLoader")[-1] == "1"
    assert "100 reads a second, at most 2.1 % of the files in memory before a trial, median of 2 trials" in lines[-1]


def test_kernel_times_fill_the_last_column() -> None:
    times = {
        name: {"now": {"milliseconds": 0.128}} for name in ("weights", "columns", "rows", "color", "down", "along")
    }
    lines = data_tables.view_kernels({"tune_fused": {"images": 256, "kernels": times, "environment": GPU}})
    assert cells(lines, "columns")[-1] == "0.500"
    assert cells(lines, "all")[-1] == "3.000"
    assert lines[-1].startswith("- [Times](results/tune_fused.json): NVIDIA H100, 16 cores")


def test_a_failed_implementation_stays_in_the_table() -> None:
    result = train_result()
    del result["contenders"][PLAIN]
    result |= {"failed": {PLAIN: "out of memory"}, "times_plain_with_dataloader": None}
    lines = tables.train({"train_cuda": result})
    assert cells(lines, "GPU", PLAIN) == ["failed", "", "", "", ""]
    assert any("mvssl over the plain step with a DataLoader: GPU not measured" in line for line in lines)


def test_origin_of_a_result() -> None:
    assert machine({"device": "cpu", "environment": GPU}) == "16 cores (Xeon)", "the GPU was not used"
    unnamed = GPU | {"processor": None, "machine": "aarch64"}
    assert machine({"device": "cpu", "environment": unnamed}) == "16 cores (aarch64)"
    assert origin({}, "train_cpu", "CPU") == ("- CPU: not measured yet (`python -m benchmarks.bench_train DATA`).")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (347.7997, "348"),
        (1738.998, "1,740"),
        (10.496, "10.5"),
        (9.996, "10.0"),
        (999.6, "1,000"),
        (0.7352, "0.735"),
        (0.09996, "0.100"),
        (1.0, "1.00"),
        (123456.0, "123,000"),
        (0.0, "0"),
        (-2.4045, "-2.40"),
        (float("nan"), "nan"),
    ],
)
def test_three_digits_count(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_rounding_of_spread_shares_and_small_numbers() -> None:
    assert with_spread(347.8, {"min": 270.83, "max": 368.88, "n": 5}) == "348 (271\N{EN DASH}369)"
    assert with_spread(347.8, {"min": 347.8, "max": 347.8, "n": 1}) == "348"
    assert (percent(0.0324), percent(1.0), percent(0)) == ("3.2 %", "100.0 %", "0.0 %")
    assert (scientific(5.54e-6), scientific(0.0), scientific(9.7e-4)) == ("6e-6", "0", "1e-3")


def test_the_command_checks_and_says_what_it_found() -> None:
    result = subprocess.run(
        [sys.executable, *COMMAND.split()[1:], "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "All tables match the results.\n"
