"""The model card of an exported student."""

from collections.abc import Mapping
from typing import Any

from kpu.trust.code import split_model
from trainer.evaluation.trained import Trained
from trainer.export.assemble import TIMM
from trainer.export.checked import Checked
from trainer.export.description import BASE, StudentDescription
from trainer.export.program import PROGRAM

_CARD = """# Student of {names}

A `{kind}` student that was trained with KPU to hold what these teachers know, without labels: {teachers}.
It is built on the general-purpose base `{base}`.

## Use

```python
from PIL import Image
from trainer import load_student

student = load_student("path/to/this/folder")
found = student([Image.open("some.png")])  # or files, arrays [H, W, 3], or uint8 pixels [B, {height}, {width}, 3]
```
{code}
{outputs}

`config.json` holds the preprocessing: {preprocessing}. `student.pixels(images)` does it alone: images of any size in,
uint8 [B, {height}, {width}, 3] out, the one size that the student runs at.
{program}{extra}
## Checked

On {rows} cached rows before this was written, images against cached features, relative root mean square error:
{checked}.
{scores}
## Licences and weights

{weights} The licences of the base and of the teachers' classifiers are those of their publishers; KPU knows none of
them, and whoever passes this folder on must.
{notes}"""


_PROGRAM = """
## Without KPU

`{file}` is the same student as a program of torch, for uint8 pixels [B, {height}, {width}, 3]; it becomes ONNX with the
packages `onnx` and `onnxscript`. Loading a program of somebody whom you do not trust may run what is in it.

```python
import torch

program = torch.export.load("{file}")
found = program.module()(pixels)
torch.onnx.export(program, dynamo=True).save("student.onnx")  # outputs in the order of `found`
```
"""


def write_card(
    trained: Trained, description: StudentDescription, checked: Checked, notes: list[str], code: Mapping[str, str]
) -> str:
    """Markdown: what it is, how to run it, how it was checked, how close it is to its teachers, whose weights.

    `code` are the names of Python files by their SHA-256 digest.
    """
    spec, size = description.base, description.input.size
    return _CARD.format(
        names=" and ".join(trained.sources),
        teachers=", ".join(f"`{name}` ({_model(source.spec.model)})" for name, source in trained.sources.items()),
        kind=description.student.kind,
        base=spec.name,
        height=size[0],
        width=size[1],
        code=_code(description, code),
        program=_PROGRAM.format(file=PROGRAM, height=size[0], width=size[1]) if PROGRAM in description.digests else "",
        outputs=_outputs(description),
        preprocessing=_preprocessing(description),
        extra=_extra(description),
        rows=checked.rows,
        checked=_checked(checked),
        scores=_scores(trained),
        weights=_weights(description),
        notes="".join(f"\nNote: {note}.\n" for note in notes),
    )


def _model(model: str) -> str:
    """A model's name; of a Python file its own name alone."""
    kind, _, rest = model.partition(":")
    return f"{kind}:{rest.rpartition('/')[2]}" if kind == "torch" else model


def _code(description: StudentDescription, code: Mapping[str, str]) -> str:
    """A warning of the Python that `load_student` runs."""
    base = description.base.model if description.student.kind in ("side", "frozen") else ""
    models = (base, description.student.model or "")
    elsewhere = [split_model(model)[0] for model in models if model.startswith("torch:")]
    named = [f"`{place.rpartition('/')[2]}`" for place in dict.fromkeys(elsewhere) if place not in code.values()]
    if not code and not named:
        return ""
    files = "".join(f"\n    {key}  {name}" for key, name in code.items())
    lines = ["\n**This student comes with code**, which `load_student` runs only for whoever trusts it: read it, then"]
    lines += ["pass `trust_code=True`, or add its SHA-256 digest to your list (`SECURITY.md` of KPU).\n"]
    lines += [f"{files}\n"] if code else []
    lines += [f"\nIt also names {', '.join(named)}, which is not in this folder.\n"] if named else []
    return "\n".join(lines[:2]) + "".join(lines[2:])


def _outputs(description: StudentDescription) -> str:
    lines = []
    for output in description.outputs:
        shape = description.base_shapes[output]
        wide = shape.channels + (description.student.width if description.student.concat else 0)
        place = f"[B, {wide}]" if shape.grid is None else f"[B, {shape.tokens}, {wide}] on a grid of {shape.grid}"
        lines.append(f'- `found["{output}"]` {place}: features, in standard deviations of the base\'s own')
    if description.base.name in description.heads:
        lines.append('- `found["logits"]`: the base\'s own classifier on them')
    lines += [
        f'- `found["teachers"]["{name}"]`: {", ".join([*outputs, *(["logits"] if name in description.heads else [])])} '
        f"as `{name}` would give them"
        for name, outputs in description.shapes.items()
    ]
    return "\n".join(lines)


def _preprocessing(description: StudentDescription) -> str:
    own = description.input
    order = ", blue first" if own.channels == "bgr" else ""
    how = f"mean {own.mean}, std {own.std}{order}"
    if own.crop_mode == "pad":
        return f"the image is resized to fit into {own.size} ({own.interpolation}) and filled up with the mean, {how}"
    resized = "both sides are resized" if own.crop_mode == "squash" else "the shorter side is resized"
    return f"{resized} ({own.interpolation}), the centre {own.size} is cut, {how}"


def _extra(description: StudentDescription) -> str:
    if not (description.student.kind == "full" and (description.student.model or "").startswith("timm:")):
        return ""
    name = (description.student.model or "").removeprefix("timm:")
    return (
        f"\n`{TIMM}` is a plain timm `state_dict`:\n\n```python\nmodel = timm.create_model({name!r}, num_classes=0)\n"
        f'model.load_state_dict(safetensors.torch.load_file("{TIMM}"))\n```\n'
    )


def _checked(checked: Checked) -> str:
    parts = [f"{name} of the base {value:.4f} (limit {checked.base_limit:.4f})" for name, value in checked.base.items()]
    parts += [
        f"{name} of the student {value:.4f} (limit {checked.student_limit:.4f})"
        for name, value in checked.student.items()
    ]
    return ", ".join(parts)


def _scores(trained: Trained) -> str:
    summary = trained.run.summary()
    scores: Mapping[str, Any] | None = summary.get("validation") if summary else None
    if not summary or not scores or not summary["validation_rows"]:
        return ""
    keys = [f"r2_{output}" for output in trained.config.outputs]
    head = f"\n| R2 on {summary['validation_rows']:,} validation rows | {' | '.join(k[3:] for k in keys)} |\n"
    rows = [*scores["teachers"].items(), ("the base itself", scores["base"])]
    body = "\n".join(f"| {name} | {' | '.join(_figure(values.get(key)) for key in keys)} |" for name, values in rows)
    return f"{head}|{'---|' * (len(keys) + 1)}\n{body}\n"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _weights(description: StudentDescription) -> str:
    spec = description.base
    if description.student.kind in ("parallel", "full"):
        return "The student's whole model is in this folder, with what it began from."
    if description.bundled:
        return f"The base's weights are in this folder, as `{BASE}`."
    return (
        f"The base's weights are not in this folder: `load_student` takes them from {spec.weights or 'the hub'} and "
        f"compares their digest, {spec.weights_digest}."
    )
