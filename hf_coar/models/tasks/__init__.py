"""Tasks: what a head is for, how it is run, and which outputs of it can be explained; one file a kind of head.

`of(model)` tells the task of a model by the class of its head, `names()` lists them all, `register` adds one.
"""

from hf_coar.models.tasks import classification, generation, images, language, losses, pairs, spans
from hf_coar.models.tasks.base import AUTO, TASKS, Task, bind, explain, get, names, of, register
from hf_coar.models.tasks.generation import sampling
from hf_coar.models.tasks.graphs import nodes
from hf_coar.models.tasks.language import encode_answers

FAMILIES = (classification, language, spans, images, pairs, generation, losses)  # each registers its tasks

__all__ = [
    "AUTO",
    "TASKS",
    "Task",
    "bind",
    "encode_answers",
    "explain",
    "get",
    "names",
    "nodes",
    "of",
    "register",
    "sampling",
]
