#!/usr/bin/env bash
# Example SLURM job: trains on the GPUs of one node, saves a checkpoint before the time limit, and requeues itself until
# the run is finished. Adapt the lines below and submit it:
#
#   sbatch tools/slurm_job.sh RECIPE DATA RUN [options of mvssl-train]
#
#SBATCH --job-name=mvssl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: sbatch tools/slurm_job.sh RECIPE DATA RUN [options of mvssl-train]" >&2; exit 2; }
recipe=$1 data=$2 run=$3
shift 3

# The first job starts the run, later ones resume it.
resume=()
[ ! -e "$run/config.json" ] || resume=(--resume)

# srun sends SLURM's signal to every process it starts, so torchrun's workers receive it.
exec srun torchrun --standalone --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --no-python \
    mvssl-train "$recipe" --data "$data" --out "$run" ${resume[@]+"${resume[@]}"} "$@"
