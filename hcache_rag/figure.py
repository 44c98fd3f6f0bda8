"""The figure of a `FidelityReport`: quality against time, and errors by layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hcache_rag.fidelity import FidelityReport


def draw_fidelity(report: FidelityReport, path: Path) -> None:
    """Draw it into a file, in the form that the suffix says; there is the whole figure, or none.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or not in this form.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    _quality(axes[0], report)
    _layers(axes[1], report)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(unfinished, dpi=120, format=path.suffix.removeprefix("."))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _quality(axis: Any, report: FidelityReport) -> None:
    """KL at the first token against seconds, a point for each position."""
    for row in report.positions:
        kl, is_chosen = row.kl_first, row.position == report.recommendation
        spread = [[kl.mean - kl.low], [kl.high - kl.mean]]
        form = {"fmt": "*", "markersize": 13} if is_chosen else {"fmt": "o"}
        axis.errorbar(row.seconds, kl.mean, spread, **form)
        place = (row.seconds, kl.mean)
        axis.annotate(str(row.position), place, xytext=(7, 5), textcoords="offset points")
    tolerance = report.tolerance_nats
    axis.axhline(tolerance, color="grey", linewidth=0.8, label=f"tolerance, {tolerance:g} nats")
    full = f"full prefill, {report.full_s:.2f} s"
    axis.axvline(report.full_s, color="grey", linewidth=0.8, linestyle=":", label=full)
    axis.set_yscale("symlog", linthresh=tolerance / 100)
    slowest = max(report.full_s, *(row.seconds for row in report.positions))
    axis.set_xlim(0, 1.15 * slowest)
    axis.set_ylim(0, 3 * max(tolerance, *(row.kl_first.high for row in report.positions)))
    axis.set_xlabel("seconds to the first token, median")
    axis.set_ylabel("KL from full prefill at the first token, nats")
    axis.set_title(f"{report.prompts} prompts of {report.prompt_tokens:,.0f} tokens", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="center right")


def _layers(axis: Any, report: FidelityReport) -> None:
    """Errors of K and V against layers, two lines for each position that has any."""
    shown = [row for row in report.positions if any(row.layers.keys)]
    for row in shown:
        (line,) = axis.plot(row.layers.keys, label=f"{row.position}: K")
        axis.plot(row.layers.values, color=line.get_color(), linestyle="--", label="V")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel("relative error of restored tokens")
    axis.legend(ncols=max(1, len(shown)), fontsize=7, frameon=False, loc="lower right")
