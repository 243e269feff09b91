"""The chat template of a BTok checkpoint: guard and shorten the text, render the input, append the bottleneck tokens.

Everything a saved model needs lives in this Jinja text, so a plain `SentenceTransformer(path)` has it too:

* the BToks come after the last turn of whatever template the backbone has;
* `max_chars`, `image_chars`, `video_chars` and `audio_chars` (saved under `processing_kwargs["chat_template"]`,
  overridable per `encode` call) bound the text of an input: `max_chars` minus what its media take. Text is cut at
  its end; media, instructions (system turns) and BToks are never cut. Token truncation can't do this: it would cut
  BToks off, or media apart from their pixels;
* an input whose media alone exceed the limit is refused;
* text never becomes a control token: a control token's name inside an input's strings (`<|btok_0|>`, `<|image_pad|>`,
  `<|im_end|>`, ...) gets a space behind its first character, so it stays readable and is tokenised as words. Without
  this a text that quotes a BTok's name would be pooled (measured), and one that quotes an image placeholder raises an
  error in the processor. Text without such names is unchanged to the letter;
* a chat conversation in one batch with inputs of other kinds, which sentence-transformers (6.2) wraps in a part that
  templates skip, is unwrapped; if it holds media, whose pixels are lost by then, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from st_btok.tokens import BTOK_PATTERN, btok_tokens

# Rebinds `messages`: a conversation inside a message part takes that message's place.
_UNWRAP = """{#- st_btok: unwrap nested conversations, shorten text so that media and BToks survive -#}
{%- set cut = namespace(left=0, media=0, text='', messages=[], content=[]) -%}
{%- for message in messages -%}
{%- set first = message.content[0] if message.content and message.content is not string else none -%}
{%- set nested = first.message if first and first.type == 'message'
    else message.content if first and first.role else none -%}
{%- if nested -%}
{%- for inner in nested -%}{%- for part in inner.content if inner.content is not string -%}
{%- if part.type != 'text' -%}
{{- raise_exception("st_btok: a chat conversation with " ~ part.type ~ " content can't share a batch with inputs of"
    " other kinds: sentence-transformers drops its media. Encode conversations in a call of their own, or turn the"
    " other inputs into conversations too.") -}}
{%- endif -%}{%- endfor -%}{%- endfor -%}
{%- set cut.messages = cut.messages + nested -%}
{%- else -%}{%- set cut.messages = cut.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = cut.messages -%}
"""

# Rebinds `messages` to a copy whose strings, roles included, hold no name of a control token. `control` maps the first
# two characters of the names to their rests: so the template never holds what it looks for, and text without any such
# pair skips the search (a Llama-3 has 256 names). Names can also arise where strings meet, in the input's next part or
# turn, even over blanks that a template trims: `seen` is the end of all text so far without the blanks at the seams; a
# dot parts the halves.
_GUARD = """{%- set guard = namespace(messages=[], message={}, content=[], text='', seen='', seam='') -%}
{%- macro guarded(text) -%}
{%- set guard.text = text -%}
{%- for head, rests in control.items() if head in text -%}{%- for rest in rests -%}
{%- set guard.text = guard.text.replace(head ~ rest, head[0] ~ ' ' ~ head[1:] ~ rest) -%}
{%- endfor -%}{%- endfor -%}
{%- set guard.seam = guard.seen ~ guard.text.strip()[:longest] -%}
{%- for head, rests in control.items() if head[0] in guard.seen -%}{%- for rest in rests -%}
{%- if head ~ rest in guard.seam -%}
{%- set guard.text = '.' ~ guard.text -%}{%- set guard.seam = '' -%}{%- set guard.seen = '' -%}
{%- endif -%}
{%- endfor -%}{%- endfor -%}
{%- set guard.seen = (guard.seen ~ guard.text.strip())[-longest:] -%}
{{- guard.text -}}
{%- endmacro -%}
{%- for message in messages -%}
{%- set guard.message = dict(message) -%}
{%- for key, value in message.items() -%}
{%- if value is string -%}
{%- set guard.message = dict(guard.message, **{key: guarded(value) | string}) -%}
{%- endif -%}
{%- endfor -%}
{%- if message.content is defined and message.content is not none and message.content is not string -%}
{%- set guard.content = [] -%}
{%- for part in message.content -%}
{%- if part is string -%}{%- set guard.content = guard.content + [guarded(part) | string] -%}
{%- elif part.text is defined and part.text is string -%}
{%- set guard.content = guard.content + [dict(part, text=guarded(part.text) | string)] -%}
{%- else -%}{%- set guard.content = guard.content + [part] -%}{%- endif -%}
{%- endfor -%}
{%- set guard.message = dict(guard.message, content=guard.content) -%}
{%- endif -%}
{%- set guard.messages = guard.messages + [guard.message] -%}
{%- endfor -%}
{%- set messages = guard.messages -%}
"""

# Rebinds `messages` to a copy with shortened user text. Undefined limits leave everything as it is.
_SHORTEN = """{%- if max_chars is defined and max_chars is not none -%}
{%- set cut.messages = [] -%}
{%- for message in messages -%}{%- if message.content is not string -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set cut.media = cut.media + (image_chars or 0) -%}
{%- elif part.type == 'video' -%}
{%- set cut.media = cut.media + (video_chars or 0) -%}
{%- elif part.type == 'audio' -%}
{%- set cut.media = cut.media + (audio_chars or 0) -%}
{%- elif part.type == 'text' -%}{%- set cut.text = cut.text ~ part.text[:60] -%}{%- endif -%}
{%- endfor -%}{%- else -%}{%- set cut.text = cut.text ~ message.content[:60] -%}{%- endif -%}{%- endfor -%}
{%- if cut.media > max_chars -%}
{{- raise_exception("st_btok: an input's media must leave room within the limit. The media of the input "
    "with the text '" ~ cut.text[:60] ~ "' may take the room of " ~ cut.media ~ " characters, the limit max_chars is "
    ~ max_chars ~ ". Give this input fewer media, lower max_pixels, or raise max_seq_length in "
    "build_model.") -}}
{%- endif -%}
{%- set cut.left = max_chars - cut.media -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set cut.messages = cut.messages + [message] -%}
{%- elif message.content is string -%}
{%- set cut.messages = cut.messages + [dict(message, content=message.content[:cut.left])] -%}
{%- set cut.left = [cut.left - message.content | length, 0] | max -%}
{%- else -%}
{%- set cut.content = [] -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{%- set cut.content = cut.content + [dict(part, text=part.text[:cut.left])] -%}
{%- set cut.left = [cut.left - part.text | length, 0] | max -%}
{%- else -%}{%- set cut.content = cut.content + [part] -%}{%- endif -%}
{%- endfor -%}
{%- set cut.messages = cut.messages + [dict(message, content=cut.content)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = cut.messages -%}
{%- endif -%}
"""


def append_btoks(chat_template: str, num_btoks: int, control_tokens: Sequence[str] = ()) -> str:
    """Make a chat template end with the K bottleneck tokens; a template that has them is returned as it is.

    Args:
        chat_template: A Jinja chat template in the form that transformers uses.
        num_btoks: K, at least 1.
        control_tokens: Further names that an input's text must not turn into tokens; see `control_tokens` in
            `tokens.py`. The K bottleneck tokens are always among them.

    Returns:
        The template with the guard and the text shortening in front and the K tokens behind the last turn.

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
    return f"{_UNWRAP}{_guard([*names, *control_tokens])}{_SHORTEN}{chat_template}{{{{- '{''.join(names)}' -}}}}"


def _guard(names: Sequence[str]) -> str:
    """The guard against names of control tokens in text, as Jinja."""
    rests: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        rests.setdefault(name[:2], []).append(name[2:])
    # `ascii` writes string literals that Jinja reads as Python does.
    control = ", ".join(f"{ascii(head)}: [{', '.join(map(ascii, rest))}]" for head, rest in rests.items())
    longest = max(map(len, names))
    return f"{{%- set control = {{{control}}} -%}}{{%- set longest = {longest} -%}}\n{_GUARD}"


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
    parts = "".join(
        f"{{%- if part.type == '{name}' -%}}{{%- set line.media = line.media ~ '{value}\\n' -%}}{{%- endif -%}}"
        for name, value in media.items()
        if value
    )
    return (
        "{%- set line = namespace(media='', text='', end='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{%- set line.end = '\\n' -%}{%- endif -%}"
        "{%- if message.content is string -%}{%- set line.text = line.text ~ message.content -%}"
        "{%- else -%}{%- for part in message.content -%}"
        f"{parts}{{%- if part.type == 'text' -%}}{{%- set line.text = line.text ~ part.text -%}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{%- endfor -%}"
        "{%- if line.media -%}{%- set line.end = '\\n' -%}{%- endif -%}"
        "{%- if not line.media and not line.text -%}{%- set line.text = ' ' -%}{%- endif -%}"
        "{{- line.media ~ line.text ~ ('' if line.text.endswith('\\n') or not line.text else line.end) -}}"
    )
