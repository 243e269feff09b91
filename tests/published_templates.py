"""Chat templates of the shapes that families publish, written for the tests: roles, instructions, media, turn ends.

What they share with the published ones is the layout of a rendered row, blanks and line breaks included.
"""

from __future__ import annotations

from tests.tiny_tokenizer import QWEN_TEMPLATE


def _loop(turn: str, before: str = "", after: str = "") -> str:
    """`before` once, `turn` for every message, `after` once."""
    return before + "{%- for message in messages -%}" + turn + "{%- endfor -%}" + after


def _parts(text: str = "{{- part.text -}}", **media: str) -> str:
    """A message's content, a string or parts, in the order in which they come."""
    kinds = "".join(
        f"{{%- elif part.type == '{kind}' -%}}{{{{- '{placeholder}' -}}}}" for kind, placeholder in media.items()
    )
    return (
        "{%- if message.content is string -%}"
        + text.replace("part.text", "message.content")
        + "{%- else -%}{%- for part in message.content -%}{%- if part.type == 'text' -%}"
        + text
        + kinds
        + "{%- endif -%}{%- endfor -%}{%- endif -%}"
    )


def _first(*kinds: str, placeholder: str = "{kind}") -> str:
    """All media of each kind before any text."""
    return "".join(
        "{%- for part in message.content if part.type == '"
        + kind
        + "' -%}{{- '"
        + placeholder.format(kind=kind)
        + "' -}}"
        "{%- endfor -%}"
        for kind in kinds
    )


_OPEN = "{%- if add_generation_prompt -%}{{- 'OPEN' -}}{%- endif -%}"
# The instruction goes before the first turn's text; turns must alternate.
_INSTRUCTION = (
    "{%- set told = namespace(text='') -%}{%- set turns = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set told.text = (system if system is string else system[0].text) + '\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}{%- endif -%}"
)
_ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}{%- endif -%}"
)


def _told(loop: str) -> str:
    return _INSTRUCTION + loop.replace("in messages", "in turns")


