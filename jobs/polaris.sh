#!/bin/bash -l
# One training on Polaris (ALCF), a process for each A100.
#
#     qsub $(sed -n 's/^#PBS //p' jobs/polaris.sh) -- "$PWD/jobs/polaris.sh" --epochs 5 --register
#
# (`qsub jobs/polaris.sh` alone works, too; but PBS passes no arguments to a script of which it reads the
# options.) All arguments go to the training script. Submit it from the project's folder, after you
# have filled in what stands in <...>, here and on the lines that begin with #PBS, and have run once
# on a login node, where there is a network:
#
#     module use /soft/modulefiles && module load conda && conda activate
#     python3 -m venv --system-site-packages ~/mlflow-venv
#     ~/mlflow-venv/bin/pip install -r requirements.txt
#     ~/mlflow-venv/bin/python -c "from torchvision.datasets import MNIST; MNIST('<scratch>', download=True)"
#     install -m 600 /dev/stdin ~/.amsc_key               # paste the key, Enter, Ctrl-D
#     install -D -m 600 /dev/stdin ~/.amsc/mlflow_token   # or the token, for a server that takes one
#
#PBS -N mnist
#PBS -A <project>
#PBS -q <queue>
#PBS -l select=2
#PBS -l place=scatter
#PBS -l filesystems=home:eagle
#PBS -l walltime=00:30:00
#PBS -j oe
#PBS -r y

# Before `set -u`, which the site's own functions are not written for.
module use /soft/modulefiles
module load conda
set -euo pipefail

SCRIPT=train_mnist_mlflow.py # or Modify_artifact_location.py, which wants --target_path
DATA="<scratch>"
VENV="$HOME/mlflow-venv"
# The training is kept here: another training needs another folder. PBS starts the job again when a
# node fails. When its time was up (exit code 143), or the server is away (75), submit it once more.
CHECKPOINT="<scratch>/checkpoints/mnist"

# Compute nodes reach the tracking server through this proxy only.
export https_proxy=http://proxy.alcf.anl.gov:3128 http_proxy=http://proxy.alcf.anl.gov:3128
export no_proxy=localhost,127.0.0.1,.alcf.anl.gov

# The key, in a file that only you may read. Without it the job ends at once: delete this line if you
# want none, for a local store or a server that asks for none.
export AM_SC_API_KEY_FILE="${AM_SC_API_KEY_FILE:-$HOME/.amsc_key}"
# AmSC's newer servers take a token: use these lines instead, and --model_name MNIST_CNN_$USER.
# export MLFLOW_TRACKING_TOKEN_FILE="$HOME/.amsc/mlflow_token" MLFLOW_WORKSPACE=default
# export MLFLOW_TRACKING_URI=https://mlflow-staging.american-science-cloud.org
# export MLFLOW_EXPERIMENT_NAME="mnist_cnn_pytorch_$USER"

# The processes meet over the fast network.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn}"

cd "$PBS_O_WORKDIR"
PER_NODE=4 # GPUs
export OMP_NUM_THREADS=8
NODES=$(sort -u "$PBS_NODEFILE" | wc -l)
# mpiexec ends all processes when one fails.
mpiexec -n $((NODES * PER_NODE)) --ppn "$PER_NODE" --depth "$OMP_NUM_THREADS" --cpu-bind depth \
    "$VENV/bin/python" -u "$SCRIPT" --data_dir "$DATA" --checkpoint "$CHECKPOINT" "$@"
