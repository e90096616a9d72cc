#!/bin/bash
# One training on the nodes of a Slurm cluster, a process for each GPU.
#
#     sbatch jobs/slurm.sh --epochs 5 --register --phase production
#
# All arguments go to the training script. Submit it from the project's folder, after you have filled
# in what stands in <...>, here and on the lines that begin with #SBATCH, and have run once on a login
# node, where there is a network:
#
#     python3 -m venv ~/mlflow-venv
#     ~/mlflow-venv/bin/pip install -r requirements.txt
#     ~/mlflow-venv/bin/python -c "from torchvision.datasets import MNIST; MNIST('<scratch>', download=True)"
#     install -m 600 /dev/stdin ~/.amsc_key               # paste the key, Enter, Ctrl-D
#     install -D -m 600 /dev/stdin ~/.amsc/mlflow_token   # or the token, for a server that takes one
#
#SBATCH --job-name=mnist
#SBATCH --account=<project>
#SBATCH --partition=<partition>
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.log
# Preempted, or on a node that fails, the job starts again, and writes on in the same log. A minute
# before its time is up the training is told, and ends; then the last lines below start it again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
set -euo pipefail

SCRIPT=train_mnist_mlflow.py # or Modify_artifact_location.py, which wants --target_path
DATA="<scratch>"
VENV="$HOME/mlflow-venv"
CHECKPOINT="<scratch>/checkpoints/$SLURM_JOB_ID" # where the job goes on when it starts again

# If the compute nodes have no network of their own: the site's proxy.
# export https_proxy=http://<proxy>:<port> http_proxy=http://<proxy>:<port>

# The key, in a file that only you may read. Without it the job ends at once: delete this line if you
# want none, for a local store or a server that asks for none.
export AM_SC_API_KEY_FILE="${AM_SC_API_KEY_FILE:-$HOME/.amsc_key}"
# AmSC's newer servers take a token: use these lines instead, and --model_name MNIST_CNN_$USER.
# export MLFLOW_TRACKING_TOKEN_FILE="$HOME/.amsc/mlflow_token" MLFLOW_WORKSPACE=default
# export MLFLOW_TRACKING_URI=https://mlflow-staging.american-science-cloud.org
# export MLFLOW_EXPERIMENT_NAME="mnist_cnn_pytorch_$USER"

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
code=0
# One process that dies ends the others: nobody waits for it until the time is up.
srun --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" \
    "$VENV/bin/python" -u "$SCRIPT" --data_dir "$DATA" --checkpoint "$CHECKPOINT" "$@" || code=$?

# 75: the server is away. 143: the time was up, and at least one epoch was trained in it. Then the
# job starts again, and goes on after its last full epoch.
trained=$(find "$CHECKPOINT" -name training.pt -newermt "-$SECONDS seconds" || true)
if [[ $code == 75 || ($code == 143 && -n $trained) ]] && ((${SLURM_RESTART_COUNT:-0} < 20)); then
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
