"""Pictures of a layout: which device holds which part of an array, and sits where in the mesh."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh, Sharding
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jdml.sharding.check import spec_text
from jdml.sharding.fit import shape_of


def show(
    x: Any,
    sharding: Sharding | None = None,
    dims: tuple[int, int] | None = None,
    file: str | Path | None = None,
) -> str:
    """Draws which devices hold which part of an array.

    Args:
      x: an array, or an abstract one.
      sharding: its layout, where the array does not say.
      dims: the two dims to draw, rows and columns; by default the first two that are divided. Each
        other dim is drawn at its first part.
      file: a path that ends in ``.png`` to write a picture to (needs matplotlib).

    Returns:
      The drawing as text; each cell names the devices that hold the part, as ``0,4`` or ``0-3``.
    """
    shape = shape_of(x)
    sharding = getattr(x, "sharding", None) if sharding is None else sharding
    if not isinstance(sharding, Sharding):
        raise ValueError(f"show: an array of shape {shape} on no device; pass sharding=")
    shard = sharding.shard_shape(shape)
    counts = [-(-size // part) if part else 1 for size, part in zip(shape, shard, strict=True)]
    if dims is None:
        divided = [dim for dim, count in enumerate(counts) if count > 1]
        whole = [dim for dim, count in enumerate(counts) if count == 1]
        dims = tuple(sorted((divided + whole)[:2]))  # type: ignore[assignment]
    assert dims is not None
    if any(not 0 <= dim < len(shape) for dim in dims) or len(set(dims)) < len(dims):
        raise ValueError(f"show: dims {dims} of an array of shape {shape}")
    rows, columns = (*dims, None, None)[:2] if len(dims) != 1 else (None, dims[0])
    cells = _cells(sharding, shape, shard, rows, columns)
    title = f"shape {shape}, {spec_text(sharding)}"
    for dim, count in enumerate(counts):
        if dim not in dims and count > 1:
            title += f"; dim {dim} at part 1 of {count}"
    if file is not None:
        _png(cells, title, rows, columns, Path(file))
    return _text(_grid(cells, title, rows, columns))


def describe_mesh(mesh: Mesh) -> str:
    """Draws which device sits where in the mesh: rows and columns are its last two axes.

    A cell is the device's id, with its slice and process where there are several.
    """
    devices = list(mesh.devices.flat)
    slices = {getattr(d, "slice_index", None) for d in devices} - {None}
    processes = {d.process_index for d in devices}

    def cell(device: Any) -> str:
        text = str(device.id)
        text += f" s{device.slice_index}" if len(slices) > 1 else ""
        return text + (f" p{device.process_index}" if len(processes) > 1 else "")

    sizes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    kinds = sorted({str(d.device_kind) for d in devices})
    head = f"mesh {sizes}: {mesh.size} devices ({', '.join(kinds)})"
    head += f", {len(slices)} slices" if len(slices) > 1 else ""
    head += f", {len(processes)} processes" if len(processes) > 1 else ""
    names = mesh.axis_names
    grid = mesh.devices if mesh.devices.ndim > 1 else mesh.devices[None]
    parts: list[RenderableType] = [Text(head)]
    for index in np.ndindex(grid.shape[:-2]):
        where = ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=False))
        table = Table(box=box.SQUARE, show_lines=True, title=where or None, title_justify="left")
        row_name = names[-2] if len(names) > 1 else None
        if row_name:
            table.add_column(f"{row_name} \\ {names[-1]}", style="bold")
        for column in range(grid.shape[-1]):
            table.add_column(str(column) if row_name else f"{names[-1]} {column}", justify="center")
        for number, row in enumerate(grid[index]):
            table.add_row(*([str(number)] if row_name else []), *(cell(d) for d in row))
        parts.append(table)
    return _text(Group(*parts))


def _cells(
    sharding: Sharding,
    shape: tuple[int, ...],
    shard: tuple[int, ...],
    rows: int | None,
    columns: int | None,
) -> dict[tuple[int, int], list[int]]:
    """Position in the drawing → ids of the devices that hold the part."""
    cells: dict[tuple[int, int], list[int]] = {}
    device: Any
    for device, index in sharding.devices_indices_map(shape).items():
        start = [
            (s.start or 0) // part if part else 0 for s, part in zip(index, shard, strict=True)
        ]
        if any(start[dim] for dim in range(len(shape)) if dim not in (rows, columns)):
            continue
        at = (0 if rows is None else start[rows], 0 if columns is None else start[columns])
        cells.setdefault(at, []).append(device.id)
    return cells


def _size(cells: dict[tuple[int, int], list[int]]) -> tuple[int, int]:
    return max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1


def _grid(
    cells: dict[tuple[int, int], list[int]], title: str, rows: int | None, columns: int | None
) -> RenderableType:
    num_rows, num_columns = _size(cells)
    table = Table(box=box.SQUARE, show_header=False, show_lines=True)
    for _ in range(num_columns):
        table.add_column(justify="center")
    for row in range(num_rows):
        table.add_row(*(_ids(cells.get((row, column), [])) for column in range(num_columns)))
    axes = f"rows: dim {rows}, columns: dim {columns}" if rows is not None else ""
    return Group(Text(title), table, *([Text(axes)] if axes else []))


def _ids(ids: list[int]) -> str:
    ids = sorted(ids)
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]}-{ids[-1]}"
    return ",".join(map(str, ids))


def _text(renderable: RenderableType) -> str:
    console = Console(width=120, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _png(
    cells: dict[tuple[int, int], list[int]],
    title: str,
    rows: int | None,
    columns: int | None,
    file: Path,
) -> None:
    if file.suffix != ".png":
        raise ValueError(f"show: file must end in .png, got {file}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("show: a picture needs matplotlib; install jdml[plots]") from error
    num_rows, num_columns = _size(cells)
    colour = np.zeros((num_rows, num_columns))
    parts = sorted({tuple(sorted(ids)) for ids in cells.values()})
    for at, ids in cells.items():
        colour[at] = parts.index(tuple(sorted(ids)))
    figure = Figure(figsize=(1.5 + num_columns, 1.0 + 0.6 * num_rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(colour, cmap="tab20", aspect="auto", vmin=0, vmax=19)
    for (row, column), ids in cells.items():
        axes.text(column, row, _ids(ids), ha="center", va="center")
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_ylabel("" if rows is None else f"dim {rows}")
    axes.set_xlabel("" if columns is None else f"dim {columns}")
    figure.savefig(file)
