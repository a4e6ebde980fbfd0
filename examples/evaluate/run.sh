#!/usr/bin/env bash
# Evaluate an exported model with the language model evaluation harness, without a network:
#
#     python tools/convert_checkpoint.py to-hf runs/nano exported
#     pip install -e '.[eval]'
#     examples/evaluate/run.sh exported
#
# The two tasks beside this script are a few questions to see that all works, not a benchmark: `megagate_choice` (four endings of a
# sentence, by likelihood) and `megagate_continue` (the next words, generated). A table is printed; results, and what the model gave
# each question, are written to DIR-evaluation.
#
#     examples/evaluate/run.sh DIR [OPTIONS OF lm_eval]
#
#   --trust_remote_code                        an export that brings its own code along (to-hf says so)
#   --device cuda --batch_size auto            on a GPU; the default is one CPU, 8 at a time, in fp32
#   --tasks hellaswag,mmlu                     other tasks of the harness; their data is downloaded, so also set HF_HUB_OFFLINE=0
#   --output_path FOLDER                       results elsewhere
#
# A task of your own: a line of JSON per question and a YAML file like those in tasks/.
set -euo pipefail

if [[ $# -lt 1 || ! -f "$1/config.json" ]]; then
  echo "usage: examples/evaluate/run.sh DIR [OPTIONS OF lm_eval]; DIR is a folder that tools/convert_checkpoint.py to-hf wrote" >&2
  exit 2
fi
folder="$(cd "$1" && pwd)"
shift
if [[ ! -f "$folder/tokenizer.json" ]]; then
  echo "$folder has no tokenizer.json, and the questions are text: export again with --tokenizer" >&2
  exit 2
fi

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-$HF_HUB_OFFLINE}"
# Where an option stands twice, the later one holds: what the user gives comes last. Paths given to lm_eval are relative to tasks/.
cd "$(dirname "${BASH_SOURCE[0]}")/tasks"
exec lm_eval --model hf --model_args "pretrained=$folder,dtype=float32" --include_path . --tasks megagate_choice,megagate_continue \
  --device cpu --batch_size 8 --log_samples --output_path "$folder-evaluation" "$@"