GEMMA3 = _told(
    _loop(
        _ALTERNATE
        + "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
        + "{%- if loop.first -%}{{- told.text -}}{%- endif -%}"
        + _parts("{{- part.text | trim -}}", image="<start_of_image>")
        + "{{- '<end_of_turn>\\n' -}}",
        before="{{- bos_token -}}",
        after=_OPEN.replace("OPEN", "<start_of_turn>model\\n"),
    )
)
# No instructions, and text as a string only.
GEMMA = _loop(
    _ALTERNATE
    + "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    + "{{- message['content'] | trim + '<end_of_turn>\\n' -}}",
    before="{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}",
    after=_OPEN.replace("OPEN", "<start_of_turn>model\\n"),
)
# A system turn that is always there and writes today's date.
LLAMA3 = (
    "{{- bos_token -}}{%- if date_string is not defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}{%- endif -%}"
    "{%- set told = '' -%}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set told = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: '"
    " + date_string + '\\n\\n' + told + '<|eot_id|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}" + _OPEN.replace("OPEN", "<|start_header_id|>assistant<|end_header_id|>\\n\\n")
)
GRANITE = (
    "{%- set told = 'Today is ' + strftime_now('%B %d, %Y') + '. You are Granite.' -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set told = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + told + '<|end_of_text|>\\n' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' -}}"
    "{%- endfor -%}" + _OPEN.replace("OPEN", "<|start_of_role|>assistant<|end_of_role|>")
)
SMOLLM3 = (
    "{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n\\n' -}}"
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] -}}{%- endif -%}{{- '<|im_end|>\\n' -}}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}" + _OPEN.replace("OPEN", "<|im_start|>assistant\\n")
)
# Instructions before the first text, ends of replies only; `[INST]` is a token of newer vocabularies, text of older.
MISTRAL = _told(
    _loop(
        _ALTERNATE
        + "{%- if message['role'] == 'user' -%}{{- '[INST] ' -}}{%- if loop.first -%}{{- told.text -}}{%- endif -%}"
        + "{{- message['content'] + '[/INST]' -}}{%- else -%}"
        + "{{- ' ' + message['content'] + eos_token -}}{%- endif -%}",
        before="{{- bos_token -}}",
    )
)
PIXTRAL = _told(
    _loop(
        "{%- if message['role'] == 'user' -%}{{- '[INST]' -}}{%- if loop.first -%}{{- told.text -}}{%- endif -%}"
        + _parts(image="[IMG]")
        + "{{- '[/INST]' -}}{%- else -%}"
        + _parts()
        + "{{- eos_token -}}{%- endif -%}",
        before="{{- bos_token -}}",
    )
)
# Parts only: a string is left out in silence. Media first take the blank behind the role away.
SMOLVLM = _loop(
    "{{- message.role | capitalize -}}{%- if message.content[0].type in ('image', 'video') -%}{{- ':' -}}"
    "{%- else -%}{{- ': ' -}}{%- endif -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'image' -%}{{- '<image>' -}}{%- elif part.type == 'video' -%}{{- '<video>' -}}{%- endif -%}"
    "{%- endfor -%}{{- '<end_of_utterance>\\n' -}}",
    before="{{- '<|im_start|>' -}}",
    after=_OPEN.replace("OPEN", "Assistant:"),
)
LLAVA_ONEVISION = _loop(
    "{{- '<|im_start|>' + message.role + ' ' -}}"
    + _first("image", "video", placeholder="<{kind}>")
    + "{%- for part in message.content if part.type == 'text' -%}{{- '\\n' + part.text -}}{%- endfor -%}"
    "{{- '<|im_end|>' -}}",
    after=_OPEN.replace("OPEN", "<|im_start|>assistant\\n"),
)
# ChatML that fills in a missing system turn; the picture in a line of its own.
FAST_VLM = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    + _loop(
        "{{- '<|im_start|>' + message.role + '\\n' -}}" + _parts(image="<image>\\n") + "{{- '<|im_end|>\\n' -}}",
        after=_OPEN.replace("OPEN", "<|im_start|>assistant\\n"),
    )
)
# Plain words as roles, no end of a turn; an instruction without a role.
LLAVA = _loop(
    "{%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}"
    + _first("image", placeholder="<image>\\n")
    + "{%- for part in message.content if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endfor -%}",
    after=_OPEN.replace("OPEN", "ASSISTANT:"),
)
LLAVA_NEXT = _loop(
    "{%- if message.role == 'system' -%}{{- '<<SYS>>\\n' + message.content[0].text + '\\n<</SYS>>\\n\\n' -}}"
    "{%- elif message.role == 'user' -%}{{- '[INST] ' -}}"
    + _first("image", placeholder="<image>\\n")
    + "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}{{- ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message.content[0].text + '</s> ' -}}{%- endif -%}"
)
# Placeholders with numbers, counted over the conversation.
PHI3_VISION = "{%- set count = namespace(images=0) -%}" + _loop(
    "{{- '<|' + message.role + '|>\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{%- set count.images = count.images + 1 -%}"
    "{{- '<|image_' ~ count.images ~ '|>\\n' -}}{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|end|>\\n' -}}",
    after=_OPEN.replace("OPEN", "<|assistant|>\\n"),
)

# No end of a turn: the next role's token is one. A video's frames are written as images by the processor.
GLM4V = _loop(
    "{{- '<|' + message.role + '|>\\n' -}}"
    + _parts(
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
    )
    + "{%- if message.role == 'user' and enable_thinking is defined and not enable_thinking -%}"
    "{{- '/nothink' -}}{%- endif -%}",
    before="{{- '[gMASK]<sop>' -}}",
    after=_OPEN.replace("OPEN", "<|assistant|>\\n"),
)
GEMMA4 = _loop(
    "{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
    + _parts("{{- part.text | trim -}}", image="<|image|>", video="<|video|>", audio="<|audio|>")
    + "{{- '<turn|>\\n' -}}",
    before="{{- bos_token -}}",
    after=_OPEN.replace("OPEN", "<|turn>model\\n"),
)


