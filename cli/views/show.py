"""What the commands print for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cli.output import say
from cli.views.tables import Table
from cli.views.units import human_bytes, human_seconds, plural
from kpu.format.reasons import remedy
from kpu.storage.places import redact

if TYPE_CHECKING:  # `status` should not wait for torch
    from collections.abc import Sequence

    from kpu.reading.cache import Cache
    from kpu.records.leftout import LeftOut
    from kpu.tools.repair import Repair
    from kpu.tools.report import Problem
    from kpu.tools.status import Status
    from kpu.tools.verify import VerifyReport
    from pipeline.dry_run import Estimate
    from pipeline.run.records import RunSummary

LISTED = 20
SATURATED_SHARE = 0.001  # of a teacher's values; above it, a run warns


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
        "masked_reasons": summary.reasons,
        "left_out": [asdict(item) for item in summary.left_out],
        "nonfinite": summary.nonfinite,
        "remaining_units": summary.remaining_units,
        "saturated": summary.saturated,
        "failed": [{"teacher": f.teacher, "unit": f.unit, "reason": f.reason} for f in summary.failures],
    }


def show_extraction(console: Console, summary: RunSummary) -> None:
    _left_out(console, summary.left_out)
    reasons = [f"{rows:,} {text}" for text, rows in summary.reasons.items()]
    reasons += [f"{rows:,} with NaN or infinity from teacher {name}" for name, rows in summary.nonfinite.items()]
    if reasons:
        masked = plural(summary.masked + sum(summary.nonfinite.values()), "row")
        say(console, f"{masked} masked ({', '.join(reasons)}): `kpu-cache status {summary.out}` lists them")
    for name, share in summary.saturated.items():
        if share > SATURATED_SHARE:
            say(
                console,
                f"warning: teacher {name}: {share:.2%} of the values are beyond the range of its codec and were stored "
                "as the nearest within: extract it under a new name with a larger codec.step, or with more "
                "calibration_rows",
            )
    if summary.complete:
        say(console, f"complete: {summary.out}")
        return
    left = plural(summary.remaining_units, "unit")
    if summary.failures:
        say(
            console,
            f"incomplete: {left} left in {summary.out}; once the cause is mended, `kpu-cache retry-failed "
            f"{summary.out}` or the same command tries again",
        )
    else:
        say(console, f"incomplete: {left} left in {summary.out}; run the same extract command again")


def show_status(console: Console, status: Status) -> None:
    done = "complete" if status.complete else "incomplete"
    masked = f", {len(status.masked):,} masked" if status.masked else ""
    say(console, f"{done}: {plural(status.rows, 'row')} in {plural(status.units, 'unit')}{masked}")
    _left_out(console, status.left_out)
    table = Table("teacher", "committed", "size", "bytes/row", "RMSE (std)", "cosine", left=1)
    for name, teacher in status.teachers.items():
        table.add_row(
            name,
            f"{teacher.committed_units:,}/{teacher.units:,}",
            human_bytes(teacher.bytes),
            human_bytes(teacher.bytes / max(1, teacher.committed_rows)),
            "-" if teacher.rmse is None else f"{teacher.rmse:.4f}",
            "-" if teacher.cosine is None else f"{teacher.cosine:.5f}",
        )
    if status.teachers:
        table.show(console)
    for name, teacher in status.teachers.items():
        if teacher.saturated:
            count = plural(teacher.saturated, "value")
            say(console, f"teacher {name}: {count} beyond the range of its codec stored as the nearest within")
    if status.lost_images:
        units = plural(len(status.lost_images), "unit")
        say(console, f"the images of {units} are not committed though a teacher is: `kpu-cache repair` mends that")
    for text, masked_rows in status.masked_reasons.items():
        advice = f": {found}" if (found := remedy(text)) else ""
        say(console, f"{plural(masked_rows, 'row')} masked ({text}){advice}")
    for row in status.masked[:LISTED]:
        say(console, f"masked row {row.row}: {row.key if row.key.isprintable() else repr(row.key)} ({row.reason})")
    _more(console, len(status.masked), "masked rows")
    for failed in status.failed[:LISTED]:
        say(console, f"failed unit {failed.unit}, {failed.teacher or 'all teachers'}: {failed.reason}")
    _more(console, len(status.failed), "failed units")


def describe_cache(cache: Cache) -> dict[str, Any]:
    """What `info` says, as plain values."""
    plan = cache.plan
    return {
        "path": str(cache.path),
        "rows": plan.rows,
        "samples": plan.samples,
        "labels": cache.samples.count_labels(),
        "views": plan.views,
        "unit_rows": plan.unit_rows,
        "units": plan.units,
        "seed": plan.seed,
        "threads": plan.threads,
        "source": plan.source.model_copy(update={"root": redact(plan.source.root)}).model_dump(mode="json"),
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
    say(console, f"cache    {described['path']}")
    say(console, f"source   {source['kind']} {source['root']}")
    views = (
        f" ({plural(described['samples'], 'sample')} x {described['views']} views)" if described["views"] > 1 else ""
    )
    units = f"{plural(described['units'], 'unit')} of {described['unit_rows']}"
    say(console, f"rows     {described['rows']:,}{views} in {units}")
    say(console, f"labels   for {described['labels']:,} of {plural(described['rows'], 'row')}")
    if described["classes"]:
        names = described["classes"]
        say(console, f"classes  {len(names)}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}")
    for name, teacher in described["teachers"].items():
        say(console, f"\nteacher  {name}: {teacher['model']}")
        own = "its own" if teacher["input"] else "not known"
        say(console, f"weights  {teacher['weights'] or own}, digest {teacher['weights_digest']}")
        say(console, f"input    {_input(teacher['input'])}, {teacher['precision']}")
        say(console, f"codec    {_codec(teacher['codec'])}")
        if teacher.get("no_head"):
            say(console, f"head     none: {teacher['no_head']}")
        if teacher.get("model_args"):
            say(console, f"args     {', '.join(f'{key}: {value}' for key, value in teacher['model_args'].items())}")
        for output in teacher["outputs"]:
            grid = " (grid {} x {})".format(*output["grid"]) if output["grid"] else ""
            shape = " x ".join(map(str, output["shape"]))
            count = teacher["calibration_count"][output["name"]]
            known = _known(teacher, output["name"])
            say(console, f"output   {output['name']}: {shape}{grid}{known}, calibrated on {count:,} vectors")


def _known(teacher: dict[str, Any], output: str) -> str:
    """What `global` is pooled by, or that nothing but a word says how a map is ordered."""
    if output == "global":
        return f", {teacher['pooling']}" if teacher.get("pooling") else ""
    return ", order not shown by changing an image" if output in (teacher.get("unproven") or ()) else ""


def _input(spec: dict[str, Any] | None) -> str:
    if spec is None:
        return "not known: features were imported"
    height, width = spec["size"]
    mode = {"squash": ", squashed", "pad": ", padded"}.get(spec.get("crop_mode", "center"), "")
    order = ", blue first" if spec.get("channels") == "bgr" else ""
    return f"{height} x {width} pixels, {spec['interpolation']}, crop {spec['crop']:g}{mode}{order}"


def _codec(codec: dict[str, Any]) -> str:
    step = f", step {codec['step']:g} of a channel's standard deviation" if codec["step"] else ""
    return f"{codec['name']}{step}"


def show_verification(console: Console, cache: str, report: VerifyReport, recomputed: int) -> None:
    """`recomputed` rows were run through the teachers again."""
    _problems(console, report.problems)
    again = f", {plural(recomputed, 'row')} computed again" if recomputed else ""
    read = f"{plural(report.files, 'file')}, {human_bytes(report.bytes)} read{again}"
    say(console, f"verified: {read}" if report.ok else f"{plural(len(report.problems), 'problem')}: {read}")
    if not recomputed and any(problem.unit is not None and problem.kind == "damaged" for problem in report.problems):
        say(console, f"`kpu-cache repair {cache}` withdraws damaged units, for the same extract command to do again")


def show_repair(console: Console, cache: str, repaired: Repair, dry_run: bool) -> None:
    for file in repaired.withdrawn:
        say(console, f"{'would withdraw' if dry_run else 'withdrawn'}: {file}")
    if repaired.left:
        say(console, "left as it is, for no unit can be extracted again to mend it:")
        _problems(console, repaired.left)
    if repaired.report.ok:
        say(console, f"sound: {cache}")
    elif not repaired.withdrawn:
        say(console, "nothing to withdraw")
    elif not dry_run:
        count = plural(len(repaired.withdrawn), "record")
        say(console, f"{count} withdrawn: the command that made {cache} does these units again")


def _problems(console: Console, problems: Sequence[Problem]) -> None:
    """A line each, but for units that are not committed: a line for each folder."""
    absent = Counter(problem.file.rpartition("/")[0] for problem in problems if problem.kind == "absent")
    for folder, count in absent.items():
        say(console, f"{folder}: {plural(count, 'unit')} not committed")
    for problem in problems:
        if problem.kind != "absent":
            unit = "" if problem.unit is None else f" (unit {problem.unit})"
            say(console, f"{problem.file}{unit}: {problem.reason}")


def show_estimate(console: Console, estimate: Estimate) -> None:
    left = f", {estimate.rows_left:,} left to do" if estimate.rows_left < estimate.rows else ""
    units = f"{plural(estimate.units, 'unit')} of {estimate.unit_rows}"
    shard = human_bytes(estimate.largest_shard_bytes)
    say(console, f"{plural(estimate.rows, 'row')}{left}, {units}; the largest shard about {shard}")
    sizes = Table("teacher", "output", "bytes/row", "size of all rows", left=2)
    for name, outputs in estimate.bytes_per_row.items():
        for output, size in [*outputs.items(), ("all", sum(outputs.values()))]:
            sizes.add_row(name, output, human_bytes(size), human_bytes(size * estimate.rows))
    sizes.show(console)
    stages = Table("stage", "rows/s of one worker", left=1)
    for stage, rate in estimate.stage_rates.items():
        stages.add_row(stage + (" (bottleneck)" if stage == estimate.bottleneck else ""), f"{rate:,.0f}")
    stages.show(console)
    say(console, f"total size       {human_bytes(estimate.total_bytes)} to be written")
    say(console, f"peak memory      {human_bytes(estimate.peak_memory_bytes)} in each worker")
    workers = plural(estimate.workers, "worker")
    calibration = (
        f", after calibrating on {plural(estimate.calibration_rows, 'row')}" if estimate.calibration_rows else ""
    )
    say(console, f"rate             {estimate.rows_per_second:,.0f} rows/s on {workers}{calibration}")
    say(console, f"time             {human_seconds(estimate.seconds)}, {estimate.gpu_hours:.2f} GPU-hours")


def _left_out(console: Console, items: Sequence[LeftOut]) -> None:
    from kpu.records.leftout import describe_left_out

    line = describe_left_out(items)
    if line:
        say(console, line)


def _more(console: Console, count: int, what: str) -> None:
    if count > LISTED:
        say(console, f"... and {count - LISTED:,} more {what}: --json lists all")
