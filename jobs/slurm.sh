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
# A minute before the time is up the training is told: its run ends as KILLED, not as RUNNING.
#SBATCH --signal=TERM@60
set -euo pipefail

SCRIPT=train_mnist_mlflow.py # or Modify_artifact_location.py, which wants --target_path
DATA="<scratch>"
VENV="$HOME/mlflow-venv"

# If the compute nodes have no network of their own: the site's proxy.
# export https_proxy=http://<proxy>:<port> http_proxy=http://<proxy>:<port>

# The key, in a file that only you may read. Without it the job ends at once: delete this line if you
# want none, for a local store or a server that asks for none.
export AM_SC_API_KEY_FILE="${AM_SC_API_KEY_FILE:-$HOME/.amsc_key}"

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# Keep freed memory for the next step: a fifth faster on a CPU. With glibc, set both or neither.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824
# One process that dies ends the others: nobody waits for it until the time is up.
srun --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" \
    "$VENV/bin/python" -u "$SCRIPT" --data_dir "$DATA" "$@"
