"""Run command lines of the documents one after the other, each in a fork of this process: torch is imported once.

    python tests/docs/run_commands.py LINES.json      (in a folder that has what the lines name)

LINES.json holds command lines as a shell would get them: `ksub ...` or `python preprocessing/NAME.py ...`. The first
that fails ends this with its exit code and the line on stderr.
"""

import atexit
import json
import os
import runpy
import shlex
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401 - these three take the seconds that the forks are spared
import matplotlib.figure  # noqa: F401
import transformers.models.roberta.modeling_roberta  # noqa: F401

from ksub_ds.cli import main as ksub

ROOT = Path(__file__).resolve().parents[2]
# Fewer steps and smaller tables than a reader would take; the lines are otherwise what is written.
SMALLER = {
    "codes cluster": {"--table-size": "16", "--workers": "1"},
    "pretrain": {"--max-steps": "4", "--eval-every": "2", "--eval-sequences": "2", "--global-batch-size": "4"},
    "analyze": {"--num-tokens": "300", "--points": "50"},
}


def smaller(arguments: list[str]) -> list[str]:
    """The arguments of a `ksub` command with SMALLER's values for the options that it has or may have."""
    made = list(arguments)
    for command, options in SMALLER.items():
        if " ".join(arguments).startswith(command):
            for option, value in options.items():
                if option in made:
                    made[made.index(option) + 1] = value
                else:
                    made += [option, value]
    return made


def run(line: str) -> int:
    """Run one command line; returns its exit code."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "ksub":
        return ksub(smaller(arguments))
    if program == "python" and arguments[0].startswith("preprocessing/"):
        sys.argv = arguments
        try:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0
    print(f"error: the documents may show `ksub` and `python preprocessing/` in bash blocks, not {program!r}")
    return 2


def run_apart(line: str) -> int:
    """`run` in a process of its own, as for a reader who types line after line; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        code = run(line)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # they end worker processes; the rest of an interpreter's end takes two seconds a line
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    for line in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"$ {line}", flush=True)
        code = run_apart(line)
        if code:
            print(f"exit code {code} from: {line}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
