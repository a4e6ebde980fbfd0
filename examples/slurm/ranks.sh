#!/usr/bin/env bash
# Starts one rank of examples/pretrain_moe.sh per GPU of this Slurm allocation, and waits for them:
#   bash examples/slurm/ranks.sh --config FILE ...
# In the root of the repository, in a batch script or under salloc, with as many tasks on each node as it has GPUs (--ntasks-per-node).
# SIGTERM makes the ranks save a checkpoint and leave, as they do on a signal of Slurm's own. Exit codes: those of a rank (0 done, 1 not
# learnt, 2 bad input, 3 a number that is not finite, 143 stopped after saving); of several a failure wins over 3, and 3 over 143.
#
# Where ranks meet: MASTER_ADDR, by default the first node's name, and MASTER_PORT, by default one that follows from the job's number: two
# jobs, or two tasks of an array, that share a node get different ones. Set them where the nodes do not know each other's names, or where a
# firewall leaves few ports open.
set -euo pipefail

if [[ "${1:-}" != --rank ]]; then # ---- once, in the batch script's place
  : "${SLURM_JOB_ID:?is not set: start this inside a job of Slurm, or use examples/slurm/h100.sbatch}"
  gpus="${SLURM_GPUS_ON_NODE:-}" tasks="${SLURM_NTASKS_PER_NODE:-}"
  if [[ -n "$gpus" && -n "$tasks" && "$gpus" != "$tasks" ]]; then
    echo "ranks.sh: --ntasks-per-node ($tasks) must be the number of GPUs of a node ($gpus), one rank each; give both alike" >&2
    exit 2
  fi
  if [[ -z "${MASTER_ADDR:-}" ]]; then
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  fi
  # Below the ports that the system gives to outgoing connections, from 32768 on.
  export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"

  # srun must never be signalled: it would kill the ranks before they could save. They are, through Slurm, by the number of their step.
  srun='' stopped='' step="ranks-$SLURM_JOB_ID-$$"
  stop() {
    local id
    stopped=yes
    while [[ -n "$srun" ]] && kill -0 "$srun" 2> /dev/null; do # until they are there to get it, or are gone
      id="$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | awk -v name="$step" '$2 == name { print $1 }')" || id=''
      if [[ -n "$id" ]] && scancel --signal=TERM "$id"; then return 0; fi # plain, it would return the status of what the trap interrupted
      sleep 1
    done
  }
  trap stop TERM

  # Since Slurm 22.05 a step does not take --cpus-per-task over from its job: each rank would have one core. When one rank fails all are
  # ended: the others would wait for it.
  srun --job-name="$step" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
    bash "${BASH_SOURCE[0]}" --rank "$@" < /dev/null &
  srun=$!
  if [[ -n "$stopped" ]]; then stop; fi # asked to before there was one
  while kill -0 "$srun" 2> /dev/null; do wait "$srun" || :; done # a signal ends a wait early
  code=0
  wait "$srun" || code=$?
  case "$code" in # see below
    10) exit 143 ;;
    11) exit 3 ;;
    10[1-9] | 11[0-9] | 12[0-5]) exit "$((code - 100))" ;;
    *) exit "$code" ;;
  esac
fi

# ---- on each rank
shift
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"
export LOCAL_WORLD_SIZE="$LOCAL_SIZE"
# Slurm signals every process of a task: the rank gets it too, and this script has to tell how it left. It waits in the foreground: a `wait`
# that a signal interrupts at the moment when the rank ends has been seen to make its code 255.
trap : TERM
code=0
bash examples/pretrain_moe.sh "$@" || code=$?
# srun returns the largest code of its ranks, and sends SIGTERM to all when the first one fails. One that is still starting, or already
# leaving, dies of that with 143, which would make a failure of another look like a stop, and the job start again for ever.
case "$code" in
  143) exit 10 ;;
  3) exit 11 ;;
  [1-9] | 1[0-9] | 2[0-5]) exit "$((code + 100))" ;;
  *) exit "$code" ;;
esac
