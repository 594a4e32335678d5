"""Vectors to clustered codes; the same as `ksub codes cluster`.

    python preprocessing/build_codes.py --embeddings vectors.npy --num-tables 3 --table-size 128 --out codes.safetensors

`--embeddings` may also be a shards folder, a run, a model folder or a model's name. The work is in
ksub_ds/vectors and ksub_ds/codes.
"""

import sys

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse
from ksub_ds.vectors.build import ClusterVectors, build_codes, report


def main() -> None:
    """Run; a user's mistake is one line and exit code 2, Ctrl-C one line and 130."""
    try:
        settings = parse(ClusterVectors, None, "preprocessing/build_codes.py")
        table = build_codes(settings)
    except UserError as error:
        if distributed.is_main() or not error.agreed:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if distributed.is_main():
        print(report(table, settings.out))


if __name__ == "__main__":
    main()
