#!/bin/bash
# Run the trip on a machine without a network: bash go.sh --out DIR [options of run.py]
#
# pack.sh puts this file beside wheels/, source.tar.xz and data.tar.xz; they are unpacked once, into WORK.
# PYTHON is a Python that has torch and transformers [python3].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-${TMPDIR:-/tmp}/ksub_trip}
python=${PYTHON:-python3}
if [ ! -e "$work/unpacked" ]; then
    mkdir -p "$work"
    "$python" -m pip install --quiet --upgrade --no-index --no-deps --target "$work/site" "$here"/wheels/*.whl
    for name in source data; do "$python" -m tarfile --extract "$here/$name.tar.xz" "$work/$name"; done
    touch "$work/unpacked"
fi
export PYTHONPATH="$work/source:$work/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$work/source/benchmarks/gpu/run.py" --data "$work/data" "$@"
