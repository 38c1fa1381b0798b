#!/usr/bin/env bash
#SBATCH --job-name=ablation
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
#SBATCH --array=0-12%4
# The rows of the ablation on ImageNet-100, configs/imagenet100/ablation/*.yaml, one array task each:
#   sbatch --nodes=1 --gpus-per-node=2 --cpus-per-gpu=8 --time=24:00:00 slurm/ablation_array.sh data.root=DIR
# --array=0-3 or --array=5 runs some of them; tasks beyond the last row end at once.

shopt -s nullglob
# sbatch runs a copy of this file; Slurm remembers where the original lies.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n1)
original=${original%%.sh*}
for here in "${original%/*}" "${SLURM_SUBMIT_DIR:-}/slurm" "$(dirname "$0")"; do
  [ -e "$here/run.sh" ] || continue
  rows=("$here"/../configs/imagenet100/ablation/*.yaml)
  row=${rows[${SLURM_ARRAY_TASK_ID:-0}]:-}
  if [ -z "$row" ]; then
    echo "ablation_array: no row $SLURM_ARRAY_TASK_ID; there are ${#rows[@]}: --array=0-$((${#rows[@]} - 1))"
    exit 0
  fi
  DDP_SSL_ROW=$(basename "$row" .yaml) # names the run folder
  export DDP_SSL_ROW
  # shellcheck disable=SC2093  # the loop goes on where there is no run.sh
  exec bash "$here/run.sh" ablation_array "configs/imagenet100/ablation/$DDP_SSL_ROW.yaml" "$@"
done
echo "ablation_array: finds no slurm/run.sh; submit it from the repository: sbatch slurm/ablation_array.sh" >&2
exit 2
