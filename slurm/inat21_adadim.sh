#!/usr/bin/env bash
#SBATCH --job-name=inat21_adadim
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
# AdaDim on iNaturalist 2021:
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/inat21_adadim.sh data.root=DIR
# Partition, account and the like are sbatch's arguments; run.sh lists the environment.

# sbatch runs a copy of this file; Slurm remembers where the original lies.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n1)
original=${original%%.sh*}
for here in "${original%/*}" "${SLURM_SUBMIT_DIR:-}/slurm" "$(dirname "$0")"; do
  [ -e "$here/run.sh" ] && exec bash "$here/run.sh" inat21_adadim configs/inat21/adadim.yaml "$@"
done
echo "inat21_adadim: finds no slurm/run.sh; submit it from the repository: sbatch slurm/inat21_adadim.sh" >&2
exit 2
