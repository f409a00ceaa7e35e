"""Model cards, from the templates beside this folder, and the Hub's files of results.

A card that was made here says so in its last line, with a checksum of the text: it may be replaced by a newer one as
long as no person has changed it, and never afterwards.
"""

from hf_coar.storage.cards.attributions import attributions_card
from hf_coar.storage.cards.edited import edited_model_card
from hf_coar.storage.cards.pieces import hub_id, is_generated, may_be_replaced, model_id, public_name, short_name
from hf_coar.storage.cards.results import RESULTS, check_evaluation, evaluation_entries, evaluation_yaml

__all__ = [
    "RESULTS",
    "attributions_card",
    "check_evaluation",
    "edited_model_card",
    "evaluation_entries",
    "evaluation_yaml",
    "hub_id",
    "is_generated",
    "may_be_replaced",
    "model_id",
    "public_name",
    "short_name",
]
