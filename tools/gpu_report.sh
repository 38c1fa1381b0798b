#!/usr/bin/env bash
# What this GPU does with a step, as a table in a few minutes; needs no network and no data.
#
#   tools/gpu_report.sh OUT [--minutes 4] [--rehearse]
#
# Writes OUT/table.md and OUT/rows.jsonl, a line per measurement as soon as it is known; only a
# measurement that failed has the key "error", and the exit code is then 1. Ends by itself after so
# many minutes; a group for which no time was left has the key "left_out". Without DALI all but the
# input is measured. --rehearse takes tiny sizes, on the CPU if there is no GPU. Python is $PYTHON,
# else .venv/bin/python, else python3.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: tools/gpu_report.sh OUT [--minutes 4] [--rehearse]"
out="" minutes=4 rehearse=()
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-}; shift ;;
    --rehearse) rehearse=(--rehearse) ;;
    -*) echo "$usage" >&2; exit 2 ;;
    *) [ -z "$out" ] || { echo "$usage" >&2; exit 2; }; out=$1 ;;
  esac
  shift
done
case $minutes in "" | *[!0-9]*) echo "gpu_report: error: --minutes: a whole number" >&2; exit 2 ;; esac
[ -n "$out" ] || { echo "$usage" >&2; exit 2; }
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -e "$out/rows.jsonl" ] && { echo "gpu_report: error: $out has a report already" >&2; exit 2; }
[ ${#rehearse[@]} = 0 ] && threads=4 || threads=1
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
end=$((SECONDS + 60 * 10#$minutes))
printf '# GPU report, %s\n' "$(date +%F)" >"$out/table.md"

note() {  # GROUP KEY TEXT: a row about a group as a whole
  local text
  # shellcheck disable=SC1003
  text=$(printf '%s' "$3" | tr -cd '[:print:]' | tr -d '"\\')
  printf '{"group": "%s", "%s": "%s"}\n' "$1" "$2" "$text" >>"$out/rows.jsonl"
  printf '\n## %s\n\n%s\n' "$1" "$text" >>"$out/table.md"
}

# In the order of their worth; seconds that each may take.
for group in machine:40 steps:150 parts:60 compiled:150 tests:80 whole:120 vit:80 images:420 \
  compiled_more:300; do
  name=${group%:*} limit=${group#*:} left=$((end - SECONDS))
  if [ "$left" -lt 10 ]; then
    note "$name" left_out "left out: the $minutes minutes were over"
    continue
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  echo "gpu_report: $name (at most $limit s)"
  timeout -k 5 "$limit" "$PYTHON" "$root/tools/gpu_report.py" "$name" "$out" ${rehearse[@]+"${rehearse[@]}"} \
    >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) ;;
    124) key=error; [ "$limit" = "$left" ] && key=left_out
      note "$name" "$key" "stopped after $limit s; what was measured until then is above" ;;
    *) note "$name" error "ended with exit code $status: $(tail -n 1 "$out/$name.log")" ;;
  esac
done
cat "$out/table.md"
! grep -q '"error":' "$out/rows.jsonl"
