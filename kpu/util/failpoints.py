"""Named points at which a test can kill or hold the process.

`KPU_FAILPOINT=<name>` arms one point; `KPU_FAILPOINT_SKIP=<n>` lets each process pass it n times first.
`KPU_FAILPOINT_ACTION` is `kill` (SIGKILL this process; the default) or `hold` (wait, so that somebody outside kills
whichever process they like). `KPU_FAILPOINT_MARK` names a file that is created, with the number of the process in it,
when the point fires; with it the point fires once in all processes together, and a hold ends when that file is emptied.
Unset, a point costs one dictionary lookup.
"""

import itertools
import os
import signal
import time
from typing import Final

NAMES: Final = (
    "plan.samples",  # the sample table is written, the plan is not
    "plan.published",  # the plan is published, no teacher is
    "teacher.statistics",  # calibration is published, the arrays are not
    "teacher.arrays",  # the arrays are published, the teacher is not
    "teacher.published",  # the teacher is published, no unit is committed
    "unit.computed",  # features are encoded, nothing is written
    "publish.temporary",  # a temporary file is half written
    "publish.synced",  # the temporary is synced, the final name is not there
    "publish.linked",  # the final name is there, its folder is not synced, the temporary still exists
    "publish.done",  # an object is fully published
    "unit.images",  # the images record is committed, the teacher's is not
    "unit.shards",  # every shard of a teacher is published, its commit record is not
    "unit.committed",  # the commit record is published
    "run.finished",  # every unit is committed, the run's own record is not written
)
"""Those of an extraction, in the order in which a run passes them."""

TRAINING: Final = (
    "train.step",  # a training step is done, and logged where it is due
    "train.checkpoint",  # a checkpoint is due, nothing of it is written
    "train.checkpointed",  # it exists, older ones are not removed yet
)
"""Those of a training."""


_HITS = itertools.count()  # of the armed point, in this process


def failpoint(name: str) -> None:
    """Die or wait here if this point is armed."""
    if os.environ.get("KPU_FAILPOINT") != name:
        return
    if next(_HITS) < int(os.environ.get("KPU_FAILPOINT_SKIP", "0")):
        return
    mark = os.environ.get("KPU_FAILPOINT_MARK")
    if mark and not _make(mark):
        return
    if os.environ.get("KPU_FAILPOINT_ACTION", "kill") == "hold":
        while not mark or os.path.getsize(mark):  # noqa: PTH202
            time.sleep(0.01)
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _make(mark: str) -> bool:
    """Create the file with this process's number; False if it exists already."""
    try:
        descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)
    return True
