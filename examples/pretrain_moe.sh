#!/usr/bin/env bash
''':'
# Pretrains a gated mixture-of-experts language model. All of these start the same job:
#
#   deepspeed examples/pretrain_moe.sh                      one rank per GPU, or one rank on a machine without GPUs
#   deepspeed --num_gpus 2 examples/pretrain_moe.sh         two ranks (also --num_accelerators 2, --no_python, --hostfile F ...)
#   NPROC=2 bash examples/pretrain_moe.sh                   the same without typing deepspeed; DS_LAUNCH_ARGS passes it more options
#
# Everything after the name of the script is configuration (--help lists the keys):
#
#   deepspeed examples/pretrain_moe.sh --train.steps 50 --optim.lr 1e-3
#   deepspeed examples/pretrain_moe.sh --config examples/configs/moe_15a2b.yaml --parallel.ep 8
#   deepspeed examples/pretrain_moe.sh --preset paper/table1/row10 --data.path /data/mine --parallel.ep 8
#
# Without a --config or --preset the default is configs/tiny.yaml next to this script.
#
# On GPUs the job stops at once if by its config it needs more than 90 % of one; tools/count_params.py estimates that. How much the
# smallest GPU of a machine has is asked of nvidia-smi; where there is none, or it fails, nothing is estimated. MEGAGATE_GPU names
# another (h100-80gb, or a number of GB), and MEGAGATE_GPU=none switches this off; on several machines put that line into
# ~/.deepspeed_env, since the launcher does not pass it on by itself.
#
# This file is a shell script and a Python program at once. The deepspeed launcher starts `python -u SCRIPT` for every rank, whatever
# the name of the script ends with. To Python, everything from here to the closing quotes is one string, and the two lines after it
# hand over to bash. To bash, the first two quotes are an empty word in front of `:`, the command that does nothing, and the Python
# half is a here-document that nobody reads. So keep triple quotes and backslashes out of this half.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Started by hand: let deepspeed start the ranks, each of which comes here again with its RANK.
if [[ -z "${RANK:-}" || -z "${WORLD_SIZE:-}" ]]; then
  if ! command -v deepspeed > /dev/null; then
    echo "pretrain_moe.sh: the command deepspeed is not on PATH; activate the environment into which you installed megagate" >&2
    echo "(pip install -e . in the root of the repository installs both)" >&2
    exit 2
  fi
  # DS_LAUNCH_ARGS is split into words on purpose.
  # shellcheck disable=SC2086
  exec deepspeed ${NPROC:+--num_gpus "$NPROC"} ${DS_LAUNCH_ARGS:-} "$here/pretrain_moe.sh" "$@"
fi

# Threads that wait should sleep: when something else wants a core, spinning ones make a step on CPUs many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# The interpreter that the launcher chose; under --no_python it chose none.
python="${MEGAGATE_PYTHON:-python3}"
config=(--config "$here/configs/tiny.yaml")
look=yes
for argument in "$@"; do
  case "$argument" in
    --config | --config=* | --preset | --preset=*) config=() ;;
    -h | --help | --print_config) look=no ;;
  esac
done

# One rank of each machine looks whether the run fits the GPU. Where it leaves, the launcher ends the others.
if [[ "$look" == yes && "${LOCAL_RANK:-0}" == 0 ]]; then
  gpu="${MEGAGATE_GPU:-}"
  if [[ -z "$gpu" ]]; then
    mib="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | sort -n | head -n 1)" || mib=""
    # What it says where it finds no GPU, and the N/A of one that shares the machine's memory, are no numbers.
    if [[ "$mib" =~ ^[1-9][0-9]{3,}$ ]]; then gpu="$((mib * 1048576 / 1000000000))"; fi
  fi
  if [[ -n "$gpu" && "$gpu" != none ]]; then
    estimate=("$here/../tools/count_params.py" --gpu "$gpu" --world "$WORLD_SIZE")
    PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "$python" "${estimate[@]}" ${config[@]+"${config[@]}"} "$@" >&2
  fi
fi

exec "$python" -u -m megagate.train.main ${config[@]+"${config[@]}"} "$@"
: <<'#END_OF_PYTHON_HALF'
'''
import os
import sys

os.environ["MEGAGATE_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#END_OF_PYTHON_HALF
