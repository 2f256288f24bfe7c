#!/usr/bin/env bash
# One training script on several nodes of a SLURM cluster; stops cleanly before its time is over and queues itself again.
#
#   sbatch scripts/slurm.sh ssl_swav2D.py --data_path /shared/data --dump_path /shared/runs/swav2D
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh ssl_swav3D.py
#
# Run it from the repository, on a disk that all nodes share: dump_path, pretrained_path and data_path must be the same
# files everywhere. What a node has of its own may serve as --cache_path. PYTHON chooses the interpreter.
#SBATCH --job-name=joint-ssl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# USR1 to this script, and to nothing else, 180 s before the time is over (on many clusters before pre-emption too).
#SBATCH --signal=B:USR1@180
# Queue again when a node fails or the job is pre-empted; go on with the nodes that are left while there are enough.
#SBATCH --requeue
#SBATCH --no-kill
set -euo pipefail

PYTHON=${PYTHON:-python}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun's ports are open to all who reach the nodes: who knows port and id may join. So: a trusted network, and an id
# that cannot be guessed.
id=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
asked_to_stop=false

stop() { # torchrun passes SIGTERM on; its processes finish their step, save and leave
    asked_to_stop=true
    scancel --signal=TERM "$SLURM_JOB_ID" || true # to the job's steps, not to this script
}
trap stop USR1 TERM

# A node that is lost must not take the others along: --kill-on-bad-exit=0, and --nnodes from 1.
# Up to three times torchrun starts the processes that are left from the last checkpoint.
# last_call_timeout: seconds in which a node that comes back may still join.
srun --kill-on-bad-exit=0 "$PYTHON" -m torch.distributed.run \
    --nnodes="1:$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29400" --rdzv-id="$id" --rdzv-conf=last_call_timeout=30 \
    "$@" &
training=$!

status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do # a signal ends `wait`, not the training
    status=0
    wait "$training" || status=$?
done

if [ "$status" -ne 0 ] && [ "$asked_to_stop" = true ]; then
    echo "stopped on request (exit code $status); queued again to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
