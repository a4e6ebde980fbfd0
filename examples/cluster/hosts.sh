#!/usr/bin/env bash
# Starts one job on the machines of a host file, where there is no scheduler, and stops it so that nothing is lost:
#
#   bash examples/cluster/hosts.sh --hostfile hosts --nodes 4 --gpus 8 --env examples/cluster/h100.env -- \
#     --config examples/configs/moe_15a2b.yaml --data.path /data/mine --parallel.ep 8
#
# The host file has lines such as `node1 slots=8`; the first --nodes of them are used, --gpus of each. Behind -- stands what
# examples/pretrain_moe.sh takes. Start it on a machine of the file, in the root of the repository, which every machine has at the same path
# (a shared disk), with the same Python. Several machines need pdsh here and ssh without a password from here to all of them.
#
# --env FILE         KEY=VALUE lines for every rank: a100.env or h100.env beside this script, edited for your cluster
# --port P           on the first machine, for the ranks to find each other; by default one between 20000 and 29999 by chance
# --stop-s S         so long a stop waits for the ranks to save until it kills them, and a start for those of a former one (default 600)
# --stop-with-parent stop, too, when the process that started this one is gone; for programs such as tools/lr_stability.py
#
# TERM or Ctrl-C to this script: every rank gets TERM, saves a checkpoint after its step and leaves; exit code 143; the same command goes on
# from there. Otherwise the exit code is the job's. Not tried on GPUs: only with ranks on CPUs, on one machine and on two emulated ones.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

refuse() {
  echo "hosts.sh: $1" >&2
  exit 2
}

hostfile="" nodes="" gpus="" env_file="" port="$((20000 + RANDOM % 10000))" stop_s=600 with_parent=""
while [[ $# -gt 0 && "$1" != -- ]]; do
  case "$1" in
    --stop-with-parent) with_parent="$PPID" && shift && continue ;;
    --hostfile | --nodes | --gpus | --env | --port | --stop-s) [[ $# -ge 2 ]] || refuse "$1 needs a value; give one" ;;
    *) refuse "$1 is not an option of this script; those of the job stand behind --" ;;
  esac
  case "$1" in
    --hostfile) hostfile="$2" ;;
    --nodes) nodes="$2" ;;
    --gpus) gpus="$2" ;;
    --env) env_file="$2" ;;
    --port) port="$2" ;;
    --stop-s) stop_s="$2" ;;
  esac
  shift 2
done
[[ "${1:-}" == -- ]] && shift
[[ $# -gt 0 ]] || refuse "there is no job; name its config behind --, as in -- --config examples/configs/moe_15a2b.yaml"
for number in "--nodes:$nodes" "--gpus:$gpus" "--port:$port" "--stop-s:$stop_s"; do
  [[ "${number#*:}" =~ ^[1-9][0-9]*$ ]] || refuse "${number%%:*} (${number#*:}) must be a whole number from 1 on; give one"
done
# Without its host file deepspeed would go on with this machine alone.
[[ -f "$hostfile" ]] || refuse "--hostfile ($hostfile) is no file; write one with a line such as 'node1 slots=8' per machine"
[[ -z "$env_file" || -f "$env_file" ]] || refuse "--env ($env_file) is no file; take examples/cluster/h100.env, or leave it out"
mapfile -t hosts < <(sed -nE 's/^[[:space:]]*([^#[:space:]]+)[[:space:]]+slots=[0-9]+.*/\1/p' "$hostfile")
[[ "${#hosts[@]}" -ge "$nodes" ]] || refuse "--nodes ($nodes) must be at most the ${#hosts[@]} machines of $hostfile; add some, or lower it"
hosts=("${hosts[@]:0:$nodes}")
command -v deepspeed > /dev/null || refuse "deepspeed is not on PATH; activate the environment into which you installed megagate"

launch=(deepspeed --hostfile "$hostfile" --num_nodes "$nodes" --num_gpus "$gpus" --master_port "$port")
alone=""
case "$nodes ${hosts[0]}" in
  "1 localhost" | "1 127.0.0.1" | "1 $(hostname)")
    # This machine alone: no ssh to it, and no pdsh.
    alone=yes
    launch+=(--master_addr 127.0.0.1 --no_ssh_check)
    ;;
  1\ *) launch+=(--force_multi) ;; # else deepspeed would start the ranks of one other machine here
esac
[[ -n "$alone" ]] || command -v pdsh > /dev/null || refuse "pdsh, with which deepspeed reaches ${hosts[*]}, is not here; install it"

