"""What is compared: each variant answers one question about the method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.research.variant import Variant

BASELINE = "last token"
PROMPTED = "last token, prompt"  # the fair baseline: what the BToks are initialised as, in plain text


@dataclass(frozen=True)
class Compared:
    """One way to train an embedder.

    Args:
        variant: The model and its loss, as on the command line of `recipes.compare`.
        condensation_first: Share of the steps that train the condensation loss alone, before the ranking begins.
        unlabelled: Whether these steps read documents without queries, each generated from its own BToks.
    """

    variant: str
    condensation_first: float = 0.0
    unlabelled: bool = False

    def build(self, steps: int) -> Variant:
        """The variant for a training of so many steps."""
        variant = Variant.parse(self.variant)
        if self.condensation_first and not self.unlabelled:
            return replace(variant, options={**variant.options, "condensation_warmup": self.first_steps(steps)})
        return variant

    def first_steps(self, steps: int) -> int:
        """Steps of the first phase."""
        return round(self.condensation_first * steps)

    @property
    def has_condensation(self) -> bool:
        """Whether it trains with the condensation loss."""
        variant = Variant.parse(self.variant)
        return variant.pooling == "btok" and variant.options.get("condensation_weight", 0.2) > 0


_EOS = "btok:init=eos"  # was the default of `build_model` when most variants were run
_PROMPT = "btok:num_btoks=6,init= This means in one word:"  # six tokens of most vocabularies
_NEWLINE = "btok:init=newline"
_TOPIC = "btok:init=prompt"  # " The topic is the", the default; newlines where the vocabulary lacks these words
_OPENED = "btok:opened=true,init=prompt"  # the same in the assistant's turn
_TEXT = "prompt= The topic is the"
_FIXED = "train_btoks=false"  # the token embeddings of the BToks stay as they are initialised
_END = f"{_EOS},num_btoks=1,readout=last,{_FIXED}"

VARIANTS = {
    # What others do: the last token, alone or behind a prompt in plain text, and means.
    BASELINE: Compared("lasttoken"),
    "last token, opened turn": Compared("lasttoken:opened=true"),  # of the assistant
    PROMPTED: Compared(f"lasttoken:{_TEXT}"),
    "last token, opened turn, prompt": Compared(f"lasttoken:opened=true,{_TEXT}"),
    "mean of the prompt": Compared(f"mean:{_TEXT}"),
    "mean of the prompt, opened turn": Compared(f"mean:opened=true,{_TEXT}"),
    "mean": Compared("mean"),
    "end token": Compared(f"{_END},condensation_weight=0"),  # one EOS behind every input, untrained
    "end token, condensation 0.2": Compared(f"{_END},condensation_weight=0.2"),
    # Four tokens without the condensation loss: how they are read, and whether they have to be learnt.
    "BToks": Compared(f"{_EOS},condensation_weight=0"),
    "BToks, last": Compared(f"{_EOS},readout=last,condensation_weight=0"),
    "BToks, rows untrained": Compared(f"{_EOS},{_FIXED},condensation_weight=0"),
    "BToks, rows x10": Compared(f"{_EOS},row_lr=10,condensation_weight=0"),
    # What they are initialised as.
    "newline start": Compared(f"{_NEWLINE},condensation_weight=0"),
    "newline start, last": Compared(f"{_NEWLINE},readout=last,condensation_weight=0"),
    "newline start, condensation 0.2": Compared(f"{_NEWLINE},condensation_weight=0.2"),
    "newline": Compared(f"{_NEWLINE},num_btoks=1,readout=last,{_FIXED},condensation_weight=0"),
    "topic start": Compared(f"{_TOPIC},condensation_weight=0"),
    "topic start, last": Compared(f"{_TOPIC},readout=last,condensation_weight=0"),
    "topic start, rows untrained": Compared(f"{_TOPIC},{_FIXED},condensation_weight=0"),
    "topic start, condensation 0.2": Compared(f"{_TOPIC},condensation_weight=0.2"),  # all defaults
    "topic start, condensation 1": Compared(f"{_TOPIC},condensation_weight=1"),
    # Targets as long as the texts are, where the default ends them after 64 tokens.
    "topic start, whole targets": Compared(f"{_TOPIC},condensation_weight=0.2,max_target_tokens=320"),
    "topic start, no mask": Compared(f"{_TOPIC},route=unmasked,condensation_weight=0.2"),
    "topic start, K = 1": Compared(f"{_TOPIC},num_btoks=1,condensation_weight=0.2"),
    "topic start, K = 16": Compared(f"{_TOPIC},num_btoks=16,condensation_weight=0.2"),
    "topic start, condensation first": Compared(f"{_TOPIC},condensation_weight=0.2", condensation_first=1 / 3),
    "topic, opened turn": Compared(f"{_OPENED},condensation_weight=0"),
    "topic, opened turn, last": Compared(f"{_OPENED},readout=last,condensation_weight=0"),
    "topic, opened turn, rows untrained": Compared(f"{_OPENED},{_FIXED},condensation_weight=0"),
    "topic, opened turn, condensation 0.2": Compared(f"{_OPENED},condensation_weight=0.2"),
    "prompt start": Compared(f"{_PROMPT},condensation_weight=0"),
    "prompt start, last": Compared(f"{_PROMPT},readout=last,condensation_weight=0"),
    "prompt start, rows untrained": Compared(f"{_PROMPT},readout=last,{_FIXED},condensation_weight=0"),  # PromptEOL
    "prompt start, condensation 0.2": Compared(f"{_PROMPT},condensation_weight=0.2"),
    # The condensation loss: its weight, its mask, its route, the number of tokens.
    "BToks, condensation 0.05": Compared(f"{_EOS},condensation_weight=0.05"),
    "BToks, condensation 0.2": Compared(f"{_EOS},condensation_weight=0.2"),  # the default of `BTokLoss`
    "BToks, condensation 1": Compared(f"{_EOS},condensation_weight=1"),
    "BToks, last, condensation 0.2": Compared(f"{_EOS},readout=last,condensation_weight=0.2"),
    "no mask": Compared(f"{_EOS},route=unmasked,condensation_weight=0.2"),
    "prefix route": Compared(f"{_EOS},route=prefix,condensation_weight=0.2"),
    "K = 1": Compared(f"{_EOS},num_btoks=1,condensation_weight=0.2"),
    "K = 16": Compared(f"{_EOS},num_btoks=16,condensation_weight=0.2"),
    # Four tokens for the condensation loss, a fifth for the ranking (LaME).
    "further token": Compared(f"{_EOS},num_btoks=5,condensation_btoks=4,readout=last,condensation_weight=0.2"),
    # A third of the steps for the condensation loss alone, on the pairs or on documents without queries.
    "condensation first": Compared(f"{_EOS},condensation_weight=0.2", condensation_first=1 / 3),
    "unlabelled first": Compared(f"{_EOS},condensation_weight=0", condensation_first=1 / 3, unlabelled=True),
}
# What an adopter asks first; the rest are controls.
HEADLINES = [BASELINE, "mean", "end token", "BToks", "BToks, last", "newline start", "BToks, condensation 0.2"]


def current_name(name: str) -> str:
    """Today's name of a variant; older runs call the condensation loss `term` and the newline token `line break`."""
    return name.replace("term", "condensation").replace("line break", "newline")
