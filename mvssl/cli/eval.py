"""mvssl-eval: measure a backbone."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from mvssl.cli.evaluations import EVALUATIONS
from mvssl.ranks import exit_code_of_rank
from pipelines.runtime import InputError, run_cli, shown

USAGE = """usage: mvssl-eval EVALUATION (--run RUN | --weights FILE) [options]

  mvssl-eval knn --run RUN         votes of the nearest training images
  mvssl-eval linear --run RUN      a linear classifier on frozen features
  mvssl-eval finetune --run RUN    the whole network, with all or some labels
  mvssl-eval compare RUN...        results and curves of several runs side by side

  mvssl-eval neighbours --run RUN  a page of images with their nearest neighbours
  mvssl-eval scatter --run RUN     a page with a map of the features (PCA, UMAP) and a thumbnail of every point
  mvssl-eval attention --run RUN   a page of attention or activation maps

  mvssl-eval EVALUATION --help     every option

FILE is an exported backbone, a checkpoint of the reference implementation, MoCo, SimSiam or DINO, or weights of timm
or torchvision. An existing result is shown, not computed again; an existing page is replaced."""
ALIASES = {"neighbors": "neighbours", "map": "scatter"}
"""Other names of evaluations."""


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name = ALIASES.get(arguments[0], arguments[0])
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name[:100], [*EVALUATIONS, *ALIASES], n=1)
        remedy = f"did you mean {ALIASES.get(near[0], near[0])}?" if near else "run mvssl-eval --help."
        raise InputError(f"evaluation is {shown(name)} but must be one of {', '.join(EVALUATIONS)}: {remedy}")
    return exit_code_of_rank(lambda: EVALUATIONS[name](arguments[1:]))


def main() -> None:
    """Console script."""
    sys.exit(run_cli(lambda: body(sys.argv[1:])))


if __name__ == "__main__":
    main()
