"""Several processes, one program: start, agree, place each process's share of a batch, wait.

On one process every function here does the obvious thing without waiting for anybody, so the same
script runs on a laptop and on a pod.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed, xla_bridge  # the key-value store has no public name
from jax._src.clusters import ClusterEnv  # and neither has the detection of clusters
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdml.sharding import fingerprint as prints
from jdml.sharding.leaving import leave_at_once_on_failure
from jdml.sharding.paths import leaves_with_paths
from jdml.sharding.rendezvous import meet

PyTree = Any


class Host(NamedTuple):
    """Which process this is, and of how many."""

    process_id: int
    num_processes: int


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    timeout: float = 300.0,
    heartbeat_timeout: float = 100.0,
) -> Host:
    """Join the other processes of this job; with nobody to join, do nothing.

    What is not given comes from ``python -m jdml.launch`` or from JAX's own detection (TPU VM,
    SLURM, Open MPI, Kubernetes). Call it before any computation; calling it again is harmless.
    On CPU, collectives between processes use Gloo unless the configuration names another. From
    then on a process that fails ends without waiting for the others.

    Args:
      coordinator: ``"host:port"`` on which process 0 listens and the others reach it.
      num_processes: processes in all.
      process_id: number of this one, from 0.
      local_device_ids: which of the machine's GPUs this process uses; all by default.
      timeout: seconds until a process that cannot be met is given up.
      heartbeat_timeout: seconds after which a silent process is taken for dead; the others end.

    Raises:
      TimeoutError: some process did not come, or process 0 cannot be reached; says which.
      RuntimeError: JAX has computed something already; or two processes have one number.
      ValueError: only part of the three numbers is known, or they contradict an earlier call.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    if jax.distributed.is_initialized():
        host = _host()
        for name, value in given.items():
            if value is not None and value != getattr(host, name):
                raise ValueError(
                    f"initialize: this process already is {host.process_id} of "
                    f"{host.num_processes}, got {name}={value}; initialize once per process"
                )
        return host
    launcher = os.environ.get("JDML_COORDINATOR")
    coordinator = coordinator or launcher
    if launcher is not None and coordinator == launcher:
        num_processes = _from_environment(num_processes, "JDML_NUM_PROCESSES")
        process_id = _from_environment(process_id, "JDML_PROCESS_ID")
    elif None in (coordinator, num_processes, process_id, local_device_ids):
        coordinator, num_processes, process_id, local_device_ids = (
            ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, num_processes, process_id, local_device_ids, None, int(timeout)
            )
        )
    known = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in known.items() if value is None]
    if len(missing) == 3 or num_processes == 1:
        return Host(0, 1)
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            f"initialize: expected coordinator, num_processes and process_id, got {known} and no "
            f"cluster that JAX detects; give {' and '.join(missing)} too, or none of the three"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"initialize: expected 0 <= process_id < num_processes, got {process_id} of "
            f"{num_processes}"
        )
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "initialize: JAX already has its devices in this process, which would stay alone; "
            "call initialize() before the first computation, jax.devices() or make_mesh"
        )
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    leave_at_once_on_failure(lambda: _client().wait_at_barrier("jdml/leaving", 2000))
    meet(coordinator, num_processes, process_id, timeout)
    local = coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout)),
        heartbeat_timeout_seconds=max(1, int(heartbeat_timeout)),
        coordinator_bind_address=coordinator if local else None,
    )
    return Host(process_id, num_processes)


def _from_environment(value: int | None, name: str) -> int | None:
    return int(os.environ[name]) if value is None and name in os.environ else value


def _host() -> Host:
    """This process among the others, without waking the devices where the coordinator knows."""
    if jax.distributed.is_initialized():
        return Host(distributed.global_state.process_id, distributed.global_state.num_processes)
    return Host(jax.process_index(), jax.process_count())


def _client() -> Any:
    """The coordinator's key-value store and barriers; only with several processes."""
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError(
            "several processes without a coordinator: call jdml.sharding.initialize() first"
        )
    return client


