"""Named points at which a test can kill or hold the process.

`KPU_FAILPOINT=<name>` arms one point. `KPU_FAILPOINT_ACTION` is `kill` (SIGKILL this process; the default) or `hold`
(wait, so that somebody outside kills whichever process they like). `KPU_FAILPOINT_MARK` names a file that is created
when the point fires; with it the point fires once in all processes together. Unset, a point costs one dictionary
lookup.
"""

import os
import signal
import time
from typing import Final

NAMES: Final = (
    "plan.samples",  # the sample table is written, the plan is not
    "plan.published",  # the plan stands, no teacher does
    "teacher.statistics",  # calibration is published, the arrays are not
    "teacher.arrays",  # the arrays are published, the teacher is not
    "teacher.published",  # the teacher stands, no unit does
    "unit.computed",  # features are encoded, nothing is written
    "publish.temporary",  # a temporary file is half written
    "publish.synced",  # the temporary is synced, the final name is not there
    "publish.linked",  # the final name is there, its folder is not synced, the temporary still stands
    "publish.done",  # an object is fully published
    "unit.images",  # the images record is committed, the teacher's is not
    "unit.shards",  # every shard of a teacher is published, its commit record is not
    "unit.committed",  # the commit record stands
    "run.finished",  # every unit is committed, the run's own record is not written
)


def failpoint(name: str) -> None:
    """Die or wait here if this point is armed."""
    if os.environ.get("KPU_FAILPOINT") != name:
        return
    mark = os.environ.get("KPU_FAILPOINT_MARK")
    if mark:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if os.environ.get("KPU_FAILPOINT_ACTION", "kill") == "hold":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)
