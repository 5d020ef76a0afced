"""Meet the other workers before a process group is made.

Problem: torch waits half an hour, in silence, for a rank that was never started, a store at a wrong
address, or a host behind a firewall. Idea: come to the store in small steps of our own, each with
an end that is told: resolve and connect, check in, look who is missing, call on the other hosts.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from stagewise.errors import UsageError
from stagewise.training.workers.environment import meeting_place, rank_here, world_size

PATIENCE_SECONDS = 60.0  # with ranks that were started by hand; torchrun's are known to be started
TOLD_SECONDS = 5.0  # before it is printed who is waited for
CALL_SECONDS = 10.0  # for a connection to another host
_POLL_SECONDS = 0.1
T = TypeVar("T")
_START, _ALL, _CALLED = "stagewise/start", "all", "called"


def store_of_all(timeout: timedelta) -> Store:
    """Return the store of all workers, once all have come to it; raise UsageError if they do not.

    Waits for `timeout` if torchrun or our launcher has started them, else PATIENCE_SECONDS at most.
    """
    patience = timeout.total_seconds()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        patience = min(patience, PATIENCE_SECONDS)
    ends = time.monotonic() + patience
    host, port = meeting_place()
    rank = rank_here()
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _await_store(host, port, ends)
    served = _connected(host, port, serves=serves)
    served.set_timeout(timeout)
    listener, own = _listener()
    with ExitStack() as until_called:
        until_called.enter_context(listener)
        where = f"{host}:{port}"
        if serves and not _is_here(host):
            where += f" (this host, where rank 0 serves the store, has no address {host})"
        start, addresses = _await_ranks(served, own, where, ends)
        store = dist.PrefixStore(start, served)  # type: ignore[attr-defined]
        _call(store, rank, addresses)
    return store


def agent_store() -> TCPStore:
    """Return another connection to the launcher's store, whose names no start has to itself."""
    return _connected(*meeting_place(), serves=False)


