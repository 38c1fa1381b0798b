#!/usr/bin/env bash
#SBATCH --job-name=train
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
# A run of a YAML of your own, or of what else ddp_ssl.train takes: a config by name, a folder of images:
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/train.sh CONFIG.yaml data.root=DIR
# Partition, account and the like are sbatch's arguments; run.sh lists the environment.

# sbatch runs a copy of this file; Slurm remembers where the original lies.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n1)
original=${original%%.sh*}
for here in "${original%/*}" "${SLURM_SUBMIT_DIR:-}/slurm" "$(dirname "$0")"; do
  [ -e "$here/run.sh" ] && exec bash "$here/run.sh" train CONFIG "$@"
done
echo "train: finds no slurm/run.sh; submit it from the repository: sbatch slurm/train.sh" >&2
exit 2
