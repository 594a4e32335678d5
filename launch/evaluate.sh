#!/usr/bin/env bash
# Evaluate with one worker on every slot of a hostfile, or with one worker on this machine:
#
#     launch/evaluate.sh --hostfile launch/hostfile.example xnli --model model --data xnli --setting cross-lingual --out results
#     launch/evaluate.sh xnli --model model ...        (one worker: a laptop, or one task of srun or of a SLURM array)
#
# Workers share only the --out folder: start any number, on any number of machines, at any time. The options
# behind the task's name are those of `ksub evaluate`; there are no hyper-parameters here.
set -eu
script=$0
if [ -n "${SLURM_SUBMIT_DIR:-}" ] && [ "${script##*/}" = slurm_script ]; then
    script=$SLURM_SUBMIT_DIR/launch/evaluate.sh # sbatch runs a copy from its spool folder
fi
root=$(cd "$(dirname "$script")/.." && pwd)
if [ -x "$root/.venv/bin/python" ] && ! python -c 'import sys, importlib.util; sys.exit(not importlib.util.find_spec("ksub_ds"))' 2>/dev/null; then
    PATH=$root/.venv/bin:$PATH
fi
if command -v python >/dev/null; then python=python; else python=python3; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m ksub_ds.evaluate.hosts "$@"
