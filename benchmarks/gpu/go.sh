#!/bin/bash
# Run the trip on a machine without a network: bash go.sh --out DIR [options of run.py]
#
# pack.sh puts this file beside wheels/, source.tar.xz and data.tar.xz; they are unpacked into WORK, once for each pack.
# PYTHON is a Python that has torch and transformers [python3].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-${TMPDIR:-/tmp}/ksub_trip}
python=${PYTHON:-python3}
stamp=$(cat "$here"/*.tar.xz "$here"/wheels/*.whl | sha256sum)
if [ "$(cat "$work/unpacked" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$work/site" "$work/source" "$work/data"
    mkdir -p "$work"
    "$python" -m pip install --quiet --upgrade --no-index --no-deps --target "$work/site" "$here"/wheels/*.whl
    for name in source data; do "$python" -m tarfile --filter data --extract "$here/$name.tar.xz" "$work/$name"; done
    echo "$stamp" > "$work/unpacked"
fi
export PYTHONPATH="$work/source:$work/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$work/source/benchmarks/gpu/run.py" --data "$work/data" "$@"
