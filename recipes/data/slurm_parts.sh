#!/usr/bin/env bash
# `retnet data` on Slurm: one array task per part, and a merge that runs when all of them have ended well.
#
#   PARTS=64 bash recipes/data/slurm_parts.sh SOURCE... OUT -- [options of `retnet data`]
#
# Settings, from the environment:
#   PARTS            parts, each a task of the array (Slurm's MaxArraySize, often 1001, is above their number)
#   CPUS_PER_PART    cores of a part, which has as many processes (default 4)
#   RETNET           the command (default retnet); an absolute path where nodes have another PATH
#   SBATCH_*         what else sbatch reads: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...
#
# Sources, OUT and the tokenizer are on a file system that all nodes see; sources and OUT may be URLs. A part that was requeued, or is run
# again, writes only what is missing; the result has the bytes of one process whatever happens to the parts.
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

[[ ${PARTS:-} =~ ^[1-9][0-9]*$ ]] || fail "PARTS is '${PARTS:-}'; accepted: the number of parts"
places=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do places+=("$1"); shift; done
shift $(($# > 0))
[ ${#places[@]} -ge 2 ] || fail "accepted: PARTS=N bash slurm_parts.sh SOURCE... OUT -- [options of retnet data]"

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # a task of the array
  exec "${RETNET:-retnet}" data write "${places[@]}" "$@" \
    --shard "$SLURM_ARRAY_TASK_ID/$PARTS" --workers "${SLURM_CPUS_PER_TASK:-1}"
fi

export PARTS
array=$(sbatch --parsable --job-name=retnet-data --array="1-$PARTS" --cpus-per-task="${CPUS_PER_PART:-4}" \
  --requeue --export=ALL "$0" "${places[@]}" -- "$@")
array=${array%%;*} # "job;cluster" where there are several clusters
merge=$(sbatch --parsable --job-name=retnet-merge --dependency="afterok:$array" --kill-on-invalid-dep=yes \
  --cpus-per-task=1 --export=ALL --wrap "$(printf '%q ' "${RETNET:-retnet}" data merge "${places[-1]}")")
echo "parts: job $array; merge: job ${merge%%;*}, when all of them have ended well"
