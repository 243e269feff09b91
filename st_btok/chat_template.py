"""The chat template of a BTok checkpoint: shorten the text if needed, render the input, append the bottleneck tokens.

Everything a saved model needs lives in this Jinja text, so a plain `SentenceTransformer(path)` has it too:

* the BToks come after the last turn of whatever template the backbone has;
* `max_chars`, `image_chars` and `video_chars` (saved under `processing_kwargs["chat_template"]`, overridable per
  `encode` call) bound the text of an input: `max_chars` minus what its images and videos take. Text is cut at
  its end; media, instructions (system turns) and BToks are never cut. Token truncation can't do this: it would cut
  BToks off, or media apart from their pixels;
* an input whose media alone exceed the limit is refused;
* a chat conversation in one batch with inputs of other kinds, which sentence-transformers (6.2) wraps in a part that
  templates skip, is unwrapped; if it holds media, whose pixels are lost by then, it is refused.
"""

from __future__ import annotations

import re

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

# Rebinds `messages` to a copy with shortened user text. Undefined limits leave everything as it is.
_SHORTEN = """{%- if max_chars is defined and max_chars is not none -%}
{%- set cut.messages = [] -%}
{%- for message in messages -%}{%- if message.content is not string -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set cut.media = cut.media + (image_chars or 0) -%}
{%- elif part.type == 'video' -%}
{%- set cut.media = cut.media + (video_chars or 0) -%}
{%- elif part.type == 'text' -%}{%- set cut.text = cut.text ~ part.text[:60] -%}{%- endif -%}
{%- endfor -%}{%- else -%}{%- set cut.text = cut.text ~ message.content[:60] -%}{%- endif -%}{%- endfor -%}
{%- if cut.media > max_chars -%}
{{- raise_exception("st_btok: an input's media must leave room within the limit. The images and videos of the input "
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


def append_btoks(chat_template: str, num_btoks: int) -> str:
    """Make a chat template end with the K bottleneck tokens; a template that has them is returned as it is.

    Args:
        chat_template: A Jinja chat template in the form that transformers uses.
        num_btoks: K, at least 1.

    Returns:
        The template with text shortening in front and the K tokens behind the last turn.

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
    return f"{_UNWRAP}{_SHORTEN}{chat_template}{{{{- '{''.join(names)}' -}}}}"


def plain_template(image: str = "", video: str = "") -> str:
    """The authors' layout without chat turns: each image or video on a line of its own, then instruction and text.

    An instruction (system message, sentence-transformers' `prompt`) is put directly before the text. A newline ends
    the text. `append_btoks` then adds the BToks (release: `data/processors/qwen2_vl.py`).

    Args:
        image: What stands for one image in the backbone's own template, such as
            `<|vision_start|><|image_pad|><|vision_end|>`; empty for a text-only backbone.
        video: The same for a video.

    Returns:
        A Jinja chat template without bottleneck tokens.
    """
    for name, value in (("image", image), ("video", video)):
        if re.search(r"['\\\n]", value):
            raise ValueError(f"the {name} placeholder must not hold quotes, backslashes or newlines, got {value!r}")
    return (
        "{%- set line = namespace(media='', text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.content is string -%}{%- set line.text = line.text ~ message.content -%}"
        "{%- else -%}{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{{%- set line.media = line.media ~ '{image}\\n' -%}}"
        f"{{%- elif part.type == 'video' -%}}{{%- set line.media = line.media ~ '{video}\\n' -%}}"
        "{%- elif part.type == 'text' -%}{%- set line.text = line.text ~ part.text -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endfor -%}"
        "{{- line.media ~ line.text ~ ('' if line.text.endswith('\\n') or not line.text else '\\n') -}}"
    )
