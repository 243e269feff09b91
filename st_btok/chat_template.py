"""The chat template of a BTok checkpoint: guard and limit the text, render the input, append the bottleneck tokens.

Everything a saved model needs lives in this Jinja text, so a plain `SentenceTransformer(path)` has it too. It is put
together from the files of `templates/`, in the order in which an input passes them:

* `quick`: short text without the first character of any control token's name goes straight to the backbone's own
  template: most inputs do, which keeps them fast;
* `look`: is it text for sentence-transformers too?
* `unwrap`: a chat conversation in one batch with inputs of other kinds, which sentence-transformers (6.2) wraps in a
  part that templates skip, is unwrapped; if it holds media, whose pixels are lost by then, it is refused;
* `guard`: text never becomes a control token: a control token's name inside an input's strings (`<|btok_0|>`,
  `<|image_pad|>`, `<|im_end|>`, ...) gets a space behind its first character, so it stays readable and is tokenised
  as words. Without this a text that quotes a BTok's name would be pooled (measured), and one that quotes an image
  placeholder raises an error in the processor. Text without such names is unchanged to the letter;
* `shorten`: no more than `max_chars` characters of text are rendered, which bounds the work. The exact limit of an
  input that is text alone is sentence-transformers' own: it cuts by tokens and writes the template's tail, closing
  and BToks, back over the end;
* `adapt`, where the backbone's own template needs it: instructions for one without a system role, text as parts;
* the backbone's own template, on one date for ever: see `pin_date`;
* `bound`: what sentence-transformers does not cut so, above all inputs with media, is kept within `max_tokens` by an
  upper bound: text gives way, media, instructions (system turns) and BToks never, and what can't fit is refused;
* the BToks, after the last turn.

The limits are saved under `processing_kwargs["chat_template"]` (see `limits.py`) and can be overridden per `encode`
call; rendered without them, as by bare transformers, nothing is cut.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from st_btok.tokens import BTOK_PATTERN, btok_tokens

# What a backbone's own template can't take: instructions (a system turn), a turn's text as a string, or as parts.
Lack = Literal["system", "strings", "parts"]
# The date that templates write. Llama 3.1 and 3.2 fall back to it where there is no clock.
DATE = datetime(2024, 7, 26)  # noqa: DTZ001  (a day, nowhere)
# Where `adapt` would change nothing, as Jinja.
_UNADAPTED: dict[Lack, str] = {
    "system": "\"'role': 'system'\" not in shown",
    "strings": "not messages | map(attribute='content') | select('string') | list",
    "parts": "\"'type': 'text'\" not in shown",
}


def append_btoks(
    chat_template: str, num_btoks: int, control_tokens: Sequence[str] = (), lacks: Collection[Lack] = ()
) -> str:
    """Make a chat template end with the K bottleneck tokens; a template that has them is returned as it is.

    Args:
        chat_template: A Jinja chat template in the form that transformers uses.
        num_btoks: K, at least 1.
        control_tokens: Further names that an input's text must not turn into tokens; see `control_tokens` in
            `tokens.py`. The K bottleneck tokens are always among them.
        lacks: What the template can't take. Inputs are then rewritten before they come to it.

    Returns:
        The template with the guard and the limits around it and the K tokens behind the last turn.

    Raises:
        ValueError: If the template already names another number of bottleneck tokens.
    """
    names = btok_tokens(num_btoks)
    present = [match.group(0) for match in BTOK_PATTERN.finditer(chat_template)]
    if present == names:
        return chat_template
    if present:
        raise ValueError(
            f"the chat template already holds the bottleneck tokens {present}, but {num_btoks} were asked for. "
            f"Pass num_btoks={len(set(present))}, or start from the backbone's own template."
        )
    # A request to an engine may ask to open the assistant's turn. Nothing is generated here, so it stays shut:
    # opened, it stands between the input and the BToks and changes the embedding (cosine 0.94), without an error.
    chat_template = f"{{%- set add_generation_prompt = false -%}}{chat_template}"
    control = [*names, *control_tokens]
    adapt = f"{{%- set lacks = {sorted(lacks)} -%}}{template_part('adapt')}" if lacks else ""
    return "".join(
        [
            pin_date(chat_template),
            _quick(control, lacks),
            # A macro, because `bound` renders an input that is too long a second time.
            f"{{%- macro own(messages) -%}}{chat_template}{{%- endmacro -%}}\n",
            f"{{%- macro turns(messages) -%}}{adapt}{{{{- own(messages) -}}}}{{%- endmacro -%}}\n",
            "{%- if quick -%}{{- own(messages) -}}{%- else -%}\n",
            _control(control),
            *map(template_part, ("look", "unwrap", "guard", "shorten")),
            "{%- if max_chars is defined and max_chars is not none -%}\n"
            "{{- shorten(messages, max_chars) -}}{%- set messages = cut.messages -%}\n"
            "{%- endif -%}\n",
            "{%- if look.soft or max_tokens is not defined or max_tokens is none or max_chars is none -%}\n"
            "{{- turns(messages) -}}\n"
            "{%- else -%}\n",
            template_part("bound"),
            "{%- endif -%}\n{%- endif -%}\n",
            f"{{{{- '{''.join(names)}' -}}}}",
        ]
    )


def template_part(name: str) -> str:
    """A file of `templates/` without its comments, which every saved model would carry."""
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return re.sub(r"\{#-.*?-#\}\n", "", text, flags=re.DOTALL)


def pin_date(chat_template: str) -> str:
    """A `strftime_now` of the template's own, fixed to `DATE`: an input's embedding must not change with the day.

    Empty for a template that asks for no date.
    """
    if "strftime_now" not in chat_template:
        return ""
    directives = [f"%{flag}{letter}" for letter in "aAbBdmyYHIMSfpjUWwuGV" for flag in ("", "-")]
    replaced = "".join(f".replace('{name}', '{DATE.strftime(name)}')" for name in directives)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro -%}}\n"


def _quick(names: Sequence[str], lacks: Collection[Lack]) -> str:
    """The question whether an input needs no more than the backbone's own template, as Jinja."""
    starts = sorted({name[0] for name in names})
    # What Python would write as an escape can't be looked for in what it writes.
    sure = all(start.isascii() and start.isprintable() for start in starts)
    conditions = [f"{ascii(start)} not in shown" for start in starts] if sure else ["false"]
    conditions += [_UNADAPTED[lack] for lack in lacks]
    condition = " and ".join(conditions)
    return template_part("quick").replace("set quick = STARTS", f"set quick = {condition}")


