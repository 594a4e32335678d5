#!/bin/bash
# Pack all that a GPU machine without a network needs into one folder of less than 60 MB, and print what to type there:
#
#     TEXT=text TOKENIZER=sentencepiece.bpe.model benchmarks/gpu/pack.sh PACK
#     SHARDS=shards CODES=codes benchmarks/gpu/pack.sh PACK
#
# SHARDS      a folder of token shards; without it they are made from TEXT (a folder of <lang>.jsonl.gz) by TOKENIZER.
#             20M tokens are 30 MB here.
# CODES       a folder with positional.safetensors and clustered.safetensors; without it both are made from the shards
#             (Algorithm 2 on co-occurrence: some minutes on two cores for 250,002 tokens).
# TABLE_SIZE  rows of a table of the clustered codes [128]
# WHEELS      a folder of wheels; without it wheels.sh downloads them.
# PYTHON      the Python that has this project's packages [python3]
#
# What was made lies in PACK.parts and is taken again the next time.
set -euo pipefail
case "$#,${1:-}" in
1,-*|0,*|[2-9],*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
pack=$1
python=${PYTHON:-python3}
limit=60000000
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
parts=$pack.parts
fail() { echo "error: $*" >&2; exit 2; }
[ -n "${SHARDS:-}" ] || [ -d "${TEXT:-}" -a -e "${TOKENIZER:-}" ] || fail "give SHARDS, or TEXT (a folder) and TOKENIZER"
[ -z "${SHARDS:-}" ] || [ -e "$SHARDS/manifest.json" ] || fail "SHARDS=$SHARDS: no manifest.json there"
for file in positional clustered; do
    [ -z "${CODES:-}" ] || [ -e "$CODES/$file.safetensors" ] || fail "CODES=$CODES: no $file.safetensors there"
done
mkdir -p "$pack" "$parts"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
say() { echo "== $*"; }

if [ -z "${SHARDS:-}" ]; then
    SHARDS=$parts/shards
    if [ ! -e "$SHARDS/manifest.json" ]; then
        say "token shards from $TEXT"
        "$python" "$root/preprocessing/shard_text.py" --input "$TEXT" --tokenizer "$TOKENIZER" --out "$SHARDS" \
            --sequence-length 512 --validation-fraction 0.01
    fi
fi

if [ -z "${CODES:-}" ]; then
    CODES=$parts/codes
    mkdir -p "$CODES"
    say "codes"
    [ -e "$CODES/positional.safetensors" ] || "$python" -m ksub_ds.cli codes positional --num-tables 3 \
        --tokenizer "$SHARDS/tokenizer" --out "$CODES/positional.safetensors"
    [ -e "$CODES/clustered.safetensors" ] || "$python" -m ksub_ds.cli codes cluster --num-tables 3 \
        --embeddings "$SHARDS" --table-size "${TABLE_SIZE:-128}" --out "$CODES/clustered.safetensors"
fi

if [ -z "${WHEELS:-}" ]; then
    WHEELS=$parts/wheels
    say "wheels"
    PYTHON=$python bash "$here/wheels.sh" "$WHEELS"
fi

say "packing"
rm -rf "$pack/wheels"
cp -r "$WHEELS" "$pack/wheels"
git -C "$root" archive HEAD ksub_ds benchmarks ds_configs preprocessing experiments/demo | xz -6 > "$pack/source.tar.xz"
# Links are followed, so that the two folders may lie anywhere.
rm -rf "$parts/data" && mkdir "$parts/data"
ln -s "$(realpath "$SHARDS")" "$parts/data/shards"
ln -s "$(realpath "$CODES")" "$parts/data/codes"
tar --dereference --exclude=.lock -C "$parts/data" -cf - shards codes | xz -6 -T0 > "$pack/data.tar.xz"
cp "$here/go.sh" "$pack/go.sh"

for file in source.tar.xz data.tar.xz; do xz --test "$pack/$file"; done
du -sb "$pack"/* | sort -n
size=$(du -sb "$pack" | cut -f1)
if [ "$size" -gt "$limit" ]; then
    echo "error: $pack has $size bytes, more than $limit: give fewer shards" >&2
    exit 1
fi
say "$pack: $size bytes. On the machine, with the folder there:"
echo "bash $(basename "$pack")/go.sh --out OUT            (8 minutes, then --only run; a part again: --only loss; on a CPU: --rehearse)"
