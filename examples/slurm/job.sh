#!/usr/bin/env bash
# What the batch scripts of this folder have in common: settings, the job, and whether Slurm is to start it again.
#   job.sh ENV_FILE WORDS            a pretraining job; the words are those of examples/pretrain_moe.sh
#   job.sh ENV_FILE --study SPEC --output OUT      one run of a study, that of this task of an array; `tools/lr_stability.py run` submits it
#
# The job is queued again, and goes on from its checkpoint, when its ranks were stopped by a signal and saved: at the end of its time
# (#SBATCH --signal), by a preemption, or by `scancel --batch --signal=TERM JOB`. One that is done, has diverged or failed is not, nor is one
# that was cancelled (`scancel JOB`; it saves if it does so within KillWait, 30 s by default).
set -euo pipefail
if [[ ! -f examples/slurm/ranks.sh ]]; then
  echo "job.sh: $PWD is not the root of megagate's repository; submit from there, or with sbatch --chdir=ROOT" >&2
  exit 2
fi
set -a
# shellcheck source=/dev/null
source "$1"
set +a
shift

id="${SLURM_JOB_ID:?is not set: submit this with sbatch}"
command=(bash examples/slurm/ranks.sh "$@")
if [[ "${1:-}" == --study ]]; then
  # The last task of an array has the array's own number as its SLURM_JOB_ID: requeued by that, all tasks would start again.
  id="${SLURM_ARRAY_JOB_ID:?is not set: a study is an array of jobs, which tools/lr_stability.py run submits}_$SLURM_ARRAY_TASK_ID"
  command=(python tools/lr_stability.py task "${@:2}" --index "$SLURM_ARRAY_TASK_ID" -- bash examples/slurm/ranks.sh)
elif [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
  id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi

# Slurm signals this shell alone (B:TERM), and bash runs a trap only between commands: so the job is in the background.
job='' stopped=''
stop() {
  stopped=yes
  if [[ -n "$job" ]]; then kill -TERM "$job" 2> /dev/null || :; fi
}
trap stop TERM
"${command[@]}" &
job=$!
if [[ -n "$stopped" ]]; then stop; fi
while kill -0 "$job" 2> /dev/null; do wait "$job" || :; done
code=0
wait "$job" || code=$?

# A preempted job's ranks get the signal from Slurm itself, and one that leaves then counts as failed: it, too, has to ask.
if [[ "$code" == 143 ]]; then
  state="$(squeue --noheader --array --jobs="$id" --format=%T)" || state=''
  if [[ "$state" == RUNNING ]]; then
    echo "job.sh: stopped after saving; job $id is queued again"
    scontrol requeue "$id"
  else
    echo "job.sh: stopped after saving; job $id is ${state:-unknown to squeue} and is not queued again"
  fi
fi
exit "$code"
