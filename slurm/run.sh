#!/usr/bin/env bash
# One training run as one Slurm job. The job scripts beside this file hand over to it; it is not
# submitted itself. Nothing here needs editing: resources are sbatch's arguments, the rest is
# environment:
#
#   RUN_DIR           the run folder (default runs/<job name>-<job id>); an older one is continued
#   LAUNCHER          srun: one task per GPU (default); torchrun: one agent per node
#   PYTHON            the interpreter (default: the repository's .venv, else python)
#   CONTAINER         FILE.sif for Apptainer; any other image is given to Pyxis
#   CONTAINER_MOUNTS  further folders to show in the container, A,B:C (here and the run folder are)
#   MAX_REQUEUES      how often the job may start again in all (default 20)
#   MAX_RESTARTS      torchrun only: restarts in place, without the queue (default 0)
#   SRUN_ARGS         further arguments of srun, such as --cpu-bind=cores
#
# The end is read from RUN_DIR/status.json, which rank 0 writes. An exit code does not say whether
# the run can go on. docs/slurm.md has the table.
# shellcheck disable=SC2317  # what traps call is not unreachable
set -uo pipefail

say() { echo "== $(date '+%F %T') $*"; }
complain() { echo "$name: $*" >&2; }

usage() {
  local words=data.root=DIR first="${config#"$repo"/} "
  [ "$name" = train ] && words="CONFIG.yaml $words" first="CONFIG.yaml "
  [ "$what" = resume ] && words=RUN first=
  complain "not inside a Slurm job. With Slurm: sbatch --nodes=2 --gpus-per-node=8 slurm/$name.sh" \
    "$words; without: torchrun --nproc_per_node 8 -m ddp_ssl.$what $first$words"
  exit 2
}

