"""Pretrain: what every launcher starts on each rank, and what `ksub pretrain` calls.

    python -m ksub_ds.pretrain --preset tiny --codes codes.safetensors --data shards --out run --max-steps 40
    launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny ...    (the same, on 2 ranks)

Exit codes: 0 the last step was reached, or a STOP file or --max-hours ended the run in order; 2 the user's
mistake or a run that cannot go on, one line on stderr from rank 0; 128 + n signal n, after a checkpoint (130,
Ctrl-C, also before the first step).
"""

import contextlib
import io
import sys
from collections.abc import Sequence

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    try:
        import tyro

        from ksub_ds.pretrain.recipe import Recipe

        silent = contextlib.nullcontext() if distributed.is_main() else contextlib.redirect_stderr(io.StringIO())
        with silent:  # one rank is enough to say what is wrong with the arguments
            recipe = tyro.cli(Recipe, args=arguments, prog="ksub pretrain")
        from ksub_ds.pretrain.run import run  # seconds of imports that --help does without

        return run(recipe)
    except UserError as error:
        if distributed.is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # before the first step or after the last; in between the loop saves and returns
        if distributed.is_main():
            print("interrupted; the same command continues", file=sys.stderr, flush=True)
        return 130
    finally:
        if "torch" in sys.modules:
            distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
