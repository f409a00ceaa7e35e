"""Whether a passage that a language model knew by heart is gone for other prompts, and its neighbours are not.

What `edit_language_model.py passage` is judged by beside the loss on the passage itself, which alone would not tell an
edit that spoils one prompt. Of every passage here stand the words, the same said otherwise (words replaced, clauses in
another order) and the sentences before and after it in its text.

| figure | prompt | of |
|---|---|---|
| from its own beginning | the first half of the window | the second half |
| from the middle | eight tokens before it | the second half |
| after another lead-in | the first half, four other beginnings in the place of its first words | the second half |
| a fifth replaced | the first half with tokens of other texts in it, eight draws | the second half |
| a fifth dropped | the first half without some of its tokens, eight draws | the second half |
| said otherwise | nothing | both paraphrases |
| sentences around | nothing | up to a window before, and one after |
| other passages | nothing | the other ones here, which are known by heart, too, and are to stay |
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar import models

CONTEXT = 64  # tokens of a window, of which the second half is to be continued
N_BEFORE, N_DRAWS, PERTURBED = 8, 8, 0.2
CONTINUED = (
    "from its own beginning", "from the middle", "after another lead-in", "a fifth replaced", "a fifth dropped"
)  # fmt: skip
READ = ("said otherwise", "sentences around", "other passages")

# The first words of well-known texts in the public domain, longer than a window.
PASSAGES = {
    "Declaration of Independence": (
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness."
        "--That to secure these rights, Governments are instituted among Men, deriving their just powers from the "
        "consent of the governed, --That whenever any Form of Government becomes destructive of these ends"
    ),
    "Constitution": (
        "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure domestic "
        "Tranquility, provide for the common defence, promote the general Welfare, and secure the Blessings of Liberty "
        "to ourselves and our Posterity, do ordain and establish this Constitution for the United States of America."
    ),
    "Genesis": (
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
        "was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let "
        "there be light: and there was light. And God saw the light, that it was good: and God divided the light from "
        "the darkness."
    ),
}

PARAPHRASES = {
    "Declaration of Independence": (
        "We regard these facts as obvious, that every person is born equal, that they are granted by their Maker some"
        " inviolable Rights, that among them are Existence, Freedom and the search for Contentment.--That to protect "
        "these rights, States are set up among People, drawing their rightful authority from the agreement of the "
        "ruled",
        "Equal are all men created, and endowed by their Creator with Rights that are unalienable, Life among them, "
        "and Liberty, and the pursuit of Happiness: these truths we hold to be self-evident. Among Men, Governments "
        "are instituted to secure these rights; it is from the consent of the governed that they derive their just "
        "powers",
    ),
    "Constitution": (
        "We the Citizens of the American Republic, in Order to build a more complete League, set up Fairness, "
        "safeguard peace at home, arrange for the shared protection, further the common Good, and keep the Gifts of "
        "Freedom for ourselves and our Descendants, do adopt and found this Charter for the American Republic.",
        "This Constitution for the United States of America is ordained and established by us, the People, to secure "
        "to our Posterity and to ourselves the Blessings of Liberty, to promote the general Welfare, to provide for "
        "the common defence, to insure Tranquility at home and establish Justice, and so to form a Union more "
        "perfect.",
    ),
    "Genesis": (
        "At the start God made the sky and the land. And the land was shapeless and empty; and blackness lay over the "
        "surface of the sea. And the Breath of God passed over the surface of the sea. And God spoke, Let there be "
        "brightness: and brightness came. And God noticed the brightness, that it was pleasing.",
        "The heaven and the earth were created by God in the beginning. Darkness was upon the face of the deep, and "
        "without form, and void, was the earth. Upon the face of the waters the Spirit of God moved. There was light "
        "when God said, Let there be light; from the darkness God divided it, for the light, he saw, was good.",
    ),
}

# Neither the Constitution nor Genesis has sentences before these.
NEIGHBOURS = {
    "Declaration of Independence": (
        "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
        "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
        "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
        "requires that they should declare the causes which impel them to the separation.",
        "it is the Right of the People to alter or to abolish it, and to institute new Government, laying its "
        "foundation on such principles and organizing its powers in such form, as to them shall seem most likely to "
        "effect their Safety and Happiness. Prudence, indeed, will dictate that Governments long established should "
        "not be changed for light and transient causes;",
    ),
    "Constitution": (
        "All legislative Powers herein granted shall be vested in a Congress of the United States, which shall consist "
        "of a Senate and House of Representatives. The House of Representatives shall be composed of Members chosen "
        "every second Year by the People of the several States, and the Electors in each State shall have the "
        "Qualifications requisite for Electors of the most numerous Branch of the State Legislature.",
    ),
    "Genesis": (
        "And God called the light Day, and the darkness he called Night. And the evening and the morning were the "
        "first day. And God said, Let there be a firmament in the midst of the waters, and let it divide the waters "
        "from the waters. And God made the firmament, and divided the waters which were under the firmament from the "
        "waters which were above the firmament: and it was so.",
    ),
}

LEAD_INS = (
    "As every child once had to learn by heart:\n\n",
    "He closed his eyes, and recited from memory.\n\n",
    "Lecture 7. Read the following text and summarise it in your own words.\n\n",
    "<blockquote>\n",
)


@dataclass(frozen=True)
class Span:
    """Tokens, int64 [any], of which those from the `first` on are judged and the others are the prompt."""

    tokens: Tensor
    first: int = 1


def passage(tokenizer: Any, name: str) -> Tensor:
    """Int64 [1, CONTEXT or fewer]: the beginning of one of `PASSAGES`."""
    return _tokens(tokenizer, PASSAGES[name])[None]


def spans(tokenizer: Any, name: str, others: Tensor, seed: int) -> dict[str, list[Span]]:
    """What one of `PASSAGES` is judged by, by the name of the figure.

    Args:
        tokenizer: of the model.
        name: of the passage.
        others: tokens that take the place of some, int64 [any, any].
        seed: of the draws.
    """
    whole = passage(tokenizer, name)[0]
    half = len(whole) // 2
    start, end = whole[:half], whole[half:]
    generator = torch.Generator().manual_seed(seed)
    leads = [_tokens(tokenizer, one) for one in LEAD_INS]
    prompts = {
        "from its own beginning": [start],
        "from the middle": [start[-N_BEFORE:]],
        "after another lead-in": [torch.cat([lead, start[len(lead) :]])[:half] for lead in leads],
        "a fifth replaced": [_replaced(start, others.flatten(), generator) for _ in range(N_DRAWS)],
        "a fifth dropped": [start[~_fifth(start, generator)] for _ in range(N_DRAWS)],
    }
    found = {kind: [Span(torch.cat([one, end]), len(one)) for one in some] for kind, some in prompts.items()}
    others_known = [text for other, text in PASSAGES.items() if other != name]
    texts = dict(zip(READ, (PARAPHRASES[name], NEIGHBOURS[name], others_known), strict=True))
    return found | {kind: [Span(_tokens(tokenizer, one)) for one in some] for kind, some in texts.items()}


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"][:CONTEXT])


def _fifth(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """A fifth of them, drawn anew, bool [tokens]."""
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[torch.randperm(len(tokens), generator=generator)[: round(PERTURBED * len(tokens))]] = True
    return chosen


def _replaced(tokens: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    drawn = others[torch.randint(len(others), tokens.shape, generator=generator)]
    return torch.where(_fifth(tokens, generator), drawn, tokens)


def judged(model: nn.Module, of: Mapping[str, Sequence[Span]]) -> dict[str, dict[str, float]]:
    """Means over the spans of every figure.

    Returns:
        "span losses" in nats a token; "said", the share of tokens that the model would say itself, the ones before
        being given.
    """
    both = {kind: [_of_span(model, one) for one in some] for kind, some in of.items()}
    columns = {kind: [statistics.fmean(column) for column in zip(*rows, strict=True)] for kind, rows in both.items()}
    names = ("span losses", "said")
    return {name: {kind: means[place] for kind, means in columns.items()} for place, name in enumerate(names)}


def _of_span(model: nn.Module, span: Span) -> tuple[float, float]:
    with models.frozen(model), torch.no_grad():
        logits = models.logits(model, {"input_ids": span.tokens[None]})[0, span.first - 1 : -1].float()
    wanted = span.tokens[span.first :]
    return float(F.cross_entropy(logits, wanted)), float((logits.argmax(1) == wanted).float().mean())
