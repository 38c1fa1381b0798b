#!/usr/bin/env bash
#SBATCH --job-name=imagenet100_multiview
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
# Barlow Twins with many views on ImageNet-100:
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/imagenet100_multiview.sh data.root=DIR
# Partition, account and the like are sbatch's arguments; run.sh lists the environment.

# sbatch runs a copy of this file; Slurm remembers where the original lies.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n1)
original=${original%%.sh*}
for here in "${original%/*}" "${SLURM_SUBMIT_DIR:-}/slurm" "$(dirname "$0")"; do
  [ -e "$here/run.sh" ] && exec bash "$here/run.sh" imagenet100_multiview configs/imagenet100/barlow_twins_multiview.yaml "$@"
done
echo "imagenet100_multiview: finds no slurm/run.sh; submit it from the repository: sbatch slurm/imagenet100_multiview.sh" >&2
exit 2
