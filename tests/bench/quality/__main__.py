"""`python -m tests.bench.quality DATASET [--path FILE] [--plot PNG]`: everything, in one run.

`penchant eval DATASET --learn` with SASRec and GRU4Rec beside it. Prints and never asserts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stream.evaluation_plot import draw
from stream.evaluation_view import plain

from .run import measured


def main() -> None:
    """Run one data set, print its tables, draw it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--path", type=Path, action="append")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    report = measured(given.dataset, given.path)
    print(plain(report))
    if given.plot:
        draw(report, given.plot)


if __name__ == "__main__":
    main()
