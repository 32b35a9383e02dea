#!/usr/bin/env bash
# `retnet data` on Slurm: one array task per part, and a merge that runs when all of them have ended well.
#
#   PARTS=64 bash recipes/data/slurm_parts.sh SOURCE... OUT [options of `retnet data`]
#
# Settings, from the environment:
#   PARTS            parts, each a task of the array
#   CPUS_PER_PART    cores of a part, which has as many processes (default 4)
#   RETNET           the command (default retnet); an absolute path where nodes have another PATH
#   SBATCH_*         everything else that sbatch reads: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...
#
# Sources, OUT and the tokenizer are on a file system that all nodes see, or URLs. A part that was requeued, or is run
# again, writes only what is missing; the result has the bytes of one process whatever happens to the parts.
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

part() {  # inside a task of the array
  exec "${RETNET:-retnet}" data write "$@" --shard "$SLURM_ARRAY_TASK_ID/$PARTS" --workers "${SLURM_CPUS_PER_TASK:-1}"
}

out_of() {  # the last word that is neither an option nor the value of one
  local out=
  while [ $# -gt 0 ]; do
    case $1 in
      --with-end | --*=*) ;;
      --*) shift ;;
      *) out=$1 ;;
    esac
    shift
  done
  echo "$out"
}

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  part "$@"
fi

[[ ${PARTS:-} =~ ^[1-9][0-9]*$ ]] || fail "PARTS is '${PARTS:-}'; accepted: the number of parts"
[ $# -ge 2 ] || fail "accepted: PARTS=N bash $0 SOURCE... OUT [options of retnet data]"
export PARTS
out=$(out_of "$@")
array=$(sbatch --parsable --job-name=retnet-data --array="1-$PARTS" --cpus-per-task="${CPUS_PER_PART:-4}" \
  --requeue --export=ALL "$0" "$@")
array=${array%%;*}  # "job;cluster" where there are several clusters
merge=$(sbatch --parsable --job-name=retnet-merge --dependency="afterok:$array" --cpus-per-task=1 --export=ALL \
  --wrap "$(printf '%q ' "${RETNET:-retnet}" data merge "$out")")
echo "parts: job $array; merge: job ${merge%%;*}, after them"
