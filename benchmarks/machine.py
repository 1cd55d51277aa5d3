"""On what and when a benchmark ran, the line beneath every table; and where tables go."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from rich.console import Console


def machine(*packages: str) -> str:
    """Processor, cores, versions and date; ``packages`` that are not installed are left out."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.date.today().isoformat()
    return f"{model}, {os.cpu_count()} cores, {', '.join(versions)}, {today}"


def console_of_tables() -> Console:
    """The terminal as it is; wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