# Array tasks are requeued by this name; the id of one of them is that of the whole array.
job=${SLURM_JOB_ID:-}
task=${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
[ -n "$task" ] && job=$SLURM_ARRAY_JOB_ID$task

# Another run has the folder: its state and its STOP are not this job's.
held_by_another() {
  local fresh # a dead run's claim stays until another run takes the folder
  fresh=$(find "$RUN_DIR" -maxdepth 1 -name 'claim-*.json' -mmin -6 2>/dev/null)
  [ -n "$fresh" ] && ! grep -qs "\"job\": \"$job\"" "$RUN_DIR"/claim-*.json
}

no_run() {
  complain "$1: the folder of a run, with its config.yaml, would be accepted"
  exit 2
}

# --- on every node: torchrun -----------------------------------------------------------------------

# The agent is no child of slurmstepd, so that signals reach it only where Slurm signals whole
# process trees. There USR2 would kill it, and SIGTERM ends it with an error that must not end the
# other nodes before their ranks have saved. The request itself travels by file.
on_node() {
  local stopping='' agent rc
  trap 'stopping=1; ask_to_stop a signal to the step' TERM USR1 USR2
  (trap '' USR1 USR2; exec "$@") & agent=$!
  until wait "$agent"; rc=$?; ! kill -0 "$agent" 2>/dev/null; do :; done
  [ -n "$stopping" ] && rc=0
  exit "$rc"
}

# --- stopping ------------------------------------------------------------------------------------

# A STOP that a user made is empty and means the end; one with text in it came from Slurm, and the
# job is to go on later.
ask_to_stop() {
  held_by_another && return
  [ -e "$RUN_DIR/STOP" ] || { mkdir -p "$RUN_DIR" && echo "launcher: $*" >"$RUN_DIR/STOP"; }
}

# Asked again and again until the step has ended, since the trainer removes an old STOP at its start.
on_signal() {
  # In a job of a few minutes Slurm's warning of the time limit comes at the start.
  if [ "$1" = USR2 ] && [ "$SECONDS" -lt 60 ] && [ -n "${SLURM_JOB_END_TIME:-}" ] &&
    [ "$((SLURM_JOB_END_TIME - $(date +%s)))" -le 600 ]; then
    say "USR2 right at the start of a short job: the trainer stops by itself before the end"
    return
  fi
  say "$1: asking the run to save and stop"
  ask_to_stop "$1"
  (trap '' TERM USR2; while kill -0 "${step:-$$}" 2>/dev/null; do ask_to_stop "$1"; sleep 2; done) &
  asker=$!
  trap '' USR2
  trap 'say TERM again' TERM
}

# --- after the end -------------------------------------------------------------------------------

# The value of a line `"FIELD": value,` of status.json.
status() {
  sed -n "s/^ *\"$1\": *\"\{0,1\}//p" "$RUN_DIR/status.json" 2>/dev/null | sed 's/"\{0,1\},\{0,1\}$//'
}

about_job() { scontrol show job -o "$job" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n1; }

# [DAYS-][HH:]MM:SS in seconds; nothing for UNLIMITED
seconds() {
  [[ $1 =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0
  local m=("${BASH_REMATCH[@]}")
  echo $((10#${m[2]:-0} * 86400 + 10#${m[4]:-0} * 3600 + 10#${m[5]} * 60 + 10#${m[6]}))
}

# Slurm is ending a job that nobody requeued and that had time left: somebody cancelled it.
# `scontrol requeue` would bring it back to life.
cancelled() {
  local state ran limit
  state=$(about_job JobState)
  case $state in RUNNING | '') return 1 ;; esac
  ran=$(seconds "$(about_job RunTime)") limit=$(seconds "$(about_job TimeLimit)")
  [ -z "$limit" ] || [ "${ran:-0}" -lt "$((limit - 1))" ]
}

requeue() {
  if [ "$(about_job Restarts)" -gt "$restarts" ] 2>/dev/null; then
    say "$1; Slurm has requeued the job by itself"
    exit 0
  elif cancelled; then
    say "$1; the job was cancelled, so it is not requeued. $resume"
    exit 1
  elif [ "$restarts" -ge "$MAX_REQUEUES" ]; then
    say "$1; not requeued: started again $restarts times (MAX_REQUEUES=$MAX_REQUEUES). $resume"
    exit 1
  fi
  say "$1; requeued"
  trap - TERM # before Slurm ends this shell for the requeue, which it then does at once
  scontrol requeue "$job" && exec sleep 300
  say "this job cannot be requeued. $resume"
  exit 1
}

# A crash is tried again unless it repeats itself: at the third one in a row after the same
# checkpoint the job gives up.
crashed() {
  local at log=$RUN_DIR/crashes.txt
  at=$(printf '%s\n' "$RUN_DIR"/checkpoints/step_*.json | sed -n 's/.*step_0*\([0-9][0-9]*\(_[0-9]*\)\{0,1\}\)\.json$/\1/p' | sort -V | tail -n1)
  mkdir -p "$RUN_DIR"
  echo "step=${at:-none} job=$job restart=$restarts srun=$rc" >>"$log"
  if [ "$(tail -n 3 "$log" | cut -d' ' -f1 | uniq -c | tr -d ' ')" = "3step=${at:-none}" ]; then
    say "crashed three times in a row after step ${at:-none}: given up. The reason is above. $resume"
    exit 1
  fi
  requeue "$1 (last checkpoint: step ${at:-none})"
}

# --- the job -------------------------------------------------------------------------------------

if [ "${1:-}" = --on-node ]; then
  shift
  on_node "$@"
fi

if [ "$#" -lt 2 ]; then
  echo "run.sh: submit one of the scripts beside it, such as slurm/imagenet100_adadim.sh" >&2
  exit 2
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$1 config=$2 what=train
shift 2
case $config in /*) ;; *) config=$repo/$config ;; esac
[ "$name" = resume ] && what=resume # RUN stands where a config does
[ -n "${SLURM_JOB_ID:-}" ] || usage
if [ "$name" = train ]; then # one's own config: a file, or whatever else ddp_ssl.train takes
  config=${1:-}
  if [ -f "$config" ]; then
    config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
  elif [[ ! -e $config && (-z $config || $config = *=* || $config = *.y*ml) ]]; then
    complain "${config:-no config}: a YAML file, or the name of a config, would be accepted as the first argument"
    exit 2
  fi
  shift
  own_name=$(basename "$config" | sed 's/\.ya\{0,1\}ml$//; s/[^A-Za-z0-9._-]/_/g')
fi
if [ "$what" = resume ]; then
  [ -n "${1:-}" ] || no_run "no folder given"
  RUN_DIR=$1 given=$1
  shift
fi

restarts=${SLURM_RESTART_COUNT:-0}
MAX_REQUEUES=${MAX_REQUEUES:-20}

# Tasks of an array live side by side, in the folder of a row or told apart by their number.
job_name=${SLURM_JOB_NAME:-$name}
[ "$job_name" = train ] && job_name=${own_name:-train} # nobody chose it
RUN_DIR=${RUN_DIR:-runs/$job_name-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
own=$task
[ "$what" = resume ] && own=
[ -n "${DDP_SSL_ROW:-}" ] && own=/$DDP_SSL_ROW
resuming=run.resume=auto
arguments=()
for argument in "$@"; do
  case $what:$argument in # ddp_ssl.resume refuses another folder itself
    train:run.dir= | train:run.dir=null) ;;
    train:run.dir=*) RUN_DIR=${argument#run.dir=} ;;
    train:run.resume=*) resuming=$argument ;; # a restart implies auto
    *) arguments+=("$argument") ;;
  esac
done
case $RUN_DIR in
  /*) ;;
  \~ | \~/*) RUN_DIR=$HOME${RUN_DIR#?} ;;
  *) RUN_DIR=$PWD/$RUN_DIR ;;
esac
again="RUN_DIR=$RUN_DIR sbatch ... slurm/$name.sh with the same arguments"
[ "$name" = resume ] && again="sbatch ... slurm/resume.sh $RUN_DIR"
resume="To go on: $again"
export RUN_DIR=$RUN_DIR$own
[ "$what" = train ] || [ -f "$RUN_DIR/config.yaml" ] || no_run "$given$own"

# One process per GPU; on CPU nodes, as many as --ntasks-per-node says. All CPUs of the node are
# shared out, however they were asked for (sbatch's --cpus-per-task does not reach srun).
LAUNCHER=${LAUNCHER:-srun}
nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
cpus=${SLURM_CPUS_ON_NODE:-1}
tasks=$processes
[ "$LAUNCHER" = torchrun ] && tasks=1
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK # srun refuses them beside its own
export SRUN_CPUS_PER_TASK=$((cpus > tasks ? cpus / tasks : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # until the trainer has counted its cores
export PYTHONUNBUFFERED=1 PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

# The node's address as Slurm knows it: its name need not resolve. Ports below the ephemeral ones.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
MASTER_ADDR=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$head} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# The deadline at which the trainer stops by itself; Slurm sets this from 22.05 on, not everywhere.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  SLURM_JOB_END_TIME=$(date -d "$(about_job EndTime)" +%s 2>/dev/null) && export SLURM_JOB_END_TIME
fi

python=${PYTHON:-python}
run=()
launch=(srun --kill-on-bad-exit=1 --wait=0 --export=ALL "--nodes=$nodes" "--ntasks=$((nodes * tasks))"
  "--ntasks-per-node=$tasks")
[ "$tasks" -gt "$cpus" ] && launch+=(--overcommit)
read -ra more <<<"${SRUN_ARGS:-}"
launch+=(${more[@]+"${more[@]}"})
mounts=$repo,$PWD,$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
case $config in "$repo"/* | "$PWD"/*) ;; /*) mounts+=,$(dirname "$config") ;; esac # a YAML of one's own
case ${CONTAINER:-} in
  '') [ -z "${PYTHON:-}" ] && [ -x "$repo/.venv/bin/python" ] && python=$repo/.venv/bin/python ;;
  *.sif) run+=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$CONTAINER") ;;
  *) launch+=("--container-image=$CONTAINER" "--container-workdir=$PWD" "--container-mounts=$(
    tr ',' '\n' <<<"$mounts" | sed 's/^[^:]*$/&:&/' | paste -sd, -)") ;;
esac
[ -n "${CONTAINER:-}" ] && mkdir -p "$RUN_DIR" # to be mounted it must exist

case $LAUNCHER in
  srun) run+=("$python") ;;
  torchrun)
    # An agent that is told to stop waits this long for its ranks to save.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
    launch+=(bash "$repo/slurm/run.sh" --on-node)
    run+=("$python" -m torch.distributed.run "--nnodes=$nodes" "--nproc-per-node=$processes"
      "--max-restarts=${MAX_RESTARTS:-0}" "--rdzv-id=$SLURM_JOB_ID-$restarts" --rdzv-backend=c10d
      "--rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT")
    ;;
  *)
    complain "LAUNCHER=$LAUNCHER is unknown; srun or torchrun would be accepted"
    exit 2
    ;;
esac
run+=(-m "ddp_ssl.$what")
if [ "$what" = resume ]; then
  run+=("$RUN_DIR" ${arguments[@]+"${arguments[@]}"})
else
  run+=("$config" ${arguments[@]+"${arguments[@]}"} "run.dir=$RUN_DIR" "$resuming")
fi

cat <<INFO
run folder  $RUN_DIR
            job $job, start $((restarts + 1)) of at most $((MAX_REQUEUES + 1)), on $nodes node(s) of $processes process(es), $cpus CPU(s) each, by $LAUNCHER
watch       tail -f $RUN_DIR/train.log; tensorboard --logdir $RUN_DIR
stop        touch $RUN_DIR/STOP (saves, then ends); scancel --batch --signal=USR2 $job (saves, then goes on in a new start)
resume      $again
INFO
[ "$cpus" -lt "$((2 * processes))" ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ] && say \
  "only $cpus CPU(s) for $processes GPU(s) on a node: sbatch --cpus-per-gpu=8 (or --exclusive) gives more"

# A job that is submitted anew counts crashes anew. Files of an earlier start are no result of this one.
[ "$restarts" = 0 ] && ! held_by_another && rm -f "$RUN_DIR/crashes.txt"
before=$(cat "$RUN_DIR/status.json" 2>/dev/null)

trap 'on_signal USR2' USR2
trap 'on_signal TERM' TERM
"${launch[@]}" "${run[@]}" &
step=$!
# A trapped signal interrupts `wait`.
until wait "$step"; rc=$?; ! kill -0 "$step" 2>/dev/null; do :; done
[ -n "${asker:-}" ] && { kill -KILL "$asker" && wait "$asker"; } 2>/dev/null
if held_by_another; then
  say "another run has the folder (srun: $rc); not requeued. $resume"
  exit "$rc"
fi
by_user=
if [ -e "$RUN_DIR/STOP" ]; then
  if [ -s "$RUN_DIR/STOP" ]; then rm -f "$RUN_DIR/STOP"; else by_user=1; fi
fi

after=$(cat "$RUN_DIR/status.json" 2>/dev/null)
if [ "$after" = "$before" ]; then
  # Nothing was begun. The first time this is a mistake that a repetition would only repeat; later
  # it can be a node or a file system that is not well.
  [ -n "$before" ] && [ "$restarts" -gt 0 ] && crashed "the run could not start (srun: $rc)"
  say "the run did not start (srun: $rc); the reason is above"
  exit "$((rc ? rc : 1))"
fi
state=$(status state)
at=$(status step)
case $state in
  done)
    say "done: $RUN_DIR/result.md"
    exit 0
    ;;
  preempted)
    if [ -n "$by_user" ]; then
      say "stopped by the STOP file, with a checkpoint at step ${at:-?}. $resume"
      exit 0
    fi
    requeue "stopped with a checkpoint at step ${at:-?}"
    ;;
  failed)
    if [ "$(status retry)" = false ]; then
      say "failed: $(status error). Trying again would not help. $resume"
      exit "$((rc ? rc : 1))"
    fi
    ;;
esac
crashed "the run died (srun: $rc, state: ${state:-none})"