def _connected(host: str, port: int, *, serves: bool) -> TCPStore:
    """Serve the store or connect to it, in a thread: torch waits for ever for a first answer."""
    found = list[TCPStore | Exception]()

    def connect() -> None:
        try:
            where = "localhost" if serves else host
            patience = timedelta(seconds=CALL_SECONDS)
            found.append(
                TCPStore(
                    where,
                    port,
                    is_master=serves,
                    timeout=patience,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(2 * CALL_SECONDS)
    told = found[0] if found else TimeoutError("no answer")
    if isinstance(told, TCPStore):
        return told
    raise UsageError(_not_served(host, port, told))


def _await_store(host: str, port: int, ends: float) -> None:
    """Return once something listens at the store's address."""

    def reason() -> str | None:
        try:
            socket.create_connection((host, port), CALL_SECONDS).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    where = f"MASTER_ADDR={host}, MASTER_PORT={port}"
    why = _awaited(reason, ends, lambda why: f"for the store of rank 0 at {where} ({why})")
    if why is not None:
        raise UsageError(
            f"the store of rank 0 cannot be reached at {where} ({why}): start rank 0 there, and "
            "check the address, the port and the firewall between the hosts"
        )


def _await_ranks(
    store: Store, own: tuple[str, str, int], where: str, ends: float
) -> tuple[str, dict[int, tuple[str, str, int]]]:
    """Return a name of this start, and each rank's host, address and port, once all are here.

    A launcher that starts workers again may serve the same store, with what those before have left,
    and the numbers of its restarts differ from host to host. So rank 0 names the start, all answer,
    and a start counts only for ranks whose own answers are in its list.
    """
    rank, size, answer = rank_here(), world_size(), uuid.uuid4().hex
    if rank == 0:
        store.set(_START, answer)
    met: list[tuple[str, dict[int, tuple[str, str, int]]]] = []

    def missing() -> list[int] | None:
        if not store.check([_START]):
            return [0]
        start = store.get(_START).decode()
        store.set(f"{start}/{rank}", json.dumps([answer, *own]))
        if absent := [each for each in range(size) if not store.check([f"{start}/{each}"])]:
            return absent
        if rank == 0:
            answers = [json.loads(store.get(f"{start}/{each}")) for each in range(size)]
            store.set(f"{start}/{_ALL}", json.dumps(answers))
        if not store.check([f"{start}/{_ALL}"]):
            return [0]
        answers = json.loads(store.get(f"{start}/{_ALL}"))
        if len(answers) != size or answers[rank][0] != answer:
            return [0]  # that of a start before
        met.append((start, {each: tuple(told[1:]) for each, told in enumerate(answers)}))
        return None

    def named(ranks: list[int]) -> str:
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return f"rank{'s' if len(ranks) > 1 else ''} {shown} of {size}"

    absent = _awaited(missing, ends, lambda ranks: f"at {where} for {named(ranks)}")
    if absent is not None:
        raise UsageError(
            f"{named(absent)} did not come to {where}: start every rank with the same MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE, or set WORLD_SIZE to the number of ranks that are started"
        )
    return met[0]


def _awaited(missing: Callable[[], T | None], ends: float, words: Callable[[T], str]) -> T | None:
    """Return None once nothing is `missing`, and what is missing if that takes too long."""
    begun, is_told = time.monotonic(), False
    while (lacks := missing()) is not None and time.monotonic() < ends:
        if not is_told and time.monotonic() - begun >= TOLD_SECONDS:
            is_told = True
            left = f"for at most another {max(0.0, ends - time.monotonic()):.0f} s"
            print(f"rank {rank_here()} waits {words(lacks)}, {left}", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)
    return lacks


def _is_here(host: str) -> bool:
    """Return whether `host` names an address of this host."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _listener() -> tuple[socket.socket, tuple[str, str, int]]:
    """Return a socket that others can call, and this host, its address and port.

    The address is the one that gloo chooses; "" if the user has chosen an interface.
    """
    name = socket.gethostname()
    with suppress(OSError):
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            address = socket.gethostbyname(name)
            listener = socket.create_server((address, 0))
            return listener, (name, address, listener.getsockname()[1])
    return socket.socket(), (name, "", 0)


def _call(store: Store, rank: int, addresses: Mapping[int, tuple[str, str, int]]) -> None:
    """Have the first rank of every host call the others; raise UsageError on all if one cannot."""
    hosts: dict[str, int] = {}
    for other, (name, _, _) in addresses.items():
        hosts.setdefault(name, other)
    if len(hosts) == 1:
        return
    if rank in hosts.values():
        calls = {other: _unreached(*addresses[other]) for other in hosts.values() if other != rank}
        failed = {other: why for other, why in calls.items() if why is not None}
        store.set(f"{_CALLED}/{rank}", json.dumps(failed))
    found = []
    for caller in hosts.values():
        for other, why in json.loads(store.get(f"{_CALLED}/{caller}")).items():
            name, address, port = addresses[int(other)]
            found.append(
                f"rank {other} ({name}, {address}:{port}) cannot be reached from rank {caller} "
                f"({addresses[caller][0]}): {why}"
            )
    if found:
        raise UsageError(
            "\n".join(found[:8]) + "\nopen the hosts' firewalls for each other, or set "
            "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface that connects "
            "them; stagewise doctor checks it"
        )


def _unreached(name: str, address: str, port: int) -> str | None:
    """Return why a host cannot be called; None if it can, or if it has told no address."""
    if not address:
        return None
    try:
        socket.create_connection((address, port), CALL_SECONDS).close()
    except OSError as error:
        loop = f"; {name} is another host's loopback" if address.startswith("127.") else ""
        return f"{error.strerror or error}{loop}"
    return None


def _not_served(host: str, port: int, error: Exception) -> str:
    """Say why rank 0 cannot serve the store."""
    text = str(error)
    if "EADDRINUSE" in text or "already in use" in text:
        return (
            f"port {port} is in use on this host, {socket.gethostname()}, by another run or "
            "program; set MASTER_PORT (torchrun --master-port) to a free port"
        )
    return (
        f"what listens at MASTER_ADDR={host}, MASTER_PORT={port} is not the store of rank 0 "
        f"({text.splitlines()[0]}): check both, which must name rank 0's host and a free port there"
    )