# What the ranks get. Alone they inherit it. Elsewhere deepspeed itself passes on only NCCL*, PYTHON* and a few more; the rest comes from
# the file that DS_ENV_FILE names, which must hold KEY=VALUE lines and nothing else. Yours (~/.deepspeed_env, ./.deepspeed_env) come first.
settings="$(mktemp)" ended="$(mktemp)"
trap 'rm -f "$settings" "$ended"' EXIT
own="${DS_ENV_FILE:-.deepspeed_env}"
for file in "$HOME/$own" "./$own" "$own" "$env_file"; do
  [[ -f "$file" ]] || continue
  grep -E '^[A-Za-z_][A-Za-z_0-9]*=' "$file" >> "$settings" || true
done
while IFS= read -r setting; do
  export "${setting?}" # as deepspeed reads it: what stands behind = is the value, without a shell's quotes
done < "$settings"
export DS_ENV_FILE="$settings"

# signal_ranks SIGNAL PROGRAMS: to this job's processes on all its machines, known by the arguments with which their command lines end;
# signal 0 lists them. `deepspeed` itself does not hand a signal on where it is alone; else it signals every launcher of yours on the
# machines, each of which kills its ranks after 30 s, and leaves with 1 at once, while they still save.
words="$(sed -E 's/[][\.*^$+?(){}|]/\\&/g' <<< "$*")"
signal_ranks() {
  local pattern="$2 .*$words\$" send="pkill -$1"
  [[ "$1" != 0 ]] || send="pgrep -a"
  if [[ -n "$alone" ]]; then
    $send -U "$UID" -f -- "$pattern" || true
  else
    # Where a machine is gone its ssh fails; the others are told all the same.
    pattern="$(printf %q "$pattern")"
    PDSH_RCMD_TYPE=ssh pdsh -t 10 -w "$(IFS=, && echo "${hosts[*]}")" "$send -U \$(id -u) -f -- $pattern || true" < /dev/null || true
  fi
}

# Ranks of a former start that still save, or were left behind, would write into the same folder: wait until they are gone.
left_ranks() { signal_ranks 0 'megagate[.]train[.]main' | grep -v '^pdsh@' || true; }
left="$(left_ranks)"
while [[ -n "$left" && "$SECONDS" -lt "$stop_s" ]]; do
  sleep 2
  left="$(left_ranks)"
done
[[ -z "$left" ]] || refuse "this job's ranks run already (see below), for $stop_s s; end them: pkill -TERM -f 'megagate.train.main .*$*'
$left"

stopping="" broken="" since=0
trap 'stopping=yes' TERM INT HUP
trap 'broken=yes' USR1
# pdsh waits for all machines when the ranks of one have failed, and says so in a line: then the others are stopped, too.
exec {out}> >(
  trap '' INT
  while IFS= read -r line; do
    printf '%s\n' "$line"
    [[ "$line" =~ ^pdsh@.*\ ssh\ exited\ with\ exit\ code\ ([0-9]+) ]] || continue
    echo "${BASH_REMATCH[1]}" >> "$ended"
    kill -USR1 "$$" 2> /dev/null || true
  done
)
reader=$!
# In a session of its own: Ctrl-C reaches this script alone.
setsid "${launch[@]}" "$here/../pretrain_moe.sh" "$@" >&"$out" 2>&1 < /dev/null &
job=$!
exec {out}>&-
while kill -0 "$job" 2> /dev/null; do
  if [[ -n "$with_parent" ]] && ! kill -0 "$with_parent" 2> /dev/null; then stopping=yes; fi
  if [[ -n "$stopping$broken" ]]; then
    [[ "$since" -ne 0 ]] || since=$((SECONDS + 1))
    # Again and again: a rank that is still starting has nothing to save, and is not there yet.
    signal_ranks TERM 'megagate[.]train[.]main'
    if [[ $((SECONDS + 1 - since)) -ge "$stop_s" ]]; then
      echo "hosts.sh: the ranks did not leave within $stop_s s; killing them" >&2
      signal_ranks KILL '(megagate[.]train[.]main|pretrain_moe[.]sh)'
    fi
  fi
  sleep 1 &
  wait $! || true # a trap ends it early
done
code=0
wait "$job" || code=$?
for _ in {1..50}; do # what was said last
  kill -0 "$reader" 2> /dev/null || break
  sleep 0.1
done
# pdsh's is the largest of all machines; what counts is 3, a number that was not finite, wherever it was, and else the first machine's, not
# that of ranks that were stopped for it. Where all ended well before a signal reached them, so did the job.
if grep -qx 3 "$ended"; then
  code=3
elif [[ -z "$stopping" && -s "$ended" ]]; then
  code="$(head -n 1 "$ended")"
fi
# 241 is how a launcher says that a rank was ended by TERM before it minded signals.
if [[ "$code" -eq 241 || (-n "$stopping" && "$code" -ne 0 && "$code" -ne 3) ]]; then code=143; fi
exit "$code"
