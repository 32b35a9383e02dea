#!/usr/bin/env bash
# `retnet` on several machines through torchrun: the same command on each, but for NODE_RANK.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=ADDRESS bash recipes/launch/torchrun.sh train RECIPE.yaml [key=value ...]
#   NODES=2 NODE_RANK=1 MASTER_ADDR=ADDRESS bash recipes/launch/torchrun.sh train RECIPE.yaml [key=value ...]
#
# Settings, from the environment:
#   NODES         machines
#   NODE_RANK     number of this one, from 0
#   MASTER_ADDR   address of machine 0 that the others reach
#   MASTER_PORT   a free port there (default 29500); open to the machines of the run and to nobody else
#   PROCESSES     processes on this machine (default: one per GPU, or one without)
#   INTERFACE     network interface between the machines, such as eth0, where gloo or NCCL take the wrong one
#   PYTHON        the interpreter (default python)
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

[[ ${NODES:-} =~ ^[1-9][0-9]*$ ]] || fail "NODES is '${NODES:-}'; accepted: the number of machines"
[[ ${NODE_RANK:-} =~ ^[0-9]+$ && $NODE_RANK -lt $NODES ]] ||
  fail "NODE_RANK is '${NODE_RANK:-}'; accepted: the number of this machine, from 0 to $((NODES - 1))"
[ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is empty; accepted: the address of machine 0"
[ $# -ge 1 ] || fail "accepted: bash torchrun.sh VERB [arguments of retnet VERB]"

if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}

exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --node_rank="$NODE_RANK" --nproc_per_node="$PROCESSES" \
  --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" -m retnet.cli "$@"
