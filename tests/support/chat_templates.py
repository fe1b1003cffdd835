"""Chat templates with the structures of published families, written anew: their treatment of turns, not their words."""

LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Date: " + date_string + "\\n\\n" + told + "<|im_end|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|im_end|>" }}
    {%- elif message.role == 'tool' %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}{{- message.content | tojson }}{{- "<|im_end|>" }}
    {%- else %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set told = messages[0]["content"] %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("turns must alternate, the user's first") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == turns[-1] %}{{- "[TOOLS]" + tools | tojson }}{%- endif %}
        {%- if loop.last and told is defined %}{{- "[INST] " + told + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last == messages | length - 1 %}
        {%- set ns.last = (messages | length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content is string and loop.index0 > ns.last %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
VICUNA = """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set told = messages[0]['content'] %}\
{% else %}{% set turns = messages %}{% set told = 'A chat between two.' %}{% endif %}\
{{ bos_token + told }}{% for message in turns %}\
{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}\
{% else %}{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(told='', is_first=true) %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.told = ns.told + message['content'] %}\
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.told }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set text = message['content'] %}\
{%- if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{%- endif %}\
{{ '<|Assistant|>' + text + eos_token }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}\
{% for message in messages %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<|im_start|>' + role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
DOCUMENTS = """\
{{ bos_token }}{% if documents is not none %}{{ 'Documents:' + (documents | tojson(indent=2)) }}{% endif %}\
{% if tools is defined %}{{ ' tools: ' + (tools | tojson(ensure_ascii=true)) + '\\n' }}{% endif %}\
{% macro turn(message) %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endmacro %}\
{% for message in messages %}{% if message.role == 'assistant' %}assistant: \
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\
{% else %}{{ turn(message) }}{% if loop.length > 99 %}{% break %}{% endif %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""

SHAPES = {
    "llama 3.1": LLAMA31,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "deepseek": DEEPSEEK,
    "gemma": GEMMA,
    "documents": DOCUMENTS,
}
