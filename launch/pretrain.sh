#!/usr/bin/env bash
''':'
# Pretrain on every slot of a hostfile. Both of these work, and do the same:
#
#     launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny --codes codes.safetensors --data shards --out run
#     deepspeed launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny ...
#
# Launcher options (--hostfile, --launcher, --max-restarts, --include, ...) are for ksub_ds/cluster/launch.py and
# `deepspeed`, the rest for `python -m ksub_ds.pretrain`; launch/pretrain.sh --help lists both. docs/cluster.md
# explains how to use several hosts. There are no hyper-parameters here.
#
# Two programs read this file. DeepSpeed passes what follows a script to the script, the hostfile
# too, and starts it as `python -u launch/pretrain.sh --local_rank=0 --hostfile FILE ...` on one machine.
# So to Python this part is a string, and to the shell all but this part is one.
set -eu
script=$0
if [ -n "${SLURM_SUBMIT_DIR:-}" ] && [ "${script##*/}" = slurm_script ]; then
    script=$SLURM_SUBMIT_DIR/launch/pretrain.sh # sbatch runs a copy from its spool folder
fi
root=$(cd "$(dirname "$script")/.." && pwd)
if ! command -v deepspeed >/dev/null && [ -x "$root/.venv/bin/deepspeed" ]; then
    PATH=$root/.venv/bin:$PATH
fi
if ! command -v deepspeed >/dev/null; then
    echo 'error: deepspeed is not on the PATH; run "make install", or activate the environment that has it' >&2
    exit 2
fi
if command -v python >/dev/null; then python=python; else python=python3; fi
exec "$python" "$script" "$@"
: <<'PYTHON'
'''

import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

from ksub_ds.cluster import launch
from ksub_ds.common.exit_codes import run_main


def main():
    given = launch.split_arguments(sys.argv[1:])
    under_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if {"-h", "--help"} & set(given.trainer):
        print(launch.help_text(), "\n", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "ksub_ds.pretrain", "--help"])
    if under_launcher and not given.deepspeed:  # `deepspeed [options] launch/pretrain.sh ARGS`: the ranks are right
        sys.argv = [sys.argv[0], *given.trainer]
        runpy.run_module("ksub_ds.pretrain", run_name="__main__", alter_sys=True)
    elif under_launcher and os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # one such process per slot or GPU was started; the first one starts the run
    else:
        if under_launcher:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the outer launcher's choice for one rank
        return launch.Launch(given).run()


sys.exit(run_main(main))
PYTHON = ""
PYTHON
