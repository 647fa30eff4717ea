"""What people see of a run: progress and TensorBoard while it lasts, files and warnings after.

The words of all of them are those of `losses.py`.
"""

from lora_runtime.training.report.files import UnitResult, write_report
from lora_runtime.training.report.progress import say, show_data, show_progress
from lora_runtime.training.report.tensorboard import check_tensorboard, write_curves

__all__ = [
    "UnitResult",
    "check_tensorboard",
    "say",
    "show_data",
    "show_progress",
    "write_curves",
    "write_report",
]
