"""The tasks by name, and the loader for a user's own file. A new task is one file and one line in ``TASKS``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from normwise.lab import user_file
from normwise.lab.errors import LabError, unknown
from normwise.lab.tasks.base import Batch, Task
from normwise.lab.tasks.bn_finetune import BnFinetune
from normwise.lab.tasks.bn_leak import BnLeak
from normwise.lab.tasks.bn_mnist import BnMnist
from normwise.lab.tasks.charlm_deep import DEEP
from normwise.lab.tasks.charlm_ragged import CharLmRagged
from normwise.lab.tasks.charlm_recurrent import CharLmGru, CharLmLstm
from normwise.lab.tasks.charlm_transformer import CharLmTransformer
from normwise.lab.tasks.cnn import Cnn
from normwise.lab.tasks.deep_mlp import DeepMlp
from normwise.lab.tasks.dropout_bn import DropoutAfterBn, DropoutBeforeBn
from normwise.lab.tasks.ln_mnist import LnMnist
from normwise.lab.tasks.lstm import Lstm
from normwise.lab.tasks.mlp import Mlp
from normwise.lab.tasks.mlp_bad_start import MlpBadStart
from normwise.lab.tasks.norm_only import NormsAlone, NormsAndHead, WeightsAlone, WeightsAndHead
from normwise.lab.tasks.on_idx import OnIdx
from normwise.lab.tasks.plasticity import Plasticity, PlasticityDecay
from normwise.lab.tasks.precise_bn import PreciseBn
from normwise.lab.tasks.rbn_pmnist import RbnPmnist
from normwise.lab.tasks.rnn import Rnn
from normwise.lab.tasks.smooth import Smooth
from normwise.lab.tasks.transformer import Transformer

__all__ = [
    "BUILT_IN",
    "CLAIM_TASKS",
    "GROUPS",
    "PAPERS",
    "TASKS",
    "TEXTS",
    "VARIANTS",
    "Batch",
    "LoadedTask",
    "Task",
    "is_own",
    "load_task",
]

TASKS: dict[str, Callable[[], Task]] = {
    "mlp": Mlp,
    "mlp-bad-start": MlpBadStart,
    "cnn": Cnn,
    "rnn": Rnn,
    "lstm": Lstm,
    "transformer": Transformer,
    "charlm-lstm": CharLmLstm,
    "charlm-gru": CharLmGru,
    "charlm-transformer": CharLmTransformer,
    "charlm-ragged": CharLmRagged,
}

CLAIM_TASKS: dict[str, Callable[[], Task]] = {
    "bn-finetune": BnFinetune,
    "bn-leak": BnLeak,
    "deep-mlp": DeepMlp,
    "dropout-after-bn": DropoutAfterBn,
    "dropout-before-bn": DropoutBeforeBn,
    "norms-alone": NormsAlone,
    "norms-and-head": NormsAndHead,
    "plasticity": Plasticity,
    "plasticity-decay": PlasticityDecay,
    "precise-bn": PreciseBn,
    "smooth": Smooth,
    "weights-alone": WeightsAlone,
    "weights-and-head": WeightsAndHead,
    **DEEP,
}
"""Set-ups that one claim is about (``lab/claims``): had by name like the others, and in no list of them."""

BUILT_IN = TASKS | CLAIM_TASKS

VARIANTS = ("mlp-bad-start", "charlm-ragged")
"""Of ``TASKS`` those that ask one question about another task: a long report shows them with the set-ups of claims."""

TEXTS = ("charlm-lstm", "charlm-gru", "charlm-transformer", "charlm-ragged")
"""The tasks on text: each can be had on a file of the user's."""

GROUPS = {"charlm": ("charlm-lstm", "charlm-gru", "charlm-transformer")}
"""Names for several tasks at once."""

PAPERS: dict[str, type[OnIdx]] = {"bn-mnist": BnMnist, "ln-mnist": LnMnist, "rbn-pmnist": RbnPmnist}
"""The set-ups of papers at their size, on a folder of the user's (``lab/reproduce.py``)."""


def is_own(reference: str) -> bool:
    """Whether it is a file of the user's that defines the task, not one that a built-in task reads."""
    return ".py" in reference and reference.partition("@")[0] not in (*TEXTS, *PAPERS)


class LoadedTask(NamedTuple):
    """A task and what stands for the code that defines it: the sha256 of its file or files, with what a user's imports
    from its own folder."""

    task: Task
    source: str


@functools.cache
def load_task(reference: str) -> LoadedTask:
    """The task that ``reference`` names. Loaded once a process.

    It is a built-in's name; or ``NAME@PATH`` for one of ``TEXTS`` or ``PAPERS`` on the file or folder at PATH; or
    ``FILE.py:function`` for a user's own, where the function takes no arguments and returns a ``Task``.

    Raises:
        LabError: no such task, file or function; a name for several tasks; the function returns something else; the
            name is a built-in's.
    """
    name, at, place = reference.partition("@")
    if at and (name in TEXTS or name in PAPERS):
        made: Task = (PAPERS | TASKS)[name](path=place)  # type: ignore[call-arg]
        return LoadedTask(made, user_file.sha256(*_files(type(made))))
    if not is_own(reference):
        if reference in GROUPS:
            raise LabError(f"{reference!r} stands for several tasks: name one of {', '.join(GROUPS[reference])}")
        if reference not in BUILT_IN:
            raise unknown("task", reference, [*TASKS, *GROUPS])
        task = BUILT_IN[reference]()
        return LoadedTask(task, user_file.sha256(*_files(type(task))))
    path, function = user_file.parsed(reference, "examples/custom_task.py:make_task")
    task = _made(path, function)
    if task.name in BUILT_IN or task.name in PAPERS:
        raise LabError(f"{reference}: the name {task.name!r} belongs to a built-in task; give yours another name")
    return LoadedTask(task, f"{user_file.source_of(path)}:{function}")


def _made(path: Path, function: str) -> Task:
    task = user_file.called(path, function)
    if not isinstance(task, Task):
        raise LabError(f"{path}:{function} returned {type(task).__name__}, expected a normwise.lab.tasks.Task")
    _check_methods(task, f"{path}:{function}")
    return task


def _check_methods(task: Task, reference: str) -> None:
    """Raises LabError where a method of the user's cannot be called as the lab calls it."""
    for name, method in inspect.getmembers(Task, inspect.isfunction):
        if name.startswith("_") or getattr(type(task), name) is method:
            continue
        given = [one for one in inspect.signature(method).parameters if one != "self"]
        try:
            inspect.signature(getattr(task, name)).bind(*given)
        except (TypeError, ValueError) as error:
            raise LabError(
                f"{reference}: {name} of {type(task).__name__} is called as task.{name}({', '.join(given)}): {error}"
            ) from None


def _files(task: type[Task]) -> list[Path]:
    """The files of a built-in task's class and of those that it extends, up to ``Task``, each once."""
    classes = [c for c in task.__mro__ if issubclass(c, Task) and c is not Task]
    return [Path(file) for file in dict.fromkeys(map(inspect.getfile, classes))]
