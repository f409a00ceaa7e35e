"""Components: what they are (`groups`), where they are (`rules`), finding them in a model (`discovery`)."""

from hf_coar.components.discovery import find_components
from hf_coar.components.groups import GRANULARITIES, Component, Components, Group, Skipped
from hf_coar.components.positions import mark
from hf_coar.components.rules import Matrix, registered, rule, rule_of
from hf_coar.components.stand_ins import StandIn

__all__ = [
    "GRANULARITIES",
    "Component",
    "Components",
    "Group",
    "Matrix",
    "Skipped",
    "StandIn",
    "find_components",
    "mark",
    "registered",
    "rule",
    "rule_of",
]