def _control(names: Sequence[str]) -> str:
    """The names of control tokens as Jinja variables, in two pieces each: see `guard.jinja`."""
    rests: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        rests.setdefault(name[:2], []).append(name[2:])
    # `ascii` writes string literals that Jinja reads as Python does.
    control = ", ".join(f"{ascii(head)}: [{', '.join(map(ascii, rest))}]" for head, rest in rests.items())
    longest = max(map(len, names))
    return f"{{%- set control = {{{control}}} -%}}{{%- set longest = {longest} -%}}\n"


def plain_template(image: str = "", video: str = "", audio: str = "") -> str:
    """The authors' layout without chat turns: each medium on a line of its own, then instruction and text.

    An instruction (system message, sentence-transformers' `prompt`) is put directly before the text. One newline ends
    an input that has media or an instruction; a bare text stays as it is, an empty one is a space. These are the texts
    that the release gives to its processor for the data sets of MMEB-V2: queries and media end in a newline, bare text
    candidates do not (its processor, `data/processors/qwen2_vl.py`, adds none). `append_btoks` then adds the BToks.

    Args:
        image: What stands for one image in the backbone's own template, such as
            `<|vision_start|><|image_pad|><|vision_end|>`; empty for a text-only backbone.
        video: The same for a video.
        audio: The same for a sound.

    Returns:
        A Jinja chat template without bottleneck tokens.
    """
    media = {"image": image, "video": video, "audio": audio}
    for name, value in media.items():
        if re.search(r"['\\\n]", value):
            raise ValueError(f"the {name} placeholder must not hold quotes, backslashes or newlines, got {value!r}")
    placeholders = ", ".join(f"'{name}': '{value}'" for name, value in media.items())
    return f"{{%- set placeholders = {{{placeholders}}} -%}}\n{template_part('plain')}"
