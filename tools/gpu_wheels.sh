#!/usr/bin/env bash
# The Python packages that a bare GPU machine lacks, carried there as files of less than 60 MiB.
#
#   tools/gpu_wheels.sh fetch DIR             here: DIR/part-00 is all but DALI, the rest is DALI
#   tools/gpu_wheels.sh install DIR TARGET    there: what is in DIR, into the folder TARGET
#
# Then `export PYTHONPATH=TARGET`. The machine has Python 3.12 (PYTHON_VERSION names another) with
# torch for CUDA 13, torchvision, timm and tensorboard. Versions are those of constraints.txt.
# `install` takes part-00 alone, or all parts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=${PYTHON_VERSION:-3.12} dali=nvidia-dali-cuda130

download() {  # FOLDER PACKAGE...: wheels with what they need
  local folder=$1 tags=() tag
  shift
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    tags+=(--platform "${tag}_x86_64")
  done
  "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
    --implementation cp --python-version "$version" "${tags[@]}" -c "$root/constraints.txt" \
    -d "$folder" "$@"
}

case "${1:-}-$#" in
  fetch-2)
    mkdir -p "$2"
    to=$(cd "$2" && pwd)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    rm -f "$to"/part-*
    # torchmetrics needs torch, which the machine has: without what it needs.
    download "$work/small" --no-deps torchmetrics lightning-utilities
    download "$work/small" pydantic submitit pytest
    download "$work/dali" "$dali"
    rm -f "$work"/*/{numpy,torch,PyYAML,pyyaml}-*
    tar -cf "$to/part-00" -C "$work/small" .
    tar -c -C "$work/dali" . | split -b 56M -d --numeric-suffixes=1 - "$to/part-"
    ls -l "$to"
    ;;
  install-3)
    mkdir -p "$3"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    tar -xf "$2/part-00" -C "$work"
    if [ -e "$2/part-01" ]; then
      find "$2" -name 'part-*' ! -name part-00 -print0 | sort -z | xargs -0 cat | tar -x -C "$work"
    fi
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
      --no-compile --upgrade --target "$3" "$work"/*.whl
    ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
