#!/bin/bash
# Download the wheels that a GPU machine without a network lacks into a folder: benchmarks/gpu/wheels.sh DIR
#
# The machine has Python 3.12 with torch 2.11, transformers and what these bring; versions here fit those. DeepSpeed is
# published as source only and is built here, without torch and without nvcc. PYTHON names the Python whose pip works.
set -euo pipefail
folder=${1:?usage: wheels.sh DIR}
python=${PYTHON:-python3}

# What the package imports to train, and nothing that the machine has; the last line is what its loss is compared with.
packages=(
    hjson pydantic annotated-types typing-inspection
    tyro docstring-parser typeguard
    "datasets<5.3" "dill<0.4.2" "multiprocess<0.70.20" xxhash msgpack
    liger-kernel cut-cross-entropy
)

mkdir -p "$folder"
target=(--only-binary=:all: --python-version 3.12 --implementation cp)
for platform in manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
    target+=(--platform "$platform")
done
download() { "$python" -m pip download -qq --no-deps --dest "$folder" "${target[@]}" "$@"; }

[ -e "$folder"/deepspeed-*.whl ] ||
    DS_BUILD_OPS=0 "$python" -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir "$folder" deepspeed==0.19.8
download "${packages[@]}"
# pydantic names the one pydantic-core that it works with.
pydantic=$(echo "$folder"/pydantic-2*.whl)
download "$("$python" - "$pydantic" <<'PYTHON'
import re, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    print(re.search(r"^Requires-Dist: (pydantic-core==\S+)", wheel.read(metadata).decode(), re.MULTILINE)[1])
PYTHON
)"
ls -l "$folder"