def barrier(name: str, timeout: float = 60.0) -> None:
    """Wait on the host until every process has reached the barrier of this name.

    Device work that was dispatched may still run; nothing is sent between devices.

    Raises:
      TimeoutError: after ``timeout`` seconds, naming processes that did not come.
    """
    host = _host()
    if host.num_processes == 1:
        return
    try:
        _client().wait_at_barrier(f"jdml/{name}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "timed out" not in text and "DEADLINE_EXCEEDED" not in text:
            raise
        late = re.search(r"timed out task names:\s*([\d\s,]+)", text)
        who = f"process {', '.join(late[1].split())} did not come" if late else text[:300]
        raise TimeoutError(
            f"barrier {name!r}: process {host.process_id} of {host.num_processes} waited "
            f"{timeout:g} s; {who}"
        ) from error


def check_fingerprint(
    config: Any = None,
    code: Iterable[str | os.PathLike[str]] = (),
    timeout: float = 60.0,
) -> None:
    """Raise on every process if any runs another program; call it before the first collective.

    Compared are versions, XLA flags, settings of JAX that change programs, the sources of this
    package and of the script, and ``config``. Hosts exchange a few kilobytes through the
    coordinator; nothing runs on devices.

    Args:
      config: a dataclass, mapping or pytree; differing leaves are named.
      code: further files or folders of Python sources to compare.
      timeout: seconds to wait for the others.

    Raises:
      RuntimeError: processes differ; one line per difference, with each value and who has it.
      TimeoutError: some process did not come.
    """
    _compare(
        "fingerprint", prints.fingerprint(config, code), timeout, "do not run the same program"
    )


def _compare(name: str, table: dict[str, str], timeout: float, complaint: str) -> None:
    me, num = _host()
    if num == 1:
        return
    client = _client()
    digests, tables = f"jdml/{name}/digest/", f"jdml/{name}/table/"
    client.key_value_set(f"{digests}{me}", prints.summary(table), allow_overwrite=True)
    client.key_value_set(f"{tables}{me}", json.dumps(table), allow_overwrite=True)
    barrier(f"{name}/written", timeout)
    found = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(digests)}
    # Whole tables are read only where they differ, one of each kind, so that a thousand hosts
    # exchange a thousand short digests.
    kinds: dict[str, list[int]] = {}
    for rank in sorted(found):
        kinds.setdefault(found[rank], []).append(rank)
    if len(kinds) > 1:
        read = {
            ranks[0]: json.loads(
                client.blocking_key_value_get(f"{tables}{ranks[0]}", int(timeout * 1000))
            )
            for ranks in kinds.values()
        }
        shown = {rank: read[ranks[0]] for ranks in kinds.values() for rank in ranks}
        lines = prints.differences(shown)
        more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise RuntimeError(
            f"{name}: the {num} processes {complaint}; this is process {me}\n  "
            + "\n  ".join(lines[:20])
            + more
        )
    barrier(f"{name}/read", timeout)  # so that no later call overwrites what is still read


