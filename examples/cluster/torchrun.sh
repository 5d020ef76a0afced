#!/usr/bin/env bash
# Run the same command on every host; HEAD is one of them, by a name or address that all can reach.
#
#   HEAD=node1 NODES=2 PER_NODE=2 examples/cluster/torchrun.sh \
#       train recipe.py --mesh pp=2,dp_shard=2 --out /shared/run
#
# --out must be on a file system that all hosts share. After a failure the workers start again, up to
# RESTARTS times, and go on from the newest checkpoint. If gloo finds the wrong network (a hostname
# that means 127.0.0.1, or several networks), set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the
# right interface, and LOCAL_ADDR to this host's address there.
set -euo pipefail

WHERE=()
if [ -n "${LOCAL_ADDR:-}" ]; then
    WHERE=(--local-addr "$LOCAL_ADDR")
    # Torch asks only for the addresses of the hostname, to know who is the head.
    [ "$LOCAL_ADDR" != "${HEAD:-}" ] || WHERE+=(--rdzv-conf is_host=true)
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${PER_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id "${JOB:-stagewise}" \
    --max-restarts "${RESTARTS:-0}" \
    "${WHERE[@]}" \
    -m stagewise "$@"
