#!/usr/bin/env bash
# A new user's first hour in small: train on a folder, stop, go on, change the method, evaluate,
# export, load. Each command is printed with its seconds and lines; the first that fails ends it.
#
#   tools/first_hour.sh FOLDER [IMAGES]
#
# FOLDER is made and must not exist. IMAGES: a folder of images; else Debian's tuxpaint stamps where
# they are installed, else pictures that are drawn here. PYTHON is the interpreter (default python);
# where its ddp_ssl lies is printed first.
set -euo pipefail

place=${1:?tools/first_hour.sh FOLDER [IMAGES]}
python=${PYTHON:-python}
images=${2:-/usr/share/tuxpaint/stamps}
# Both are used from another folder.
case $python in /*) ;; */*) python=$PWD/$python ;; esac
case $images in /*) ;; *) images=$PWD/$images ;; esac
mkdir "$place"
place=$(cd "$place" && pwd)
# Smaller than a user's run, and the same on any machine.
small=(run.device=cpu run.threads=1 'model.backbone_args={channels: [8, 8, 16, 16]}'
  'model.projector=[64, 64]' optim.precision=fp32 optim.epochs=8 data.batch_size=32)

if ! [ -d "$images" ]; then
  images=$place/pictures
  "$python" - "$images" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
for number in range(160):
    folder = Path(sys.argv[1]) / f"class{number % 4}"
    folder.mkdir(parents=True, exist_ok=True)
    coarse = rng.normal(60 + 40 * (number % 4), 60, (4 + number % 4, 6, 3)).clip(0, 255)
    Image.fromarray(coarse.astype(np.uint8)).resize((90, 70)).save(folder / f"{number}.png")
PYTHON
fi
cd "$place"
"$python" -c 'import ddp_ssl; print(ddp_ssl.__file__)'

# try NAME COMMAND...: the command's output goes to NAME.log
try() {
  local name=$1 began=$SECONDS
  shift
  printf '$'
  printf ' %q' "$@"
  echo
  if ! "$@" >"$name.log" 2>&1; then
    tail -n 20 "$name.log"
    echo "first_hour: $name failed" >&2
    exit 1
  fi
  echo "  $((SECONDS - began)) s, $(wc -l <"$name.log") lines"
}

state() { sed -n 's/^ *"state": "\(.*\)".*/\1/p' "$1/status.json"; }

try choices "$python" -m ddp_ssl.train "$images" --print-config
grep '^# ' choices.log

# Stopped after its first step by itself, and gone on with by the command that is printed.
stopped() {
  "$@" &
  local run=$!
  until grep -qs 'first step: ' run/train.log || ! kill -0 $run; do sleep 0.05; done
  kill -TERM $run
  wait $run
}
try train stopped "$python" -m ddp_ssl.train "$images" "${small[@]}" run.dir=run
grep 'stopping as soon as possible' train.log
[ "$(state run)" = preempted ]
again=$(sed -n 's/.*to go on: //p' train.log)
try resume bash -c "$again"
[ "$(state run)" = 'done' ]
grep 'k-NN' resume.log

try method "$python" -m ddp_ssl.train "$images" "${small[@]}" method.name=simclr run.dir=simclr
[ "$(state simclr)" = 'done' ]
try evaluate "$python" -m ddp_ssl.evaluate knn run
try export "$python" -m ddp_ssl.export run --format timm --out exported
awk '/^```/ { inside = !inside; next } inside' run/result.md >load.py
echo 'print(sum(p.numel() for p in model.parameters()), "parameters")' >>load.py
try load "$python" load.py
cat load.log