def _chatml(**media: str) -> str:
    return _loop(
        "{{- '<|im_start|>' + message.role + '\\n' -}}" + _parts(**media) + "{{- '<|im_end|>\\n' -}}",
        after=_OPEN.replace("OPEN", "<|im_start|>assistant\\n"),
    )


LFM2_VL = "{{- bos_token -}}" + _chatml(image="<image>")
LFM3_VL = "{{- bos_token -}}" + _chatml(image="<|vision_start|><|image_pad|><|vision_end|>", video="<|video_pad|>")
MINICPM = _chatml(image="<|image_pad|>\\n", video="<|video_pad|>\\n")
# Media first, pictures with numbers where there are several.
MOLMO2 = _loop(
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- set pictures = message.content | selectattr('type', 'equalto', 'image') | list -%}"
    + _first("video", placeholder="<|{kind}|>")
    + "{%- for picture in pictures -%}{%- if pictures | length > 1 -%}{{- 'Image ' ~ loop.index -}}{%- endif -%}"
    "{{- '<|image|>' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}",
    after=_OPEN.replace("OPEN", "<|im_start|>assistant\\n"),
)
# Plain words as roles, an instruction without one, pictures with numbers as text.
ERNIE = "{%- set count = namespace(images=0) -%}" + _loop(
    "{%- if message.role == 'user' -%}{{- 'User: ' -}}{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' -}}"
    "{%- endif -%}{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'image' -%}{%- set count.images = count.images + 1 -%}"
    "{{- 'Picture ' ~ count.images ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}"
    "{%- elif part.type == 'video' -%}{{- 'Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|end_of_sentence|>' if message.role == 'assistant' else '\\n' -}}",
    before="{{- '<|begin_of_sentence|>' -}}",
    after=_OPEN.replace("OPEN", "Assistant: "),
)
KIMI = _loop(
    "{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' -}}"
    + _parts(
        image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\\n",
        video="<|kimi_k25_video_placeholder|>",
    )
    + "{{- '<|im_end|>' -}}",
    after=_OPEN.replace("OPEN", "<|im_assistant|>assistant<|im_middle|>"),
)
PHI4_MULTIMODAL = _loop(
    "{{- '<|' + message.role + '|>' -}}" + _parts(image="<|image|>", audio="<|audio|>") + "{{- '<|end|>' -}}",
    after=_OPEN.replace("OPEN", "<|assistant|>"),
)
# Without an instruction it writes one, with today's date and yesterday's, which it reckons.
MISTRAL_SMALL = (
    "{{- bos_token -}}{%- set today = strftime_now('%Y-%m-%d') -%}"
    "{%- set yesterday = today[:8] ~ '%02d' % (strftime_now('%d') | int - 1) -%}"
    "{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set told = 'The current date is ' + today + ' (yesterday was ' + yesterday + ').' -%}"
    "{%- set turns = messages -%}{%- endif -%}"
    "{{- '[SYSTEM_PROMPT]' + (told if told is string else told[0].text) + '[/SYSTEM_PROMPT]' -}}"
    "{%- for message in turns -%}{%- if message.role == 'user' -%}{{- '[INST]' -}}"
    + _parts(image="[IMG]")
    + "{{- '[/INST]' -}}{%- else -%}"
    + _parts()
    + "{{- eos_token -}}{%- endif -%}{%- endfor -%}"
)
# A preamble of its own before every conversation.
AYA_VISION = (
    "{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You are Aya.' -}}"
    "{%- for message in messages if message.role == 'system' -%}{{- '\\n\\n' -}}"
    + _parts()
    + "{%- endfor -%}{{- '<|END_OF_TURN_TOKEN|>' -}}"
    "{%- for message in messages if message.role != 'system' -%}{{- '<|START_OF_TURN_TOKEN|>' -}}"
    "{{- '<|USER_TOKEN|>' if message.role == 'user' else '<|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}"
    + _parts(image="<image>")
    + "{{- '<|END_OF_TURN_TOKEN|>' if message.role == 'user' else '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}"
    "{%- endfor -%}" + _OPEN.replace("OPEN", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>")
)
DEEPSEEK_VL = (
    "{%- if messages[0].role != 'system' -%}{{- 'You can see.\\n\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- 'User: ' -}}"
    "{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' -}}{%- endif -%}"
    + _parts(image="<image_placeholder>")
    + "{{- '<|end_of_text|>' if message.role == 'assistant' else '\\n\\n' -}}{%- endfor -%}"
    + _OPEN.replace("OPEN", "Assistant:")
)

# Backbone, template, further control tokens, and the token that closes a reply.
PUBLISHED = {
    "gemma": ("gemma", GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gemma2": ("gemma2", GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "gemma3": ("gemma3", GEMMA3, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "llama3": (
        "llama",
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "mistral, old vocabulary": ("mistral", MISTRAL, (), "<|im_end|>"),
    "mistral, new vocabulary": ("mistral", MISTRAL, ("[INST]", "[/INST]"), "<|im_end|>"),
    "smolvlm": ("smolvlm", SMOLVLM, ("<end_of_utterance>",), "<end_of_utterance>"),
    "idefics3": ("idefics3", SMOLVLM, ("<end_of_utterance>",), "<end_of_utterance>"),
    "llava_onevision": ("llava_onevision", LLAVA_ONEVISION, (), "<|im_end|>"),
    "phi-3-vision": (
        "llama",
        PHI3_VISION,
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>",
    ),
}
# The same for the further families of `tests/tiny_newer.py`.
NEWER = {
    "glm4v": ("glm4v", GLM4V, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), "<|im_end|>"),
    "glm46v": ("glm46v", GLM4V, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), "<|im_end|>"),
    "gemma4": ("gemma4", GEMMA4, ("<|turn>", "<turn|>"), "<turn|>"),
    "lfm2_vl": ("lfm2_vl", LFM2_VL, (), "<|im_end|>"),
    "lfm3_vl": ("lfm3_vl", LFM3_VL, (), "<|im_end|>"),
    "minicpmv4_6": ("minicpmv4_6", MINICPM, (), "<|im_end|>"),
    "molmo2": ("molmo2", MOLMO2, (), "<|im_end|>"),
    "ernie4_5_vl": ("ernie4_5_vl", ERNIE, ("<|begin_of_sentence|>", "<|end_of_sentence|>"), "<|end_of_sentence|>"),
    "kimi_k25": (
        "kimi_k25", KIMI, ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"), "<|im_end|>"
    ),
    "mistral_small": (
        "mistral_small", MISTRAL_SMALL, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<|im_end|>"
    ),
    "ministral3": (
        "ministral3", MISTRAL_SMALL, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<|im_end|>"
    ),
    "pixtral": ("pixtral", PIXTRAL, ("[INST]", "[/INST]"), "<|im_end|>"),
    "llava": ("llava", LLAVA, (), "<|im_end|>"),
    "llava_next": ("llava_next", LLAVA_NEXT, (), "<|im_end|>"),
    "aya_vision": (
        "aya_vision",
        AYA_VISION,
        (
            "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
        ),
        "<|END_RESPONSE|>",
    ),
    "deepseek_vl": ("deepseek_vl", DEEPSEEK_VL, ("<|end_of_text|>",), "<|end_of_text|>"),
    "phi4_multimodal": (
        "phi4_multimodal", PHI4_MULTIMODAL, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>"
    ),
    "qwen3_vl_moe": ("qwen3_vl_moe", QWEN_TEMPLATE, (), "<|im_end|>"),
    "fast_vlm": ("fast_vlm", FAST_VLM, (), "<|im_end|>"),
    "smollm3": ("smollm3", SMOLLM3, (), "<|im_end|>"),
    "granite": ("granite", GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"),
}  # fmt: skip
