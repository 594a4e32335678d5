"""Vectors to clustered codes; the same as `ksub codes cluster`.

    python preprocessing/build_codes.py --embeddings vectors.npy --num-tables 3 --table-size 128 --out codes.safetensors

`--embeddings` may also be a shards folder, a run, a model folder or a model's name. The work is in
ksub_ds/vectors and ksub_ds/codes.
"""

import sys

from ksub_ds.common import distributed
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.options import parse
from ksub_ds.vectors.build import ClusterVectors, build_codes, report


def main() -> None:
    """Parse the command line, build the codes and print their report."""
    settings = parse(ClusterVectors, None, "preprocessing/build_codes.py")
    table = build_codes(settings)
    if distributed.is_main():
        print(report(table, settings.out))


if __name__ == "__main__":
    sys.exit(run_main(main, resumes=False))