def broadcast_from_first(tree: PyTree, timeout: float = 60.0) -> PyTree:
    """The leaves of process 0, on every process, bit for bit.

    All leaves travel as one array of bytes. Structure, shapes and dtypes are compared
    through the coordinator first: where they differ every process raises instead of waiting.

    Args:
      tree: arrays (NumPy, or JAX arrays that this process holds whole), Python numbers, PRNG keys,
        and strings, whose lengths may differ.
      timeout: seconds to wait for the others.

    Returns:
      The same tree: NumPy arrays, and numbers, keys and strings as they came.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [_bytes_of(path, leaf) for path, leaf in leaves_with_paths(tree)]
    if jax.process_count() > 1:
        table = {
            path: "str" if isinstance(leaf, str) else f"{array.dtype}{list(array.shape)}"
            for (path, leaf), array in zip(leaves_with_paths(tree), arrays, strict=True)
        }
        table |= prints.flatten(str(structure), "structure")
        _compare("broadcast", table, timeout, "broadcast different trees")
        sizes = multihost_utils.broadcast_one_to_all(np.array([x.nbytes for x in arrays], np.int32))
        received = np.zeros(int(np.sum(sizes)), np.uint8)
        if jax.process_index() == 0:
            received = np.concatenate([np.frombuffer(x.tobytes(), np.uint8) for x in arrays])
        if received.size:
            received = np.asarray(multihost_utils.broadcast_one_to_all(received))
        parts = np.split(received, np.cumsum(sizes)[:-1]) if arrays else []
        arrays = [
            part if isinstance(leaf, str) else part.copy().view(x.dtype).reshape(x.shape)
            for leaf, part, x in zip(leaves, parts, arrays, strict=True)
        ]
    return jax.tree.unflatten(
        structure, [_like(leaf, array) for leaf, array in zip(leaves, arrays, strict=True)]
    )


def _bytes_of(path: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, str):
        return np.frombuffer(leaf.encode(), np.uint8)
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if array.dtype.hasobject:
        raise ValueError(
            f"broadcast_from_first: expected arrays, numbers, keys or strings, got "
            f"{type(leaf).__name__} at {path}; take it apart first"
        )
    return array


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(leaf: Any, array: np.ndarray) -> Any:
    if isinstance(leaf, str):
        return array.tobytes().decode()
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return type(leaf)(array.item()) if isinstance(leaf, (bool, int, float, complex)) else array


def global_batch(local: PyTree, mesh: Mesh, spec: PyTree | None = None) -> PyTree:
    """Make global arrays of which each process brings its own part.

    Args:
      local: arrays of this process: along each sharded dim the rows of its own devices, along
        the others everything. May be aliased: do not write into them afterwards.
      mesh: over all processes.
      spec: a ``PartitionSpec`` for all leaves, or a tree of them (a prefix of ``local``); by
        default dim 0 over the first axis of the mesh.

    Returns:
      Arrays of the global shape with ``NamedSharding(mesh, spec)``; leaves that already have it
      pass through.

    Raises:
      ValueError: a leaf cannot be divided among this process's devices; names it.
    """
    if spec is None:
        spec = PartitionSpec(mesh.axis_names[0])

    def is_spec(x: Any) -> bool:
        return isinstance(x, PartitionSpec)

    specs = jax.tree.map(
        lambda s, part: jax.tree.map(lambda _: s, part), spec, local, is_leaf=is_spec
    )
    named = zip(leaves_with_paths(local), jax.tree.leaves(specs, is_leaf=is_spec), strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(local), [_place(path, x, mesh, s) for (path, x), s in named]
    )


def _place(path: str, leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    array = np.asarray(leaf)
    if len(spec) > array.ndim:
        raise ValueError(
            f"global_batch: {path} has {array.ndim} dims, {spec} names {len(spec)}; give the leaf "
            "its own spec"
        )
    here = np.array([d.process_index == jax.process_index() for d in mesh.devices.flat])
    if not here.any():
        raise ValueError(
            f"global_batch: process {jax.process_index()} has no device in {mesh}; make the mesh "
            "over the devices of all processes"
        )
    for dim, entry in enumerate(spec):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        if not axes:
            continue
        places = np.stack(np.unravel_index(np.flatnonzero(here), mesh.devices.shape))
        of_axes = places[[mesh.axis_names.index(a) for a in axes]]
        num_here = np.unique(of_axes, axis=1).shape[1]
        if array.shape[dim] % num_here:
            raise ValueError(
                f"global_batch: {path} has {array.shape[dim]} rows along dim {dim} on process "
                f"{jax.process_index()}, whose devices hold {num_here} shards of axis "
                f"{' × '.join(axes)}; bring a multiple of {num_here}"
            )
    try:
        return jax.make_array_from_process_local_data(sharding, array)
    except ValueError as error:
        raise ValueError(f"global_batch: {path}: {error}") from error
