"""What the commands print for people."""

from typing import Any

from cache.status import Status
from rich.console import Console
from rich.table import Table

from cache.reader import Cache
from cache.verify import VerifyReport
from cli.units import human_bytes, human_seconds
from pipeline.dry_run import Estimate
from pipeline.runs import RunSummary

LISTED = 20


def summary_json(summary: RunSummary) -> dict[str, Any]:
    return {
        "run": summary.id,
        "out": summary.out,
        "complete": summary.complete,
        "rows": summary.rows,
        "seconds": summary.seconds,
        "rows_per_second": round(summary.rows_per_second, 3),
        "bytes": summary.bytes,
        "masked": summary.masked,
        "remaining_units": summary.remaining_units,
        "failed": [{"teacher": f.teacher, "unit": f.unit, "reason": f.reason} for f in summary.failures],
    }


def show_summary(console: Console, summary: RunSummary) -> None:
    if summary.complete:
        console.print(f"{summary.out} is complete", markup=False)
        return
    console.print(
        f"{summary.out} is incomplete: {summary.remaining_units} units are left; run the same command again, or look "
        f"at `kpu-cache status {summary.out}`",
        markup=False,
    )


def show_status(console: Console, status: Status) -> None:
    done = "complete" if status.complete else "incomplete"
    console.print(f"{done}: {status.rows:,} rows in {status.units:,} units, {len(status.masked):,} masked")
    table = Table("teacher", "committed", "bytes", "bytes/row", "RMSE (std)", "cosine")
    for name, teacher in status.teachers.items():
        rows = max(1, round(status.rows * teacher.committed_units / max(1, teacher.units)))
        table.add_row(
            name,
            f"{teacher.committed_units:,}/{teacher.units:,}",
            human_bytes(teacher.bytes),
            human_bytes(teacher.bytes / rows),
            "-" if teacher.rmse is None else f"{teacher.rmse:.4f}",
            "-" if teacher.cosine is None else f"{teacher.cosine:.5f}",
        )
    console.print(table)
    for masked in status.masked[:LISTED]:
        console.print(f"masked row {masked.row}: {masked.key!r} ({masked.reason})", markup=False)
    if len(status.masked) > LISTED:
        console.print(f"... and {len(status.masked) - LISTED:,} more masked rows (--json lists all)")
    for failed in status.failed[:LISTED]:
        teacher = failed.teacher or "all teachers"
        console.print(f"failed unit {failed.unit}, {teacher}: {failed.reason}", markup=False)
    if len(status.failed) > LISTED:
        console.print(f"... and {len(status.failed) - LISTED:,} more failed units (--json lists all)")


def describe_cache(cache: Cache) -> dict[str, Any]:
    """What `info` says, as plain values."""
    plan = cache.plan
    return {
        "path": str(cache.path),
        "rows": plan.rows,
        "samples": plan.samples,
        "views": plan.views,
        "unit_rows": plan.unit_rows,
        "units": plan.units,
        "seed": plan.seed,
        "threads": plan.threads,
        "source": plan.source.model_dump(mode="json"),
        "classes": None if plan.classes is None else list(plan.classes),
        "plan_digest": plan.digest,
        "teachers": {
            name: {
                "fingerprint": teacher.spec.model_fingerprint,
                "calibration_count": {o: s.count for o, s in teacher.statistics.items()},
                **teacher.spec.model_dump(mode="json"),
            }
            for name, teacher in cache.teachers.items()
        },
    }


def show_info(console: Console, described: dict[str, Any]) -> None:
    source = described["source"]
    console.print(f"{described['path']}", markup=False)
    console.print(f"source   {source['kind']} {source['root']}", markup=False)
    views = f" ({described['samples']:,} samples x {described['views']} views)" if described["views"] > 1 else ""
    console.print(f"rows     {described['rows']:,}{views} in {described['units']:,} units of {described['unit_rows']}")
    if described["classes"]:
        names = described["classes"]
        more = ", ..." if len(names) > LISTED else ""
        console.print(f"classes  {len(names)}: {', '.join(names[:LISTED])}{more}", markup=False)
    table = Table("teacher", "model", "weights", "input", "precision", "output", "shape", "codec")
    for name, teacher in described["teachers"].items():
        height, width = teacher["input"]["size"]
        codec = teacher["codec"]["name"] + (f" {teacher['codec']['step']:g}" if teacher["codec"]["step"] else "")
        first = (name, teacher["model"], teacher["weights_digest"][:12], f"{height}x{width}", teacher["precision"])
        for index, output in enumerate(teacher["outputs"]):
            shape = " x ".join(map(str, output["shape"]))
            table.add_row(*(first if index == 0 else [""] * 5), output["name"], shape, codec)
    console.print(table)


def show_verification(console: Console, report: VerifyReport) -> None:
    for problem in report.problems:
        console.print(f"{problem.file}: {problem.reason}", markup=False, soft_wrap=True)
    console.print("verified: no problem" if report.ok else f"{len(report.problems):,} problems")


def show_estimate(console: Console, estimate: Estimate) -> None:
    console.print(
        f"{estimate.rows:,} rows in {estimate.units:,} units of {estimate.unit_rows}; largest shard about "
        f"{human_bytes(estimate.largest_shard_bytes)}"
    )
    table = Table("teacher", "output", "bytes/row", "total")
    for name, outputs in estimate.bytes_per_row.items():
        for output, size in outputs.items():
            table.add_row(name, output, human_bytes(size), human_bytes(size * estimate.rows))
    table.add_row("all", "", human_bytes(estimate.total_bytes / estimate.rows), human_bytes(estimate.total_bytes))
    console.print(table)
    stages = Table("stage", "rows/s of one worker")
    for stage, rate in estimate.stage_rates.items():
        stages.add_row(stage + (" <- bottleneck" if stage == estimate.bottleneck else ""), f"{rate:,.1f}")
    console.print(stages)
    console.print(f"memory of one worker: about {human_bytes(estimate.peak_memory_bytes)}")
    console.print(
        f"{estimate.workers} worker{'s' if estimate.workers > 1 else ''} at {estimate.rows_per_second:,.1f} rows/s: "
        f"about {human_seconds(estimate.seconds)}, {estimate.gpu_hours:.2f} GPU-hours"
    )
